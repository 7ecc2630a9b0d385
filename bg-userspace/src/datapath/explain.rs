//! What the packet path would do with a packet: a second program of the same object,
//! over the same pinned tables, that changes nothing (`global::DRY_RUN`).

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions};
use bg_common::{
    abi::{global, map},
    monitor::{EVERY_REASON, Sighting, Watch, action},
    service::{Backend, Interface, NextHop},
};

use super::{
    Datapath, Error, Features, Loaded, attach,
    layout::address_of,
    made::{Made, destination, frame},
    netlink::{self, Requests},
    pins::Pins,
    slots::Slots,
    watch::Watcher,
};
use crate::plan::Protocol;

/// Bytes of the dry program's ring: it holds one sighting at a time.
const RING: u32 = 4096;

/// The program for dry runs, loaded when it is asked for first.
#[derive(Debug, Default)]
pub struct Explainer(Mutex<Option<Dry>>);

#[derive(Debug)]
struct Dry {
    loaded: Loaded,
    watcher: Watcher,
}

/// What would become of one packet.
#[derive(Clone, Debug)]
pub struct Fate {
    /// Of which.
    pub made: Made,
    /// The verdict, and the flow that it was of.
    pub sighting: Sighting,
    /// Where it would go, when it would be sent on.
    pub to: Option<Target>,
}

/// Where a packet would go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The backend.
    pub address: SocketAddr,
    /// Its next hop's MAC address, and the interface that leads there; `None` when it
    /// is not resolved.
    pub hop: Option<([u8; 6], Interface)>,
}

/// What would become of a client's packets.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The device that the packets were given to.
    pub device: u32,
    /// Of TCP a SYN and an acknowledgement, of UDP a datagram.
    pub fates: Vec<Fate>,
}

/// Layout of the kernel's `struct xdp_md`: data, its end, metadata, ingress interface,
/// queue, egress interface.
type Context = [u32; 6];

impl Dry {
    fn load(pins: &Pins) -> Result<Self, Error> {
        let mut loader = pins.loader();
        loader.map_max_entries(map::SIGHTINGS, RING);
        loader.override_global(global::DRY_RUN, &1u32, true);
        let mut loaded = Features::probe()?.load(&mut loader)?;
        let watcher = Watcher::take(&mut loaded.ebpf)?;
        watcher.set(&Watch {
            reasons: EVERY_REASON,
            ..Watch::default()
        });
        Ok(Self { loaded, watcher })
    }

    /// Runs a frame that came in by `ingress`: its sighting, and what it became.
    fn run(&mut self, frame: &[u8], ingress: u32) -> Result<(Sighting, Vec<u8>), Error> {
        let context: Context = [0, frame.len() as u32, 0, ingress, 0, 0];
        let context: Vec<u8> = context.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; frame.len() + 256];
        let result = self
            .loaded
            .program()?
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ctx_out: None,
                repeat: 1,
                attrs: TestRunAttrs::new(),
            })
            .map_err(|e| Error::bpf("a dry run (kernel 5.14 or newer is needed)", &e))?;
        out.truncate(result.data_size_out as usize);
        let mut last = None;
        self.watcher
            .drain(usize::MAX, |sighting| last = Some(sighting));
        let sighting =
            last.ok_or_else(|| Error::step("a dry run", "the packet path told nothing of it"))?;
        Ok((sighting, out))
    }
}

impl Datapath {
    /// What the packet path would do with packets of this client. Changes nothing.
    /// Blocks; the first time it takes a moment.
    pub fn explain(
        &self,
        protocol: Protocol,
        client: SocketAddr,
        listener: SocketAddr,
    ) -> Result<Explanation, Error> {
        let pins = &self.inner.pins;
        let slots = Slots::open(pins)?.held()?;
        let ingress = self.clients_interface(client, slots.values())?;
        let made = match protocol {
            Protocol::Tcp => &[Made::Syn, Made::Ack][..],
            Protocol::Udp => &[Made::Datagram],
        };
        let backends = self.inner.backends();
        let explainer = &self.explainer.0;
        let mut dry = explainer.lock().unwrap_or_else(PoisonError::into_inner);
        let dry = match &mut *dry {
            Some(dry) => dry,
            none => none.insert(Dry::load(pins)?),
        };
        let mut fates = Vec::new();
        for made in made {
            let frame = frame(*made, client, listener, ingress.mac);
            let (sighting, out) = dry.run(&frame, ingress.ifindex)?;
            let to = destination(&out).and_then(|(mac, address)| {
                let service = sighting.service;
                let own = |backend: &&Backend| u32::from(backend.service) == service;
                // Nothing but the MAC address tells where a packet goes that keeps its
                // destination.
                let kept = address == listener && sighting.action != action::PASS;
                let backend = if kept {
                    let by_mac = |b: &&Backend| NextHop(b.next_hop).mac() == mac;
                    Some(backends.values().filter(own).find(by_mac)?)
                } else {
                    backends.values().filter(own).find(|b| is_at(b, address))
                };
                if !kept && (address == listener || address.ip() == client.ip()) {
                    return None;
                }
                let hop = backend.map_or(NextHop::NONE, |backend| NextHop(backend.next_hop));
                let interface = hop.slot().and_then(|slot| slots.get(&u32::from(slot)));
                Some(Target {
                    address: match backend {
                        Some(backend) if kept => {
                            SocketAddr::new(address_of(backend), listener.port())
                        }
                        _ => address,
                    },
                    hop: interface.map(|interface| (hop.mac(), *interface)),
                })
            });
            fates.push(Fate {
                made: *made,
                sighting,
                to,
            });
        }
        Ok(Explanation {
            device: ingress.device,
            fates,
        })
    }

    /// The interface that the client's packets come in by: the one that leads to it, or
    /// the first one.
    fn clients_interface<'a>(
        &self,
        client: SocketAddr,
        mut slots: impl Iterator<Item = &'a Interface>,
    ) -> Result<Interface, Error> {
        let route = netlink::block_on(|| async {
            Ok(Requests::open()?.route(client.ip()).await.unwrap_or(None))
        })?;
        let device = route.map(|route| route.ifindex);
        if let Some(interface) = slots.find(|interface| Some(interface.device) == device) {
            return Ok(*interface);
        }
        let first = &self.interfaces.names()[0];
        let link = attach::link(first)?.ok_or_else(|| Error::NoInterface(first.clone()))?;
        attach::interface_of(first, &link)
    }
}

fn is_at(backend: &Backend, address: SocketAddr) -> bool {
    let port = u16::from_be_bytes(backend.port);
    address_of(backend) == address.ip() && (port == 0 || port == address.port())
}
