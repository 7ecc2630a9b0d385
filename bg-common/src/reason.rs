//! Why a packet got its verdict. One reason per packet, one counter per reason.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// The reason of a verdict: index of its counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// Every reason, in counter order.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The reason of a counter.
            #[inline(always)]
            pub const fn from_index(index: u32) -> Option<Self> {
                match index {
                    $(x if x == Self::$name as u32 => Some(Self::$name),)+
                    _ => None,
                }
            }

            /// The name in JSON, metrics and text.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// What the reason means, for an operator.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii_start(),)+ }
            }
        }
    };
}

reasons! {
    /// Client's packet of a known flow, sent to its backend.
    Forwarded = "forwarded",
    /// First packet of a flow, sent to the backend the word and the pool chose.
    ForwardedNew = "forwarded_new",
    /// Client's mid-stream packet of an unknown flow, sent where the word and the pool say.
    ForwardedOrphan = "forwarded_orphan",
    /// Sent on, but not remembered: the flow table is full.
    ForwardedTableFull = "forwarded_table_full",
    /// Rewritten, then given to the stack to route: the backend's next hop is not resolved.
    ForwardedByStack = "forwarded_by_stack",
    /// Backend's packet, sent back to its client.
    Returned = "returned",
    /// Client's packet of a cut flow, answered with a TCP RST.
    ResetClient = "reset_client",
    /// Backend's packet of a cut flow, answered with a TCP RST.
    ResetBackend = "reset_backend",
    /// Packet of a cut flow that has nobody to answer: dropped.
    CutDropped = "cut_dropped",
    /// Backend's packet of a flow that now belongs to another backend: dropped.
    ReturnStale = "return_stale",
    /// Backend's packet, but its client's next hop is unknown: dropped.
    ReturnUnreachable = "return_unreachable",
    /// No listener's address, no flow of ours: untouched, to the stack.
    NotOurs = "not_ours",
    /// From a backend's endpoint, but of no flow of ours: untouched, to the stack.
    ReturnUnknown = "return_unknown",
    /// Neither IPv4 nor IPv6: untouched, to the stack.
    NotIp = "not_ip",
    /// Ends inside a header: untouched, to the stack.
    Truncated = "truncated",
    /// A header contradicts itself: untouched, to the stack.
    BadHeader = "bad_header",
    /// Three VLAN tags, or a VLAN that the host has no device for: untouched, to the stack.
    Vlan = "vlan",
    /// IP fragment whose first one is not known, or that may hide a header: untouched, to the stack.
    Fragment = "fragment",
    /// IPv6 extension header that cannot be walked over: untouched, to the stack.
    ExtensionHeader = "extension_header",
    /// ICMP or ICMPv6 error about no flow of ours: untouched, to the stack.
    IcmpError = "icmp_error",
    /// ICMP or ICMPv6 error about a packet to a client, translated and sent to its backend.
    ForwardedError = "forwarded_error",
    /// ICMP or ICMPv6 error about a packet to a backend, translated and sent to its client.
    ReturnedError = "returned_error",
    /// TTL or hop limit used up: its sender was told by ICMP.
    SentTimeExceeded = "sent_time_exceeded",
    /// TTL or hop limit used up, of an error or behind IPv4 options: untouched, to the stack.
    TtlExpired = "ttl_expired",
    /// Larger than the egress interface's MTU: its sender was told by ICMP.
    SentTooBig = "sent_too_big",
    /// Larger than the egress interface's MTU, behind IPv4 options: untouched, to the stack.
    TooBig = "too_big",
    /// The chosen colour has no backend for this address family: dropped.
    NoBackend = "no_backend",
    /// snat: no port towards the backend is to be had, or the packet is of no flow that could have one: dropped.
    NoPort = "no_port",
    /// snat and dsr: the backend's next hop, or the gateway's own address, is not known: dropped.
    ForwardUnreachable = "forward_unreachable",
    /// Later fragment of a client's packet, sent where the first one went.
    ForwardedFragment = "forwarded_fragment",
    /// Later fragment of a backend's packet, sent where the first one went.
    ReturnedFragment = "returned_fragment",
    /// Later fragment of a packet whose first one was not sent on, or too large for the way out: dropped.
    FragmentDropped = "fragment_dropped",
    /// The tables contradict each other (a bug, or a change in mid-air): dropped.
    Inconsistent = "inconsistent",
}

/// Number of reasons: size of the counter table.
pub const REASONS: u32 = Reason::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_dense_and_names_unique() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(Reason::from_index(index as u32), Some(*reason));
            let same = Reason::ALL
                .iter()
                .filter(|other| other.as_str() == reason.as_str())
                .count();
            assert_eq!(same, 1, "{}", reason.as_str());
        }
        assert_eq!(Reason::from_index(REASONS), None);
    }
}
