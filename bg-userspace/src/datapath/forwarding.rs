//! Settings of the host's own stack that forwarding depends on: it takes the packets
//! to backends whose next hop is not known, and has source ports of its own.

use std::{fs, path::Path};

use bg_common::snat::{FIRST_PORT, PORTS};

/// The settings that keep the stack from forwarding packets of these families
/// that come in by these interfaces; with the command that mends each.
pub fn off(sysctls: &Path, interfaces: &[String], v4: bool, v6: bool) -> Vec<String> {
    let is_off = |path: String| {
        fs::read_to_string(sysctls.join(path)).is_ok_and(|value| value.trim() == "0")
    };
    let mut off: Vec<String> = interfaces
        .iter()
        .filter(|name| v4 && is_off(format!("net/ipv4/conf/{name}/forwarding")))
        .map(|name| {
            format!("net.ipv4.conf.{name}.forwarding is 0 (`sysctl -w net.ipv4.ip_forward=1`)")
        })
        .collect();
    if v6 && is_off("net/ipv6/conf/all/forwarding".to_owned()) {
        off.push(
            "net.ipv6.conf.all.forwarding is 0 (`sysctl -w net.ipv6.conf.all.forwarding=1`)"
                .to_owned(),
        );
    }
    off
}

/// The first port that the host takes for its own connections, where that is one of
/// those that `snat` lends.
pub fn own_ports_from(sysctls: &Path) -> Option<u16> {
    let range = fs::read_to_string(sysctls.join("net/ipv4/ip_local_port_range")).ok()?;
    let first = range.split_whitespace().next()?.parse().ok()?;
    (u32::from(first) < u32::from(FIRST_PORT) + PORTS).then_some(first)
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
        assert!(off(true, false)[0].starts_with("net.ipv4.conf.eth1.forwarding"));
        assert!(off(false, true)[0].contains("net.ipv6.conf.all.forwarding=1"));
        for (range, found) in [("32768\t60999\n", None), ("1024\t65535\n", Some(1024))] {
            set("net/ipv4/ip_local_port_range", range);
            assert_eq!(own_ports_from(&root), found);
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
