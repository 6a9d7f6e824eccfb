//! What is chosen about the port of a switch: the keys `vlan`, `vlan_native`, `isolated`,
//! `flood_limit`, `allow_mac`, `allow_ip` and `stations`.

use std::net::IpAddr;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::values::{bounded, parse_mac};
use super::{Filter, NetConfig, PortRules, VLAN_MAX, VlanMode, VlanSet};

/// Ports of a switch at most.
const PORTS_MAX: usize = crate::host::switch::PORTS_MAX;

/// The keys as they were written.
#[derive(Debug, Default)]
pub(super) struct RawSwitchPort {
    pub(super) vlan: Option<String>,
    pub(super) vlan_native: Option<u64>,
    pub(super) isolated: Option<bool>,
    pub(super) flood_limit: Option<u64>,
    pub(super) allow_mac: Option<Vec<String>>,
    pub(super) allow_ip: Option<Vec<String>>,
    pub(super) stations: Option<Vec<String>>,
}

/// The names of the keys.
const KEYS: [&str; 7] = [
    "vlan",
    "vlan_native",
    "isolated",
    "flood_limit",
    "allow_mac",
    "allow_ip",
    "stations",
];

/// Checks the keys. `is_port` says whether the device is a port of a switch at all.
pub(super) fn rules(
    table: &Table,
    raw: RawSwitchPort,
    mtu: Option<u16>,
    is_port: bool,
) -> Result<PortRules, ConfigError> {
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    if !is_port {
        return match KEYS.iter().find(|key| table.entry(key).is_some()) {
            Some(key) => Err(in_key(key)(Problem::OnlyWith("link = \"switch:…\""))),
            None => Ok(PortRules::default()),
        };
    }
    let vlan = raw.vlan.as_deref().map(parse_vlan).transpose();
    let vlan = vlan.map_err(in_key("vlan"))?.unwrap_or_default();
    let macs = |list: Option<Vec<String>>| {
        let list = list.unwrap_or_default();
        list.iter()
            .map(|mac| parse_mac(mac))
            .collect::<Result<Vec<_>, _>>()
    };
    let ip = |text: &String| {
        let wrong = || Problem::Expected("addresses such as 10.0.0.7 or fd00::7".to_owned());
        text.parse::<IpAddr>().map_err(|_| wrong())
    };
    let ips = raw.allow_ip.unwrap_or_default();
    let limit = raw.flood_limit.map(|limit| match u32::try_from(limit) {
        Ok(limit) => Ok(limit),
        Err(_) => Err(Problem::OutOfRange {
            min: 0,
            max: u32::MAX.into(),
        }),
    });
    Ok(PortRules {
        vlan: native(vlan, raw.vlan_native).map_err(in_key("vlan_native"))?,
        isolated: raw.isolated.unwrap_or(false),
        flood_limit: limit.transpose().map_err(in_key("flood_limit"))?,
        mtu,
        filter: Filter {
            mac: macs(raw.allow_mac).map_err(in_key("allow_mac"))?,
            ip: ips
                .iter()
                .map(ip)
                .collect::<Result<_, _>>()
                .map_err(in_key("allow_ip"))?,
        },
        stations: macs(raw.stations).map_err(in_key("stations"))?,
    })
}

/// `10`, or `trunk:1-100+200`.
fn parse_vlan(text: &str) -> Result<VlanMode, Problem> {
    let wrong = || Problem::Expected("a VLAN such as 10, or trunk:10+20-30".to_owned());
    let number = |text: &str| {
        let number = text.parse::<u64>().map_err(|_| wrong())?;
        bounded(number, 1, VLAN_MAX.into())
    };
    let Some(list) = text.strip_prefix("trunk:") else {
        return number(text).map(VlanMode::Access);
    };
    let mut allowed = VlanSet::new();
    for part in list.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        (first..=last).for_each(|vlan| allowed.insert(vlan));
    }
    Ok(VlanMode::Trunk {
        allowed,
        native: None,
    })
}

fn native(mode: VlanMode, vlan: Option<u64>) -> Result<VlanMode, Problem> {
    match (mode, vlan) {
        (mode, None) => Ok(mode),
        (VlanMode::Access(_), Some(_)) => Err(Problem::OnlyWith("vlan = \"trunk:…\"")),
        (VlanMode::Trunk { allowed, .. }, Some(vlan)) => Ok(VlanMode::Trunk {
            allowed,
            native: Some(bounded(vlan, 1, VLAN_MAX.into())?),
        }),
    }
}

/// All ports of a switch are served by one worker, and there are only so many.
pub(super) fn check(tables: &[&Table], nets: &[NetConfig]) -> Result<(), ConfigError> {
    use super::LinkConfig::Switch;
    for (at, net) in nets.iter().enumerate() {
        let Switch(name) = &net.link else { continue };
        let same = |other: &&NetConfig| other.link == Switch(name.clone());
        let earlier = || nets[..at].iter().filter(same);
        if earlier().count() >= PORTS_MAX {
            return Err(tables[at].key_error("link", Problem::TooManyPorts(PORTS_MAX)));
        }
        if let Some(first) = earlier().next()
            && first.cores != net.cores
        {
            let problem = Problem::OtherCores(first.name.clone());
            return Err(tables[at].key_error("cores", problem));
        }
    }
    Ok(())
}
