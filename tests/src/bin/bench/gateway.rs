//! Gateways of peers, as their experts would set them up.

use std::fs;

use anyhow::{Result, ensure};
use bg_tests::lab::{Lab, Place};

use crate::tools::{NFTABLES, Tool};

/// What costs nftables packets and buys nothing here: events nobody listens to, and
/// the checks of checksums and windows. Frames of the generator have no window.
const CONNTRACK: [&str; 4] = [
    "nf_conntrack_events=0",
    "nf_conntrack_checksum=0",
    "nf_conntrack_acct=0",
    "nf_conntrack_tcp_be_liberal=1",
];

/// Sets nftables up in the gateway.
pub fn nftables(lab: &Lab) -> Result<()> {
    let rules = lab.directory().join("nftables.nft");
    fs::write(&rules, NFTABLES)?;
    nft(lab, &["-f", &rules.to_string_lossy()])?;
    for setting in CONNTRACK {
        lab.sysctl(Place::Gateway, &format!("net.netfilter.{setting}"))?;
    }
    Ok(())
}

/// Runs `nft` in the gateway.
pub fn nft(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let tool = Tool::find("nft")?;
    let mut command = lab.command(Place::Gateway, tool.path())?;
    tool.prepare(&mut command);
    let output = command.args(arguments).output()?;
    ensure!(
        output.status.success(),
        "nft {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
