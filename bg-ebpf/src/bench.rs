//! What `cargo xtask bench` loads beside the packet path: a generator of frames,
//! and programs that do next to nothing, to compare with.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the entry's attribute macro makes an item of its own, and fixes the entry's shape"
)]

mod arrivals;
mod endpoints;

use core::ptr;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, xdp_action},
    btf_maps::{Array, DevMap, PerCpuArray},
    helpers::generated::{bpf_jiffies64, bpf_xdp_adjust_tail},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use bg_common::{
    abi::{Room, capacity},
    directory::Name,
    flow::{Bucket, FlowKey, FlowTable, TableShape, buckets_for},
    key::TCP,
    service::{Backend, Listener, NextHop},
};
use bg_ebpf::{
    checksum::Delta,
    flows::{BucketCell, Buckets, FlowCell, find},
    stream::{SHORT_WORDS, Stream, WORDS},
};

#[btf_map]
pub static STREAM: Array<Stream, 1> = Array::new();
#[btf_map]
pub static OUT: DevMap<1> = DevMap::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, 32> = PerCpuArray::new();

// The packet path's own, by their pins.
#[btf_map]
pub static BACKENDS: Array<
    Backend,
    { Room::LEAST.backends() as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();
#[btf_map]
pub static FLOWS: Array<
    Bucket,
    { buckets_for(capacity::FLOWS as u32) as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();
#[btf_map]
pub static SHAPES: Array<TableShape, { FlowTable::ALL.len() }> = Array::new();

/// The listener that the frames are for.
#[unsafe(no_mangle)]
static LISTENER: Global<u32> = Global::new(0);

/// For test runs with live frames: writes the stream's next frame and sends it
/// to the other end of the link.
#[xdp]
pub fn generate(context: XdpContext) -> u32 {
    emit(&context).map_or(xdp_action::XDP_ABORTED, |()| xdp_action::XDP_TX)
}

/// Drops everything.
#[xdp]
pub fn discard(_context: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// Sends everything out of one interface, as it is.
#[xdp]
pub fn redirect(_context: XdpContext) -> u32 {
    redirect_out()
}

#[inline(always)]
fn redirect_out() -> u32 {
    OUT.redirect(0, u64::from(xdp_action::XDP_DROP))
        .unwrap_or_else(|action| action)
}

/// Sends everything back, as it is.
#[xdp]
pub fn transmit(_context: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// What no translation of a known flow can leave out, IPv4 and TCP without options: whose
/// the destination is, the flow, its server, the header rewritten and its checksums, a
/// count, and the way out. What else a packet may be is not asked.
#[xdp]
pub fn least(context: XdpContext) -> u32 {
    translate(&context).unwrap_or(xdp_action::XDP_ABORTED)
}

#[inline(always)]
fn translate(context: &XdpContext) -> Option<u32> {
    let (old, old_port) = (read(context, 30)?, read(context, 36)?);
    let flow = flow_of(context, listener_of(context)?.id)?;
    let backend = BACKENDS.get(flow.backend.get())?;
    flow.seen.set(tick() as u32);
    let new = *backend.address.first_chunk()?;
    let life: [u8; 2] = read(context, 22)?;
    let shorter = [life[0] - 1, life[1]];
    let address = Delta::new().word32(old, new);
    write(context, 0, NextHop(backend.next_hop).mac())?;
    write(context, 22, shorter)?;
    check(context, 24, address.word(life, shorter))?;
    write(context, 30, new)?;
    write(context, 36, backend.port)?;
    check(context, 50, address.word(old_port, backend.port))?;
    count_in(0)?;
    Some(redirect_out())
}

/// One look-up among the listeners.
#[xdp]
pub fn find_listener(context: XdpContext) -> u32 {
    drop_if(|| Some(u64::from(listener_of(&context)?.idle)))
}

#[inline(always)]
fn listener_of(context: &XdpContext) -> Option<Listener> {
    let address = FlowKey::client_v4(read(context, 30)?);
    let name = Name::new(address, read(context, 36)?, TCP, 4);
    endpoints::whose(&name)?.listener()
}

/// One look-up in the table of established flows.
#[xdp]
pub fn find_flow(context: XdpContext) -> u32 {
    drop_if(|| {
        let flow = flow_of(&context, LISTENER.load() as u16)?;
        Some(u64::from(flow.seen.get()))
    })
}

#[inline(always)]
fn flow_of(context: &XdpContext, listener: u16) -> Option<&'static FlowCell> {
    let client = FlowKey::client_v4(read(context, 26)?);
    let key = FlowKey::new(client, read(context, 34)?, listener);
    let shape = SHAPES.get(0)?;
    let place = shape.place(key.hash(shape.seed));
    let spot = find(&Established, FlowTable::Established, &key, &place);
    let bucket = established(spot.bucket())?;
    Some(&spot.line(bucket, place.start).flow)
}

struct Established;

impl Buckets for Established {
    #[inline(always)]
    fn bucket(&self, _table: FlowTable, index: u32) -> Option<&BucketCell> {
        established(index)
    }
}

#[inline(always)]
fn established(index: u32) -> Option<&'static BucketCell> {
    let bucket = FLOWS.get_ptr(index)?;
    // SAFETY: an array's values live as long as the program; BucketCell has
    // Bucket's layout.
    Some(unsafe { &*bucket.cast::<BucketCell>() })
}

/// One look-up in an array.
#[xdp]
pub fn find_backend(context: XdpContext) -> u32 {
    drop_if(|| {
        let id = u16::from_ne_bytes(read(&context, 34)?) & 3;
        BACKENDS.get(u32::from(id)).map(|backend| backend.next_hop)
    })
}

/// One count in a per-CPU array.
#[xdp]
pub fn count(context: XdpContext) -> u32 {
    drop_if(|| {
        let index = u16::from_ne_bytes(read(&context, 34)?) & 31;
        count_in(u32::from(index)).map(|()| 1)
    })
}

#[inline(always)]
fn count_in(index: u32) -> Option<()> {
    let counter = COUNTERS.get_ptr_mut(index)?;
    // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
    unsafe { *counter += 1 };
    Some(())
}

/// One reading of the clock.
#[xdp]
pub fn clock(_context: XdpContext) -> u32 {
    drop_if(|| Some(tick()))
}

#[inline(always)]
fn tick() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_jiffies64() }
}

