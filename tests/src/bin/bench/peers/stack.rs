//! A lab whose gateway is the kernel's stack.

use std::{net::SocketAddr, os::fd::OwnedFd};

use anyhow::Result;
use bg_ebpf::stream::Stream;
use bg_tests::{
    frame::{Frame, Macs},
    generator::{self, Client, Generator},
    lab::{Lab, Place, SERVERS, listener},
    pass,
};

use super::{Measured, PORT};
use crate::{arrivals::FarEnd, cases::CLIENTS, gateway, stand::know_neighbours};

/// The lab, the generator at its client, and the server's far end.
pub struct Stack {
    generator: Generator,
    far_end: FarEnd,
    /// Where clients send to.
    to: SocketAddr,
    cpu: usize,
    _receiver: OwnedFd,
    /// Last, so that it goes last.
    lab: Lab,
}

impl Stack {
    /// A gateway that forwards and changes nothing.
    pub fn forwarding() -> Result<Self> {
        Self::new(SocketAddr::new(SERVERS[0][0].parse()?, PORT))
    }

    /// A gateway with nftables.
    pub fn nftables() -> Result<Self> {
        let stack = Self::new(listener(PORT))?;
        gateway::nftables(&stack.lab)?;
        Ok(stack)
    }

    fn new(to: SocketAddr) -> Result<Self> {
        let mut lab = Lab::new()?;
        know_neighbours(&lab)?;
        lab.forward(Place::Gateway)?;
        lab.free_far_ends();
        // A veth takes frames from XDP only with GRO or an XDP program at its other
        // end. There is nothing to merge in 64-byte segments, so that a program that
        // passes everything costs less.
        let receiver = pass::attach(&lab.enter(Place::Gateway)?, "clients")?;
        lab.run(Place::Gateway, "ethtool -K clients gro off")?;
        let far_end = FarEnd::attach(&lab.enter(Place::Blue)?, "eth0", 0)?;
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self {
            generator: Generator::load()?,
            far_end,
            to,
            cpu: cpus - 1,
            _receiver: receiver,
            lab,
        })
    }

    /// Sets how many flows packets belong to, in turn.
    pub fn feed(&mut self, flows: u32) -> Result<()> {
        let stream = self.stream(flows)?;
        self.generator.set(&stream)
    }

    fn stream(&self, flows: u32) -> Result<Stream> {
        let macs = Macs {
            to: self.lab.mac(Place::Gateway, "clients")?,
            from: self.lab.mac(Place::Client, "eth0")?,
        };
        let anyone = SocketAddr::from(([0; 4], 0));
        let frame = Frame::tcp(macs, anyone, self.to, "A").padding(10);
        let frame = frame.numbers(1000, 0).bytes();
        generator::stream(&frame, Client::Source, flows, CLIENTS.to_bits())
    }

    /// What arrives of `frames` frames, after `before` others.
    pub fn rate(&mut self, before: u32, frames: u32) -> Result<Measured> {
        self.far_end.expect(SERVERS[0][0], PORT, false)?;
        let client = self.lab.enter(Place::Client)?;
        self.generator.run(&client, "eth0", before, self.cpu)?;
        self.far_end.expect(SERVERS[0][0], PORT, false)?;
        let took = self.generator.run(&client, "eth0", frames, self.cpu)?;
        Ok(Measured::new(self.far_end.arrived()?, frames, took))
    }
}
