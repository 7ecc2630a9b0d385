//! Frames in several buffers (`xdp.frags`): MTUs that no page holds.

use bg_common::reason::Reason;
use bg_tests::{
    exchange::{DOWNLOAD, PORT, UPLOAD, measured, serve},
    frame::Frame,
    kernel::{Kernel, hold_large, in_new_namespace, tick},
    lab::{Lab, listener, listener_v6},
    world::{FROM_CLIENT, World, addr, at},
};

const MTU: u32 = 9000;
/// `XDP_PASS`.
const PASS: u32 = 2;

#[test]
fn a_frame_in_several_buffers_is_treated_as_one_in_a_single_one() {
    in_new_namespace(|| {
        let mut kernel = Kernel::load().unwrap();
        let (reasons, wrong) = hold_large(&mut kernel).unwrap();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        for reason in [
            Reason::Forwarded,
            Reason::ForwardedNew,
            Reason::Returned,
            Reason::ResetClient,
            Reason::SentTooBig,
            Reason::SentTimeExceeded,
        ] {
            assert!(reasons.contains_key(&reason), "no frame was {reason:?}");
        }
    });
}

#[test]
fn headers_that_do_not_lie_in_the_first_buffer_are_left_to_the_stack() {
    in_new_namespace(|| {
        let mut kernel = Kernel::load().unwrap();
        let mut world = World::new(kernel.ifindexes);
        world.tick = tick();
        kernel.set(&world).unwrap();
        let ingress = kernel.ifindexes[0];
        let frame = Frame::tcp(FROM_CLIENT, addr(at::CLIENT), addr(at::SERVICE), "S").bytes();
        let split = kernel.run_split(&frame, 14 + 20 + 8, ingress);
        let Ok(split) = split else {
            println!("skipped: this kernel's test runs split no short frame (6.18 does)");
            return;
        };
        assert_eq!(split, (PASS, Reason::Truncated, frame));
    });
}

#[test]
fn tcp_flows_both_ways_in_segments_that_no_page_holds() {
    let mut lab = Lab::new().unwrap();
    lab.resize(MTU).unwrap();
    lab.configure_default().unwrap();
    serve(&lab).unwrap();
    lab.start().unwrap();
    for to in [listener(PORT), listener_v6(PORT)] {
        for what in [UPLOAD, DOWNLOAD] {
            let (down, segment) = measured(&lab, to, what).unwrap();
            assert_eq!(down, what.down as usize, "{to}");
            assert!(segment > 8800, "{to}: {segment} bytes a segment");
        }
    }
    let reasons = &lab.status().unwrap()["reasons"];
    for stack in ["forwarded_by_stack", "truncated", "sent_too_big"] {
        assert_eq!(reasons[stack], 0, "{stack}");
    }
}