/// One call of a BPF function.
#[xdp]
pub fn call(context: XdpContext) -> u32 {
    drop_if(|| Some(callee(context.ingress_ifindex() as u64)))
}

#[inline(never)]
fn callee(word: u64) -> u64 {
    // SAFETY: a local; volatile, so that the function is not computed away.
    unsafe { ptr::read_volatile(&raw const word) }
}

/// Drops what `part` finds something for, so that its work is not idle.
#[inline(always)]
fn drop_if(part: impl FnOnce() -> Option<u64>) -> u32 {
    match part() {
        Some(u64::MAX) | None => xdp_action::XDP_ABORTED,
        Some(_) => xdp_action::XDP_DROP,
    }
}

#[inline(always)]
fn read<T: Copy>(context: &XdpContext, at: u32) -> Option<T> {
    let place = place::<T>(context, at)?;
    // SAFETY: `place` has checked that the bytes lie inside the frame.
    Some(unsafe { place.read_unaligned() })
}

/// Writes the whole header: the receiver has rewritten the frame's last use.
#[inline(always)]
fn emit(context: &XdpContext) -> Option<()> {
    let stream = STREAM.get_ptr_mut(0)?;
    // SAFETY: a valid map value; one generator runs on one CPU at a time.
    let stream = unsafe { &mut *stream };
    stretch(context, stream);
    let change = stream.advance();
    if stream.long == 0 {
        write(context, 0, *stream.template.first_chunk::<SHORT_WORDS>()?)?;
    } else {
        write::<[u64; WORDS]>(context, 0, stream.template)?;
    }
    write(context, stream.address_at, change.address)?;
    write(context, stream.port_at, change.port)?;
    if stream.ports != 0 {
        write(context, stream.other_at, change.other)?;
    }
    let numbered = stream.number_at != 0;
    if numbered {
        write(context, stream.number_at, change.number)?;
    }
    if stream.header_check_at != 0 {
        check(context, stream.header_check_at, change.header())?;
    }
    check(context, stream.check_at, change.transport(numbered))
}

/// Makes the frame as long as the template, if it is shorter.
#[inline(always)]
fn stretch(context: &XdpContext, stream: &Stream) {
    let words = if stream.long == 0 { SHORT_WORDS } else { WORDS };
    let length = context.data_end() - context.data();
    let missing = (words * 8).saturating_sub(length);
    if missing != 0 {
        // SAFETY: the context is the kernel's. Pointers into the frame are made afterwards.
        unsafe { bpf_xdp_adjust_tail(context.ctx, missing as i32) };
    }
}

/// Updates a checksum of the frame.
#[inline(always)]
fn check(context: &XdpContext, at: u32, delta: Delta) -> Option<()> {
    let place = place::<[u8; 2]>(context, at)?;
    // SAFETY: `place` has checked that the bytes lie inside the frame.
    unsafe { *place = delta.apply(*place) };
    Some(())
}

#[inline(always)]
fn write<T>(context: &XdpContext, at: u32, value: T) -> Option<()> {
    let place = place::<T>(context, at)?;
    // SAFETY: `place` has checked that the bytes lie inside the frame.
    unsafe { place.write_unaligned(value) };
    Some(())
}

/// The place of a `T` in the frame, at an offset below 128.
#[inline(always)]
fn place<T>(context: &XdpContext, at: u32) -> Option<*mut T> {
    let address = context.data() + (at & 0x7f) as usize;
    if address + size_of::<T>() > context.data_end() {
        return None;
    }
    Some(address as *mut T)
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
