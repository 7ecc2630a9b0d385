//! Whose a backend's packet is that came to a client by a preview: a backend's endpoint has
//! two ways back then, to its listener and to the preview of its colour.

use bg_common::{
    flow::FlowTable,
    key::{Endpoint, PREVIEW, UDP},
    service::ReturnPath,
};

use crate::{
    flows::FlowCell,
    parse::Segment,
    pipeline::{current, seek_client},
    rewrite::Network,
    tables::{FamilyTables, Tables},
};

/// The ends of a packet from a backend. Aligned like the loads that the compiler makes of
/// an address, two words at a time.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Reply<A> {
    /// The backend.
    pub backend: A,
    /// Whom it is for: the client, or in `snat` the gateway.
    pub to: A,
    /// The backend's port, network byte order.
    pub backend_port: [u8; 2],
    /// The other port, network byte order.
    pub port: [u8; 2],
    /// [`bg_common::key::TCP`] or [`UDP`].
    pub protocol: u8,
}

impl<A: Copy> Reply<A> {
    #[inline(always)]
    pub(crate) fn of(segment: &Segment<A>) -> Self {
        Self {
            backend: segment.source,
            to: segment.destination,
            backend_port: segment.source_port,
            port: segment.destination_port,
            protocol: segment.protocol,
        }
    }

    #[inline(always)]
    pub(crate) fn from(&self) -> Endpoint<A> {
        Endpoint::new(self.backend, self.backend_port, self.protocol)
    }
}

/// The way back to the preview of the backend's colour, if the packet is of a flow that
/// came by it. `path` is the way back to the listener.
#[inline(always)]
pub(crate) fn preview<'a, T: Tables + FamilyTables<A>, A: Network>(
    tables: &'a T,
    reply: &Reply<A>,
    path: &ReturnPath,
) -> Option<&'a ReturnPath> {
    if path.previewed == 0 {
        return None;
    }
    tables.keep_reply(*reply);
    if came_by_preview::<T, A>(tables) == 0 {
        return None;
    }
    tables.return_path(&reply.from().preview())
}

/// 1 when a flow of the preview goes to a backend's endpoint, and none of its listener's
/// from the same end of a client: to the backend, both are one. What is proven goes before
/// what is not, so that nobody can take a preview's replies by a SYN to the listener.
#[inline(never)]
fn came_by_preview<T: Tables + FamilyTables<A>, A: Network>(tables: &T) -> u64 {
    let reply: &Reply<A> = tables.reply();
    let last = if reply.protocol == UDP {
        FlowTable::Udp
    } else {
        if goes_to::<T, A>(tables, 0, FlowTable::Established as u32) != 0 {
            return 0;
        }
        if goes_to::<T, A>(tables, PREVIEW, FlowTable::Established as u32) != 0 {
            return 1;
        }
        FlowTable::HalfOpen
    };
    if goes_to::<T, A>(tables, 0, last as u32) != 0 {
        return 0;
    }
    goes_to::<T, A>(tables, PREVIEW, last as u32)
}

/// 1 when a table has a flow to a backend's endpoint, by its listener or, with `name` being
/// [`PREVIEW`], by its preview.
#[inline(never)]
fn goes_to<T: Tables + FamilyTables<A>, A: Network>(tables: &T, name: u8, table: u32) -> u64 {
    let reply: &Reply<A> = tables.reply();
    let from = Endpoint::new(reply.backend, reply.backend_port, reply.protocol | name);
    let Some(path) = tables.return_path(&from) else {
        return 0;
    };
    let via = seek_client::<T, A>(tables, (reply.to, reply.port), path);
    let flow = current(tables, FlowTable::from_index(table), tables.tick());
    u64::from(flow.is_some_and(|flow| is_with(tables, flow, reply.backend, via)))
}

/// True when a flow is the one with the backend of this address that sees its client as
/// [`bg_common::flow::Flow::via`] says.
#[inline(always)]
pub(crate) fn is_with<T: Tables, A: Network>(
    tables: &T,
    flow: &FlowCell,
    address: A,
    via: u16,
) -> bool {
    let backend = tables.backend(flow.backend.get());
    flow.via.get() == via
        && backend.is_some_and(|backend| A::from_wide(&backend.address) == address)
}
