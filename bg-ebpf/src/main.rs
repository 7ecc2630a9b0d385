//! The kernel shell: the XDP entry, and the packet path's two traits over the
//! kernel's packet and maps.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the entry's attribute macro makes an item of its own, and fixes the entry's shape"
)]

mod endpoints;
mod lent;
mod maps;
mod remembered;
mod signals;
mod watch;

use core::ptr;

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{bpf_fib_lookup as FibLookup, xdp_action, xdp_md},
    helpers::generated::{
        bpf_fib_lookup, bpf_jiffies64, bpf_ktime_get_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
        bpf_xdp_get_buff_len,
    },
    macros::xdp,
    programs::XdpContext,
};
use bg_common::{
    abi::MAGLEV_ROW,
    flow::{FlowKey, FlowTable},
    key::{Endpoint, FragmentKey},
    monitor::LISTENS,
    port::{Port, Tags},
    reason::Reason,
    service::{
        Backend, Colour, ColourStats, CutoverWord, FirstFlow, Fragment, Interface, Listener,
        NextHop, PoolWord, ReturnPath,
    },
    snat::Source,
};
use bg_ebpf::{
    flows::FlowCell,
    packet::Packet,
    parse::Segment,
    pipeline::{Action, process},
    preview::Reply,
    tables::{FamilyTables, Scratch, Tables, name},
};

use crate::endpoints::whose;

/// The names of these are [`bg_common::abi::global`]'s. The daemon sets them before
/// the load; the verifier then leaves out the branch that is not taken, and with it
/// a helper that an old kernel does not have.
#[unsafe(no_mangle)]
static LARGE_FRAMES: Global<u32> = Global::new(0);

/// The XDP entry.
#[xdp]
pub fn bgswitch(context: XdpContext) -> u32 {
    run(context)
}

/// The XDP entry for frames in several buffers, of which the packet path reads the
/// first (kernel 5.18).
#[xdp(frags)]
pub fn bgswitch_large(context: XdpContext) -> u32 {
    run(context)
}

/// Compares the kernel's clocks, for [`tick`]: run once, before the others.
#[xdp]
pub fn set_clock(_context: XdpContext) -> u32 {
    let Some(clock) = maps::CLOCK.get_ptr_mut(0) else {
        return xdp_action::XDP_ABORTED;
    };
    // SAFETY: a valid map value, of which nobody else knows yet; the helpers take
    // nothing.
    unsafe {
        let jiffies = bpf_jiffies64().wrapping_mul((*clock).jiffy);
        (*clock).ahead = jiffies.wrapping_sub(bpf_ktime_get_ns());
    }
    xdp_action::XDP_DROP
}

/// A verdict, and what the driver does with it.
#[inline(always)]
fn run(context: XdpContext) -> u32 {
    let context = context.as_ptr().cast();
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else {
        return xdp_action::XDP_ABORTED; // an array of one has a first value
    };
    let watched = watch::begin(scratch);
    let verdict = process(
        &mut Frame { context, scratch },
        &Kernel {
            context,
            scratch,
            watched,
        },
    );
    watch::end(watched, &verdict, Frame { context, scratch }.ingress());
    match verdict.action {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop => xdp_action::XDP_DROP,
        Action::Transmit => xdp_action::XDP_TX,
        Action::Redirect(_) if maps::is_dry_run() => xdp_action::XDP_REDIRECT,
        Action::Redirect(slot) => maps::PORTS
            .redirect(slot, u64::from(xdp_action::XDP_DROP))
            .unwrap_or_else(|action| action),
    }
}

struct Frame {
    context: *mut xdp_md,
    scratch: *mut Scratch,
}

impl Packet for Frame {
    // Volatile: the optimiser would read these once and hand them to functions
    // as numbers, and the verifier would no longer see pointers; or it would
    // compute an address in the context, which the verifier lets nobody read by.
    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: this run's context.
        unsafe { ptr::read_volatile(&raw const (*self.context).data) as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: this run's context.
        unsafe { ptr::read_volatile(&raw const (*self.context).data_end) as usize }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        if LARGE_FRAMES.load() == 0 {
            return self.end() - self.start();
        }
        // SAFETY: this run's context (kernel 5.18).
        unsafe { bpf_xdp_get_buff_len(self.context) as usize }
    }

