//! The configured interfaces: whether XDP runs there, and what it would not see.

use super::Findings;
use crate::{
    config::Config,
    datapath::{
        AttachMode, Error, Features,
        inspect::{self, Seen},
    },
};

pub(super) fn look(findings: &mut Findings, config: &Config) {
    let gateway = &config.gateway;
    // Where that may not be asked, the release says it.
    let large_frames = Features::probe().map_or_else(
        |_| inspect::release() >= (6, 3),
        |features| features.large_frames,
    );
    for name in &gateway.interfaces {
        match inspect::interface(name) {
            Err(error) => findings.unseen(name, error.to_string()),
            Ok(None) => {
                let error = Error::NoInterface(name.clone());
                findings.trouble(name, error.to_string(), None);
            }
            Ok(Some(seen)) => {
                let before = findings.0.len();
                let interface = Interface {
                    name,
                    seen: &seen,
                    mode: gateway.xdp,
                    large_frames,
                    several: gateway.interfaces.len() > 1,
                };
                interface.look(findings);
                program(findings, config, name);
                if findings.0.len() == before {
                    let kind = seen.kind.as_deref().unwrap_or("a card");
                    let message = format!("{kind}, MTU {}: XDP runs here", seen.mtu);
                    findings.ok(name, message);
                }
            }
        }
    }
}

/// A program of somebody else, or in another mode.
fn program(findings: &mut Findings, config: &Config, name: &str) {
    let gateway = &config.gateway;
    match inspect::check_interface(&gateway.paths.bpffs, name, gateway.xdp) {
        Ok(()) => {}
        Err(error @ Error::NotPermitted { .. }) => {
            let message = format!("whose XDP program it has is not seen: {error}");
            findings.unseen(name, message);
        }
        Err(error) => {
            let is_foreign = matches!(error, Error::ForeignProgram { .. });
            let mends = is_foreign.then(|| format!("ip link set {name} xdp off"));
            findings.trouble(name, error.to_string(), mends);
        }
    }
}

struct Interface<'a> {
    name: &'a str,
    seen: &'a Seen,
    mode: AttachMode,
    /// The program takes frames in several buffers.
    large_frames: bool,
    /// There are other interfaces, to and from which packets go.
    several: bool,
}

impl Interface<'_> {
    fn look(&self, findings: &mut Findings) {
        let Self { name, seen, .. } = *self;
        if !seen.is_ethernet {
            let error = Error::NotEthernet(name.to_owned());
            findings.trouble(name, error.to_string(), None);
        }
        if !seen.running {
            let mends = Some(format!("ip link set {name} up"));
            findings.trouble(name, "it is down, or has no carrier", mends);
        }
        if let Some(bridge) = &seen.port_of {
            let message = format!(
                "it is a port of {bridge}: addresses and routes are {bridge}'s, so nothing is sent out \
                 here by XDP"
            );
            let mends = Some(format!("ip link set {name} nomaster"));
            findings.trouble(name, message, mends);
        }
        if self.mode == AttachMode::Native {
            self.native(findings);
        }
        self.offloads(findings);
    }

    fn native(&self, findings: &mut Findings) {
        let Self { name, seen, .. } = *self;
        let veth = seen.kind.as_deref() == Some("veth");
        let other_end = |what: &str| Some(format!("ethtool {what}   # at the other end"));
        let Some(features) = seen.features else {
            let message = "whether its driver has XDP is not told before kernel 6.3";
            findings.unseen(name, message);
            if !self.large_frames && !inspect::fits_one_page(seen.mtu) {
                self.too_large(findings);
            }
            return;
        };
        if !features.runs() {
            let (why, mends) = match seen.kind.as_deref() {
                Some("veth") => (
                    "its other end has more queues than it",
                    other_end("-L PEER tx 1"),
                ),
                Some("vlan") => (
                    "VLANs have none: name the interface below, which sees them too",
                    None,
                ),
                _ => (
                    "its driver has none. xdp = \"generic\" runs on any, slower",
                    None,
                ),
            };
            let message = format!("no native XDP: {why}");
            return findings.trouble(name, message, mends);
        }
        // Some drivers say so only while they have a program themselves.
        let is_told = veth || seen.has_program;
        if self.several && is_told && !features.takes_redirected() {
            let (why, mends) = if veth {
                (
                    "its other end has neither GRO nor an XDP program",
                    other_end("-K PEER gro on"),
                )
            } else {
                ("its driver takes none", None)
            };
            let message =
                format!("packets from other interfaces are lost on the way out here: {why}");
            findings.trouble(name, message, mends);
        }
        let takes_large = self.large_frames && features.takes_large_frames();
        if !takes_large && !inspect::fits_one_page(seen.mtu) {
            self.too_large(findings);
        }
    }

    fn too_large(&self, findings: &mut Findings) {
        let message = format!(
            "the MTU is {}: without XDP on frames in several buffers (kernel 6.3, and the driver's) it \
             must fit one page",
            self.seen.mtu
        );
        let mends = Some(format!("ip link set {} mtu 1500", self.name));
        findings.trouble(self.name, message, mends);
    }

    fn offloads(&self, findings: &mut Findings) {
        let name = self.name;
        let Some(offloads) = self.seen.offloads else {
            return;
        };
        if offloads.large_receive {
            let mends = Some(format!("ethtool -K {name} lro off"));
            match self.mode {
                AttachMode::Native => {
                    let message = "large receive offload is on: XDP does not run with it";
                    findings.trouble(name, message, mends);
                }
                // `generic_xdp_install` in net/core/dev.c.
                AttachMode::Generic => {
                    let message =
                        "large receive offload is on: the kernel turns it off for generic XDP";
                    findings.note(name, message, mends);
                }
            }
        }
        if offloads.receive_vlan && self.seen.has_vlans {
            let message = "VLAN tags are taken out of the frames, so XDP cannot see them: packets of the \
                           VLANs above it are taken for untagged ones";
            findings.trouble(name, message, Some(format!("ethtool -K {name} rxvlan off")));
        }
    }
}
