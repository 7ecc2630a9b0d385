//! Remembered flows, as the packet path has them.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use bg_common::{
    abi::map,
    flow::{Flow, FlowTable},
    key::{Endpoint, TCP},
    service::Listener,
};

use crate::{conversation::Conversation, flow_table::FlowTables, lab::Lab, world::key};

/// The established flow of a conversation.
pub fn flow_of(lab: &Lab, conversation: &Conversation) -> Result<Flow> {
    let service = conversation.peer()?;
    let port = service.port();
    let listener = match service {
        SocketAddr::V4(v4) => listener(lab, map::LISTENERS_V4, v4.ip().octets(), port)?,
        SocketAddr::V6(v6) => listener(lab, map::LISTENERS_V6, v6.ip().octets(), port)?,
    };
    let maps = lab.pinned_map(map::FLOWS);
    FlowTables::pinned(maps.parent().context("no directory of maps")?)?
        .get(
            FlowTable::Established,
            &key(conversation.local()?, listener.id),
        )
        .context("no such flow")
}

fn listener<A: Copy + 'static>(lab: &Lab, name: &str, address: A, port: u16) -> Result<Listener>
where
    Endpoint<A>: Pod,
{
    let listeners: HashMap<_, Endpoint<A>, Listener> =
        Map::HashMap(MapData::from_pin(lab.pinned_map(name))?).try_into()?;
    listeners
        .get(&Endpoint::new(address, port.to_be_bytes(), TCP), 0)
        .context("no such listener")
}