    // The first buffer has most packets as a whole, and costs no call.
    #[inline(always)]
    fn holds(&self, bytes: usize) -> bool {
        self.end() - self.start() >= bytes || LARGE_FRAMES.load() != 0 && self.length() >= bytes
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: this run's context.
        unsafe { ptr::read_volatile(&raw const (*self.context).ingress_ifindex) }
    }

    // Volatile: by way of memory the tags are any number to the verifier, which
    // then sees one journey, not one for each number of tags.
    #[inline(always)]
    fn tags(&self) -> Tags {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
        unsafe { ptr::read_volatile(&raw const (*self.scratch).tags) }
    }

    #[inline(always)]
    fn port(&self) -> Port {
        // SAFETY: as in `tags`.
        let vlan = unsafe { ptr::read_volatile(&raw const (*self.scratch).vlan) };
        Port::new(self.ingress(), vlan)
    }

    #[inline(always)]
    fn tag(&mut self, tags: Tags) {
        // SAFETY: as in `tags`.
        unsafe {
            ptr::write_volatile(&raw mut (*self.scratch).tags, tags);
            ptr::write_volatile(&raw mut (*self.scratch).vlan, tags.vlan());
        }
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        let delta = length as i32 - self.length() as i32;
        // SAFETY: the context is this run's; the helper changes its data and
        // data_end, which are read anew for every view.
        delta == 0 || unsafe { bpf_xdp_adjust_tail(self.context, delta) } == 0
    }

    #[inline(always)]
    fn grow(&mut self, bytes: usize) -> bool {
        // SAFETY: as in `truncate`.
        unsafe { bpf_xdp_adjust_head(self.context, -(bytes as i32)) == 0 }
    }

    #[inline(always)]
    fn shrink(&mut self, bytes: usize) -> bool {
        // SAFETY: as in `truncate`.
        unsafe { bpf_xdp_adjust_head(self.context, bytes as i32) == 0 }
    }
}

/// The clock in ticks. The kernel's verifier puts the reading of the jiffies in the
/// helper's place (since 5.6): a load instead of a call.
#[inline(always)]
fn tick() -> u32 {
    // SAFETY: the helper takes nothing.
    let jiffies = unsafe { bpf_jiffies64() };
    maps::CLOCK.get(0).map_or(0, |clock| clock.tick(jiffies))
}

struct Kernel {
    context: *mut xdp_md,
    scratch: *mut Scratch,
    watched: u64,
}

impl Tables for Kernel {
    #[inline(always)]
    fn word(&self, service: u32) -> Option<CutoverWord> {
        watch::service(self.scratch, service);
        let word = maps::WORDS.get_ptr(service)?;
        // SAFETY: a valid map value, 8-byte aligned; volatile, so that it is one
        // load and only one, whatever the optimiser thinks.
        Some(CutoverWord(unsafe { ptr::read_volatile(word) }))
    }

    #[inline(always)]
    fn first_flow(&self, service: u32) -> FirstFlow {
        // SAFETY: as in `word`.
        FirstFlow(
            maps::FIRST_FLOWS
                .get_ptr(service)
                .map_or(0, |stamp| unsafe { ptr::read_volatile(stamp) }),
        )
    }

    #[inline(always)]
    fn set_first_flow(&self, service: u32, stamp: FirstFlow) {
        if maps::is_dry_run() {
            return;
        }
        if let Some(value) = maps::FIRST_FLOWS.get_ptr_mut(service) {
            // SAFETY: a valid map value, 8-byte aligned; one store.
            unsafe { ptr::write_volatile(value, stamp.0) }
        }
    }

    #[inline(always)]
    fn pool(&self, index: u32) -> PoolWord {
        // SAFETY: as in `word`.
        PoolWord(
            maps::POOLS
                .get_ptr(index)
                .map_or(0, |pool| unsafe { ptr::read_volatile(pool) }),
        )
    }

