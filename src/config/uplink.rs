//! Uplinks: ports of a switch with an interface of the host behind them, the key `host`.

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{LinkConfig, NetConfig, UplinkConfig};
use crate::host::switch::PORTS_MAX;

/// Keys that only a port with a front-end has.
const OF_GUESTS: [&str; 16] = [
    "socket",
    "mode",
    "queues",
    "mac",
    "hold_us",
    "cores",
    "ring_reset",
    "memory_files",
    "call_max_used",
    "call_max_us",
    "socket_owner",
    "socket_group",
    "socket_mode",
    "link_follows",
    "speed",
    "duplex",
];

/// Checks what `table` has beside `link` and `host`. Returns the name of the switch.
pub(super) fn switch_of(
    table: &Table,
    link: &LinkConfig,
    host: &LinkConfig,
) -> Result<String, ConfigError> {
    if let Some(key) = OF_GUESTS.iter().find(|key| table.entry(key).is_some()) {
        return Err(table.key_error(key, Problem::OnlyWith("a guest, a port without host")));
    }
    if !matches!(host, LinkConfig::Tap(_) | LinkConfig::Xdp(_)) {
        let kinds = "tap:NAME, tap:fd=N, macvtap:NAME or xdp:IFACE".to_owned();
        return Err(table.key_error("host", Problem::Expected(kinds)));
    }
    if let LinkConfig::Xdp(place) = host
        && place
            .passed
            .as_ref()
            .is_some_and(|passed| passed.sockets.len() != 1)
    {
        let one = "one socket, as an uplink has one queue".to_owned();
        return Err(table.key_error("host", Problem::Expected(one)));
    }
    match link {
        LinkConfig::Switch(name) => Ok(name.clone()),
        _ => Err(table.key_error("host", Problem::OnlyWith("link = \"switch:…\""))),
    }
}

/// A switch is served by the worker of its first guest: it must have one.
pub(super) fn check(
    tables: &[&Table],
    uplinks: &[UplinkConfig],
    nets: &[NetConfig],
) -> Result<(), ConfigError> {
    for (at, (table, uplink)) in tables.iter().zip(uplinks).enumerate() {
        let has = |net: &&NetConfig| net.link == LinkConfig::Switch(uplink.switch.clone());
        let guests = nets.iter().filter(has).count();
        if guests == 0 {
            return Err(table.key_error("link", Problem::NoGuestAtSwitch));
        }
        let same = |other: &&UplinkConfig| other.switch == uplink.switch;
        if guests + uplinks[..at].iter().filter(same).count() >= PORTS_MAX {
            return Err(table.key_error("link", Problem::TooManyPorts(PORTS_MAX)));
        }
    }
    Ok(())
}
