//! Stations that stay at their ports: one port of each VLAN, and room for all. The key `stations`.

use std::collections::HashMap;

use crate::host::switch::STATIONS_MAX;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{LinkConfig, NetConfig, PortRules, UplinkConfig};

/// A port of a switch.
#[derive(Clone, Copy)]
struct Port<'a> {
    table: &'a Table,
    switch: &'a str,
    name: &'a str,
    rules: &'a PortRules,
}

/// Checks the stations of all ports, those of guests and uplinks.
pub(super) fn check(
    [guests, hosts]: [&[&Table]; 2],
    nets: &[NetConfig],
    uplinks: &[UplinkConfig],
) -> Result<(), ConfigError> {
    let guest = |(&table, net)| {
        let net: &NetConfig = net;
        let LinkConfig::Switch(switch) = &net.link else {
            return None;
        };
        Some(Port {
            table,
            switch,
            name: &net.name,
            rules: &net.rules,
        })
    };
    let uplink = |(&table, uplink)| {
        let uplink: &UplinkConfig = uplink;
        Port {
            table,
            switch: &uplink.switch,
            name: &uplink.name,
            rules: &uplink.rules,
        }
    };
    let ports = guests.iter().zip(nets).filter_map(guest);
    let ports = ports.chain(hosts.iter().zip(uplinks).map(uplink));
    let mut taken: HashMap<(&str, [u8; 6]), Vec<Port<'_>>> = HashMap::new();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for port in ports.filter(|port| !port.rules.stations.is_empty()) {
        let refused = |problem| Err(port.table.key_error("stations", problem));
        let vlans = port.rules.vlans();
        let stations = port.rules.stations.len();
        let entries = counts.entry(port.switch).or_default();
        *entries += stations * vlans.len();
        if *entries > STATIONS_MAX {
            return refused(Problem::TooManyStations {
                stations,
                vlans: vlans.len(),
                entries: *entries,
                max: STATIONS_MAX,
            });
        }
        for &mac in &port.rules.stations {
            let there = taken.entry((port.switch, mac)).or_default();
            for other in there.iter().filter(|other| other.name != port.name) {
                let theirs = other.rules.vlans();
                if let Some(&vlan) = vlans.iter().find(|vlan| theirs.contains(vlan)) {
                    return refused(Problem::StationTaken {
                        mac: mac.map(|byte| format!("{byte:02x}")).join(":"),
                        port: other.name.to_owned(),
                        vlan,
                    });
                }
            }
            there.push(port);
        }
    }
    Ok(())
}