    #[inline(always)]
    fn maglev(&self, slot: u32) -> Option<u32> {
        let row = maps::MAGLEV.get(slot / MAGLEV_ROW)?;
        row.get((slot % MAGLEV_ROW) as usize).copied()
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend> {
        maps::BACKENDS.get(id)
    }

    #[inline(always)]
    fn interface(&self, slot: u32) -> Option<&Interface> {
        maps::INTERFACES.get(slot)
    }

    #[inline(always)]
    fn slot(&self, port: &Port) -> Option<u32> {
        // SAFETY: a copy of four aligned bytes; the daemon writes them once.
        unsafe { maps::SLOTS.get(port) }.copied()
    }

    #[inline(always)]
    fn tick(&self) -> u32 {
        tick()
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: the helper takes nothing.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn seek(&self, key: &FlowKey) {
        remembered::seek(self.scratch, key);
    }

    #[inline(always)]
    fn expect_half_open(&self) {
        remembered::fetch(FlowTable::HalfOpen as u32);
    }

    #[inline(always)]
    fn sought(&self) -> &FlowKey {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
        unsafe { &(*self.scratch).key }
    }

    #[inline(always)]
    fn flow(&self, table: FlowTable) -> Option<&FlowCell> {
        let flow = remembered::flow(self.scratch, table)?;
        if maps::is_dry_run() {
            return Some(remembered::copy(self.scratch, table, flow));
        }
        Some(flow)
    }

    #[inline(always)]
    fn pending(&self) -> &FlowCell {
        remembered::pending(self.scratch)
    }

    #[inline(always)]
    fn remember(&self, table: FlowTable) -> bool {
        if maps::is_dry_run() {
            return remembered::has_room(table, self.tick());
        }
        remembered::remember(table, self.tick())
    }

    #[inline(always)]
    fn source(&self, block: u32) -> Option<&Source> {
        maps::SOURCES.get(block)
    }

    #[inline(always)]
    fn has_port(&self, block: u32, index: u32) -> bool {
        lent::has_port(block, index) != 0
    }

    #[inline(always)]
    fn seek_lessee(&self, block: u32, index: u32, listener: u16) -> bool {
        lent::seek_lessee(block, index, u32::from(listener)) != 0
    }

    #[inline(always)]
    fn lend(&self, block: u32, table: FlowTable) -> u16 {
        lent::lend_port(block, table as u32, self.tick()) as u16
    }

    #[inline(always)]
    fn keep_port(&self, block: u32, index: u32) -> bool {
        if maps::is_dry_run() {
            return self.has_port(block, index);
        }
        lent::keep_port(block, index) != 0
    }

    #[inline(always)]
    fn plan(&self, fragment: Fragment) {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP; no
        // reference to it lives when it is written.
        unsafe { (*self.scratch).plan = fragment }
    }

    #[inline(always)]
    fn planned(&self) -> &Fragment {
        // SAFETY: as in `plan`.
        unsafe { &(*self.scratch).plan }
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if maps::is_dry_run() {
            return;
        }
        if let Some(counter) = maps::REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
            unsafe { *counter += 1 }
        }
    }

    #[inline(always)]
    fn listens(&self) -> bool {
        self.watched & LISTENS != 0 && !maps::is_dry_run()
    }

    #[inline(always)]
    fn hear(&self, kind: u32, sequence: u32, payload: u32) {
        signals::hear(kind, sequence, payload);
    }

    #[inline(always)]
    fn record(&self, service: u32, colour: Colour, add: impl FnOnce(&mut ColourStats)) {
        watch::colour(self.scratch, service, colour);
        if maps::is_dry_run() {
            return;
        }
        if let Some(stats) = maps::STATS.get_ptr_mut(service * 2 + colour as u32) {
            // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
            add(unsafe { &mut *stats });
        }
    }
}

macro_rules! family {
    ($address:ty, $segment:ident, $reply:ident, $fragments:ident, $af:ident, $place:expr) => {
        impl FamilyTables<$address> for Kernel {
            #[inline(always)]
            fn keep(&self, segment: Segment<$address>) {
                watch::family::<$address>(self.scratch);
                // SAFETY: this CPU's own value, and XDP is not preempted by XDP; no
                // reference to it exists before this one write.
                unsafe { (*self.scratch).$segment = segment }
            }

            #[inline(always)]
            fn kept(&self) -> &Segment<$address> {
                // SAFETY: as in `keep`; plain integers, valid also when never written.
                unsafe { &(*self.scratch).$segment }
            }

            #[inline(always)]
            fn keep_reply(&self, reply: Reply<$address>) {
                // SAFETY: as in `plan`.
                unsafe { (*self.scratch).$reply = reply }
            }

            #[inline(always)]
            fn reply(&self) -> &Reply<$address> {
                // SAFETY: as in `kept`.
                unsafe { &(*self.scratch).$reply }
            }

            #[inline(always)]
            fn listener(&self, to: &Endpoint<$address>) -> Option<Listener> {
                whose(&name(to))?.listener()
            }

            #[inline(always)]
            fn return_path(&self, from: &Endpoint<$address>) -> Option<&ReturnPath> {
                whose(&name(from))?.path()
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$address>) -> Option<&Fragment> {
                // SAFETY: entries are written whole before they are to be found.
                unsafe { maps::$fragments.get(key) }
            }

            #[inline(always)]
            fn remember_fragment(&self, key: &FragmentKey<$address>, fragment: &Fragment) {
                if maps::is_dry_run() {
                    return;
                }
                // What finds no place is a fragment that passes, and counts as one.
                let _ = maps::$fragments.insert(key, fragment, 0);
            }

            // A function of its own, with a stack of its own: the query is large,
            // and asked once a second a flow.
            #[inline(never)]
            fn route(&self, from: &[u8; 16], to: &$address, device: u32) -> NextHop {
                // SAFETY: plain integers and arrays, for which zero is valid.
                let mut query: Query = unsafe { core::mem::zeroed() };
                let query = &mut query.0;
                query.family = $af;
                query.ifindex = device;
                $place(query, from, to);
                // SAFETY: this run's context, and a query of the size given.
                let found = unsafe {
                    bpf_fib_lookup(
                        self.context.cast(),
                        ptr::from_mut(query).cast(),
                        size_of::<FibLookup>() as i32,
                        0,
                    )
                };
                if found != 0 {
                    return NextHop::NONE;
                }
                // SAFETY: the helper writes these two in every answer: zero, or the
                // tag of the VLAN where it names the interface below it.
                let tag = unsafe { query.__bindgen_anon_5.__bindgen_anon_1 };
                let (protocol, control) = (tag.h_vlan_proto, tag.h_vlan_TCI);
                let tags = Tags::new(u16::from_be(protocol), u16::from_be(control));
                match self.slot(&Port::new(query.ifindex, tags.vlan())) {
                    Some(slot) => NextHop::new(mac(&query.dmac), slot as u16),
                    None => NextHop::NONE,
                }
            }
        }
    };
}

/// Copies a MAC address off the stack two bytes at a time: it lies there at an
/// even address, and the kernel refuses to read four bytes of its stack from one
/// that is not a multiple of four.
#[inline(always)]
fn mac(address: &[u8; 6]) -> [u8; 6] {
    let [a, b, c] = [0, 1, 2].map(|at| {
        let pair = ptr::from_ref(&address.as_chunks::<2>().0[at]);
        // SAFETY: a valid reference; volatile, so that the reads stay apart.
        unsafe { ptr::read_volatile(pair) }
    });
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}

/// Aligned like the stores that the compiler makes of two words at a time.
#[repr(align(8))]
struct Query(FibLookup);

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

family!(
    [u8; 4],
    v4,
    reply_v4,
    FRAGMENTS_V4,
    AF_INET,
    |query: &mut FibLookup, from: &[u8; 16], to: &[u8; 4]| {
        query.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(from.as_chunks().0[0]);
        query.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(*to);
    }
);
family!(
    [u8; 16],
    v6,
    reply_v6,
    FRAGMENTS_V6,
    AF_INET6,
    |query: &mut FibLookup, from: &[u8; 16], to: &[u8; 16]| {
        query.__bindgen_anon_3.ipv6_src = words(from);
        query.__bindgen_anon_4.ipv6_dst = words(to);
    }
);

#[inline(always)]
const fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let words = bytes.as_chunks().0;
    [
        u32::from_ne_bytes(words[0]),
        u32::from_ne_bytes(words[1]),
        u32::from_ne_bytes(words[2]),
        u32::from_ne_bytes(words[3]),
    ]
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
