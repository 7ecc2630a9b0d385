//! What comes in at the far end of a link: how much of it is what was meant to
//! come, and when.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::Array,
    helpers::generated::bpf_ktime_get_ns,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use bg_ebpf::stream::Arrivals;

use crate::read;

#[btf_map]
pub static ARRIVALS: Array<Arrivals, 1> = Array::new();
/// `CLOCK_MONOTONIC`, ns. Made as long as what is to be written down.
#[btf_map]
pub static TIMES: Array<u64, 1> = Array::new();

/// Counts a frame, and drops it.
#[xdp]
pub fn arrive(context: XdpContext) -> u32 {
    note(&context).map_or(xdp_action::XDP_ABORTED, |()| xdp_action::XDP_DROP)
}

#[inline(always)]
fn note(context: &XdpContext) -> Option<()> {
    let arrivals = ARRIVALS.get_ptr_mut(0)?;
    // SAFETY: a valid map value; one queue of one interface counts in it, on one
    // CPU at a time.
    let arrivals = unsafe { &mut *arrivals };
    let network: [u8; 3] = read(context, 30)?;
    let port: [u8; 2] = read(context, 36)?;
    if network != arrivals.network || port != arrivals.port {
        arrivals.others += 1;
        return Some(());
    }
    let number = arrivals.intended;
    arrivals.intended = number + 1;
    if arrivals.timed != 0
        && let Some(time) = TIMES.get_ptr_mut(number as u32)
    {
        // SAFETY: a valid map value; the helper takes nothing.
        unsafe { *time = bpf_ktime_get_ns() };
    }
    Some(())
}
