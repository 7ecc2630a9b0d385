//! Remembered flows, as the packet path has them.

use anyhow::{Context as _, Result};
use bg_common::{
    abi::map,
    flow::{Flow, FlowTable},
};
use bg_userspace::plan::{ListenerPlan, Protocol};

use crate::{conversation::Conversation, flow_table::FlowTables, lab::Lab, world::key};

/// The established flow of a conversation.
pub fn flow_of(lab: &Lab, conversation: &Conversation) -> Result<Flow> {
    let listener = lab.listener(ListenerPlan {
        address: conversation.peer()?,
        protocol: Protocol::Tcp,
    })?;
    let maps = lab.pinned_map(map::FLOWS);
    FlowTables::pinned(maps.parent().context("no directory of maps")?)?
        .get(
            FlowTable::Established,
            &key(conversation.local()?, listener.id),
        )
        .context("no such flow")
}
