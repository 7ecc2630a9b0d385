use std::path::PathBuf;

use serde::Serialize;

use super::{Common, config_of};
use crate::{api::SCHEMA, datapath};

#[derive(Serialize)]
struct Detached {
    schema: u32,
    removed: Vec<PathBuf>,
}

pub(super) fn run(common: &Common) -> anyhow::Result<()> {
    let bpffs = config_of(&common.config)?.gateway.bpffs;
    let removed = datapath::detach(&bpffs)?;
    common.print(
        &Detached {
            schema: SCHEMA,
            removed,
        },
        |detached| match detached.removed.len() {
            0 => "nothing was attached\n".to_owned(),
            pins => format!("detached: {pins} pins removed, nothing is forwarded any more\n"),
        },
    )
}
