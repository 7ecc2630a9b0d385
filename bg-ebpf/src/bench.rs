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
    service::Backend,
};
use bg_ebpf::{
    checksum::Delta,
    flows::{BucketCell, Buckets, find},
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
    OUT.redirect(0, u64::from(xdp_action::XDP_DROP))
        .unwrap_or_else(|action| action)
}

/// Sends everything back, as it is.
#[xdp]
pub fn transmit(_context: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// One look-up among the listeners.
#[xdp]
pub fn find_listener(context: XdpContext) -> u32 {
    drop_if(|| {
        let address = FlowKey::client_v4(read(&context, 30)?);
        let name = Name::new(address, read(&context, 36)?, TCP, 4);
        let listener = endpoints::whose(&name)?.listener()?;
        Some(u64::from(listener.idle))
    })
}

/// One look-up in the table of established flows.
#[xdp]
pub fn find_flow(context: XdpContext) -> u32 {
    drop_if(|| {
        let key = FlowKey::new(
            FlowKey::client_v4(read(&context, 26)?),
            read(&context, 34)?,
            LISTENER.load() as u16,
        );
        let shape = SHAPES.get(0)?;
        let place = shape.place(key.hash(shape.seed));
        let spot = find(&Established, FlowTable::Established, &key, &place);
        let bucket = Established.bucket(FlowTable::Established, spot.bucket())?;
        Some(u64::from(spot.line(bucket, place.start).flow.seen.get()))
    })
}

struct Established;

impl Buckets for Established {
    #[inline(always)]
    fn bucket(&self, _table: FlowTable, index: u32) -> Option<&BucketCell> {
        let bucket = FLOWS.get_ptr(index)?;
        // SAFETY: an array's values live as long as the program; BucketCell has
        // Bucket's layout.
        Some(unsafe { &*bucket.cast::<BucketCell>() })
    }
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
        let counter = COUNTERS.get_ptr_mut(u32::from(index))?;
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
        unsafe { *counter += 1 };
        Some(1)
    })
}

/// One reading of the clock.
#[xdp]
pub fn clock(_context: XdpContext) -> u32 {
    // SAFETY: the helper takes nothing.
    drop_if(|| Some(unsafe { bpf_jiffies64() }))
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
