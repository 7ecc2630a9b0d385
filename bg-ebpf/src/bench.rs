//! What `cargo xtask bench` loads beside the packet path: a generator of frames,
//! and programs that do as little as can be, to compare with.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the entry's attribute macro makes an item of its own, and fixes the entry's shape"
)]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, DevMap},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use bg_ebpf::{
    checksum::Delta,
    stream::{SHORT_WORDS, Stream, WORDS},
};

#[btf_map]
pub static STREAM: Array<Stream, 1> = Array::new();
#[btf_map]
pub static OUT: DevMap<1> = DevMap::new();

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

/// Writes the whole header: the receiver has rewritten the frame's last use.
#[inline(always)]
fn emit(context: &XdpContext) -> Option<()> {
    let stream = STREAM.get_ptr_mut(0)?;
    // SAFETY: a valid map value; one generator runs on one CPU at a time.
    let stream = unsafe { &mut *stream };
    let change = stream.advance();
    if stream.long == 0 {
        write(context, 0, *stream.template.first_chunk::<SHORT_WORDS>()?)?;
    } else {
        write::<[u64; WORDS]>(context, 0, stream.template)?;
    }
    write(context, stream.address_at, change.address)?;
    write(context, stream.port_at, change.port)?;
    let numbered = stream.number_at != 0;
    if numbered {
        write(context, stream.number_at, change.number)?;
    }
    if stream.header_check_at != 0 {
        check(context, stream.header_check_at, change.header())?;
    }
    check(context, stream.check_at, change.transport(numbered))
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
    (address + size_of::<T>() <= context.data_end()).then_some(address as *mut T)
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
