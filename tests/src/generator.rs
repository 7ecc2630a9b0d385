//! Frames by the million, made in the kernel: a program that writes each afresh,
//! driven by test runs with live frames (`BPF_F_TEST_XDP_LIVE_FRAMES`, kernel
//! 5.18), which leave by the other end of a veth.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, Pod,
    maps::Array,
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use bg_common::key::TCP;
use bg_ebpf::stream::{SHORT_WORDS, Stream, WORDS};
use nix::net::if_::if_nametoindex;

use crate::kernel::{Context, in_namespace, pin};

/// Which end of the frame is the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// The client sends.
    Source,
    /// The client is sent to.
    Destination,
}

/// Frames of the kernel's batches, unless others are wanted: as many as a veth's ring
/// takes with ease.
pub const BATCH: u32 = 64;
const XDP_TX: u32 = 3;
const PROGRAM: &str = "generate";
const MAP: &str = "STREAM";

/// A stream of `flows` flows out of one frame, whose client has a port of 0, an
/// address that ends in four bytes of 0, and acknowledges 0. `first` is what the
/// first client's address ends in.
///
/// # Errors
/// When the frame is not 64 bytes, or 80, of plain TCP or UDP.
pub fn stream(frame: &[u8], client: Client, flows: u32, first: u32) -> Result<Stream> {
    ensure!(
        frame.len() == SHORT_WORDS * 8 || frame.len() == WORDS * 8,
        "a frame of {} bytes",
        frame.len()
    );
    let mut template = [0; WORDS];
    for (word, bytes) in template.iter_mut().zip(frame.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let v6 = frame[12..14] == [0x86, 0xdd];
    let (transport, protocol, source, destination) = if v6 {
        (54, frame[20], 34, 50)
    } else {
        (34, frame[23], 26, 30)
    };
    let tcp = protocol == TCP;
    let acknowledges = tcp && frame[transport + 13] & bg_ebpf::packet::tcp_flag::ACK != 0;
    let transport = transport as u32;
    let (address_at, port_at, other_at) = match client {
        Client::Source => (source, transport, transport + 2),
        Client::Destination => (destination, transport + 2, transport),
    };
    Ok(Stream {
        template,
        long: u32::from(frame.len() > SHORT_WORDS * 8),
        first,
        from: 0,
        flows,
        next: 0,
        sent: 0,
        address_at,
        port_at,
        number_at: if acknowledges { transport + 8 } else { 0 },
        header_check_at: if v6 { 0 } else { 24 },
        check_at: transport + if tcp { 16 } else { 6 },
        ports: 0,
        first_port: 0,
        other_at,
    })
}

/// The same stream with so many ports at the other end, which the frame has as 0, from
/// this one on.
pub const fn over_ports(stream: Stream, first: u16, count: u16) -> Stream {
    Stream {
        ports: count as u32,
        first_port: first as u32,
        ..stream
    }
}

/// The flows of a stream in two halves, for two generators.
pub const fn halves(stream: Stream) -> [Stream; 2] {
    let middle = stream.flows / 2;
    [
        Stream {
            flows: middle,
            ..stream
        },
        Stream {
            from: middle,
            next: middle,
            ..stream
        },
    ]
}

/// The program and its stream.
#[derive(Debug)]
pub struct Generator {
    ebpf: Ebpf,
    length: usize,
    /// So many bytes are added to each frame.
    grown: usize,
    batch: u32,
}

impl Generator {
    /// Loads the program.
    pub fn load() -> Result<Self> {
        let mut ebpf = Ebpf::load(bg_userspace::object::BENCH).context("loading the generator")?;
        let program: &mut Xdp = ebpf
            .program_mut(PROGRAM)
            .context("no generator in the object")?
            .try_into()?;
        program
            .load()
            .context("the verifier refused the generator")?;
        Ok(Self {
            ebpf,
            length: 0,
            grown: 0,
            batch: BATCH,
        })
    }

    /// Sets how many frames are made before the first of them leaves.
    pub const fn set_batch(&mut self, frames: u32) {
        self.batch = frames;
    }

    /// Sets whether receivers cut frames short, as those do that answer with a RST: the
    /// kernel would send what is left of them the next time. A frame that grows on its way
    /// out has its whole length again.
    pub const fn mend(&mut self, mend: bool) {
        self.grown = if mend { 8 } else { 0 };
    }

    /// Sets what is sent from here on.
    pub fn set(&mut self, stream: &Stream) -> Result<()> {
        let words = if stream.long == 0 { SHORT_WORDS } else { WORDS };
        self.length = words * 8;
        let map = self.ebpf.map_mut(MAP).context("no stream in the object")?;
        Ok(Array::<_, Entry>::try_from(map)?.set(0, Entry(*stream), 0)?)
    }

    /// Sends `frames` frames from an interface of a namespace to the other end
    /// of its link, all of it on one CPU. Returns what it took.
    pub fn run(
        &self,
        namespace: &File,
        interface: &str,
        frames: u32,
        cpu: usize,
    ) -> Result<Duration> {
        let program = self.program()?;
        let frame = vec![0; self.length - self.grown];
        in_namespace(namespace, || -> Result<Duration> {
            pin(cpu)?;
            let context = Context::new(frame.len(), if_nametoindex(interface)?);
            let begun = Instant::now();
            program.test_run(TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(context.bytes()),
                repeat: frames,
                attrs: TestRunAttrs::new().xdp_live_frames(self.batch),
                ..TestRunOptions::new()
            })?;
            Ok(begun.elapsed())
        })
        .with_context(|| format!("sending {frames} frames from {interface}"))
    }

    /// The next frame, which goes nowhere.
    pub fn frame(&self) -> Result<Vec<u8>> {
        let frame = vec![0; self.length];
        let mut out = vec![0; self.length];
        let result = self.program()?.test_run(TestRunOptions {
            data_in: Some(&frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })?;
        ensure!(
            result.return_value == XDP_TX,
            "the generator returned {}",
            result.return_value
        );
        Ok(out)
    }

    fn program(&self) -> Result<&Xdp> {
        let program = self.ebpf.program(PROGRAM);
        Ok(program.context("no generator in the object")?.try_into()?)
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Entry(Stream);

// SAFETY: repr(C), Copy, 'static, integers only: ten u64 and fourteen u32, so no
// padding.
unsafe impl Pod for Entry {}
