//! Remembered flows, as the packet path has them.

use std::{hash::Hash, net::SocketAddr};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use bg_common::{
    abi::map,
    key::{Endpoint, FlowKey, TCP},
    service::{Flow, Listener},
};

use crate::{conversation::Conversation, lab::Lab};

/// The established flow of a conversation.
pub fn flow_of(lab: &Lab, conversation: &Conversation) -> Result<Flow> {
    let (client, service) = (conversation.local()?, conversation.peer()?);
    match (client, service) {
        (SocketAddr::V4(client), SocketAddr::V4(service)) => Tables {
            listeners: map::LISTENERS_V4,
            flows: map::FLOWS_V4,
        }
        .find(
            lab,
            (client.ip().octets(), client.port()),
            (service.ip().octets(), service.port()),
        ),
        (SocketAddr::V6(client), SocketAddr::V6(service)) => Tables {
            listeners: map::LISTENERS_V6,
            flows: map::FLOWS_V6,
        }
        .find(
            lab,
            (client.ip().octets(), client.port()),
            (service.ip().octets(), service.port()),
        ),
        _ => anyhow::bail!("{client} and {service} are of two families"),
    }
}

/// The names of the tables of one address family.
struct Tables {
    listeners: &'static str,
    flows: &'static str,
}

impl Tables {
    fn find<A: Copy + Eq + Hash>(
        &self,
        lab: &Lab,
        (client, port): (A, u16),
        (service, service_port): (A, u16),
    ) -> Result<Flow>
    where
        Endpoint<A>: Pod,
        FlowKey<A>: Pod,
    {
        let open = |name| MapData::from_pin(lab.pinned_map(name));
        let listeners: HashMap<_, Endpoint<A>, Listener> =
            Map::HashMap(open(self.listeners)?).try_into()?;
        let flows: HashMap<_, FlowKey<A>, Flow> = Map::HashMap(open(self.flows)?).try_into()?;
        let listener = Endpoint::new(service, service_port.to_be_bytes(), TCP);
        let listener = listeners.get(&listener, 0).context("no such listener")?;
        let key = FlowKey::new(client, port.to_be_bytes(), listener.id);
        flows.get(&key, 0).context("no such flow")
    }
}
