//! Settings of the host's own stack that forwarding depends on: it takes the packets
//! to backends whose next hop is not known, and has source ports of its own.

use std::{fs, path::Path};

use bg_common::snat::{FIRST_PORT, PORTS};

/// A setting that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// What it is, and what follows from it.
    pub what: String,
    /// The command that mends it.
    pub mends: String,
}

/// The settings that keep the stack from forwarding packets of these families
/// that come in by these interfaces.
pub fn off(sysctls: &Path, interfaces: &[String], v4: bool, v6: bool) -> Vec<Setting> {
    let is_off = |path: String| {
        fs::read_to_string(sysctls.join(path)).is_ok_and(|value| value.trim() == "0")
    };
    let off = |what: String, mends: &str| Setting {
        what: format!(
            "{what} is 0: as long as a backend's next hop is not known, the host drops its packets"
        ),
        mends: format!("sysctl -w {mends}"),
    };
    let mut found: Vec<Setting> = interfaces
        .iter()
        .filter(|name| v4 && is_off(format!("net/ipv4/conf/{name}/forwarding")))
        .map(|name| {
            let what = format!("net.ipv4.conf.{name}.forwarding");
            off(what, "net.ipv4.ip_forward=1")
        })
        .collect();
    if v6 && is_off("net/ipv6/conf/all/forwarding".to_owned()) {
        let what = "net.ipv6.conf.all.forwarding";
        found.push(off(what.to_owned(), "net.ipv6.conf.all.forwarding=1"));
    }
    found
}

/// Whether the host takes ports that `snat` lends for its own connections.
pub fn own_ports(sysctls: &Path) -> Option<Setting> {
    let range = fs::read_to_string(sysctls.join("net/ipv4/ip_local_port_range")).ok()?;
    let first: u16 = range.split_whitespace().next()?.parse().ok()?;
    let is_lent = u32::from(first) < u32::from(FIRST_PORT) + PORTS;
    is_lent.then(|| Setting {
        what: format!(
            "net.ipv4.ip_local_port_range begins at {first}: replies to the host's own connections \
             to a backend may be taken for a client's, where snat has lent the same port"
        ),
        mends: "sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_families_in_use_count_and_ports_that_are_lent() {
        let root = std::env::temp_dir().join(format!("bgswitch-sysctl-{}", std::process::id()));
        let set = |path: &str, value: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        set("net/ipv4/conf/eth0/forwarding", "1\n");
        set("net/ipv4/conf/eth1/forwarding", "0\n");
        set("net/ipv6/conf/all/forwarding", "0\n");
        let interfaces = ["eth0".to_owned(), "eth1".to_owned()];
        let off = |v4, v6| off(&root, &interfaces, v4, v6);
        assert_eq!(off(true, false).len(), 1);
        assert!(
            off(true, false)[0]
                .what
                .starts_with("net.ipv4.conf.eth1.forwarding is 0")
        );
        assert!(
            off(false, true)[0]
                .mends
                .contains("net.ipv6.conf.all.forwarding=1")
        );
        for (range, found) in [("32768\t60999\n", false), ("1024\t65535\n", true)] {
            set("net/ipv4/ip_local_port_range", range);
            assert_eq!(own_ports(&root).is_some(), found);
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
