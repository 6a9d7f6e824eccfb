//! Network ports: the tables `[[net]]`, of guests and of uplinks.

use std::time::Duration;

use serde::Deserialize;

use crate::sys::tap::{TapPlace, TapSource};
use crate::sys::xdp::XdpPlace;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::validate::{
    QUEUES_DEFAULT, QUEUES_MAX, RawSocket, TextOrNumber, device_cores, ring_options, socket_config,
};
use super::values::{bounded, check_name, check_netns, parse_link, parse_mac};
use super::{EngineConfig, LinkConfig, Machine, NetConfig, UplinkConfig};
use super::{links, rates, switch, uplink, xdp};

/// What an interface receives on a queue that no guest serves is lost, so no more than are wanted.
const XDP_QUEUES_DEFAULT: u64 = 1;
/// VIRTIO 1.3 §5.1.4.1: the MTU is between 68 and 65535.
const MTU: (u64, u64) = (68, 65535);
/// What a receiver that is only late takes to post buffers.
const HOLD_US_DEFAULT: u64 = 100;
const HOLD_US_MAX: u64 = 50_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNet {
    name: Option<String>,
    socket: Option<String>,
    mode: Option<String>,
    link: Option<String>,
    host: Option<String>,
    queues: Option<u64>,
    mac: Option<String>,
    mtu: Option<u64>,
    link_follows: Option<String>,
    speed: Option<u64>,
    duplex: Option<String>,
    hold_us: Option<u64>,
    ingress_bits: Option<TextOrNumber>,
    ingress_frames: Option<TextOrNumber>,
    egress_bits: Option<TextOrNumber>,
    egress_frames: Option<TextOrNumber>,
    rate_burst: Option<TextOrNumber>,
    netns: Option<String>,
    persist: Option<bool>,
    busy_poll: Option<u64>,
    tx_csum: Option<String>,
    vlan: Option<TextOrNumber>,
    vlan_native: Option<u64>,
    isolated: Option<bool>,
    flood_limit: Option<u64>,
    allow_mac: Option<Vec<String>>,
    allow_ip: Option<Vec<String>>,
    stations: Option<Vec<String>>,
    cores: Option<Vec<u64>>,
    ring_reset: Option<bool>,
    memory_files: Option<bool>,
    call_max_used: Option<u64>,
    call_max_us: Option<u64>,
    socket_owner: Option<TextOrNumber>,
    socket_group: Option<TextOrNumber>,
    socket_mode: Option<String>,
}

/// A port with a front-end.
pub(super) fn net(
    table: &Table,
    machine: &Machine,
    engine: &EngineConfig,
) -> Result<NetConfig, ConfigError> {
    let raw: RawNet = table.deserialize()?;
    let (port, rates, keys) = (raw.switch_port(), raw.port_rates(), raw.xdp_keys());
    let name = raw.name.unwrap_or_else(|| table.name.clone());
    check_name(&name).map_err(|problem| table.key_error("name", problem))?;
    let socket = RawSocket {
        socket: raw.socket,
        owner: raw.socket_owner,
        group: raw.socket_group,
        permissions: raw.socket_mode,
        mode: raw.mode,
    };
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    // Without a key it must be the other end of a wire, which is seen when all are known.
    let link = match raw.link.as_deref() {
        Some(link) => parse_link(link).map_err(in_key("link"))?,
        None => LinkConfig::Wire(String::new()),
    };
    let mtu = raw.mtu.map(|mtu| bounded(mtu, MTU.0, MTU.1));
    let mtu = mtu.transpose().map_err(in_key("mtu"))?;
    let link = tap_keys(table, link, raw.netns, raw.persist)?;
    let link = xdp::with_keys(table, link, keys)?;
    let is_port = matches!(link, LinkConfig::Switch(_));
    let usual = match link {
        LinkConfig::Xdp(_) => XDP_QUEUES_DEFAULT,
        _ => QUEUES_DEFAULT,
    };
    let queues = bounded(raw.queues.unwrap_or(usual), 1, QUEUES_MAX);
    let queues = queues.map_err(in_key("queues"))?;
    let socket = socket_config(table, socket, machine)?;
    let told = links::RawLinkTold {
        follows: raw.link_follows,
        speed: raw.speed,
        duplex: raw.duplex,
    };
    Ok(NetConfig {
        name,
        told: links::told(table, told, &link, &socket)?,
        socket,
        queues: fd_queues(table, &link, queues)?,
        link,
        rules: switch::rules(table, port, mtu, is_port)?,
        hold: Duration::from_micros(u64::from(
            bounded(raw.hold_us.unwrap_or(HOLD_US_DEFAULT), 0, HOLD_US_MAX)
                .map_err(in_key("hold_us"))?,
        )),
        rates: rates::port_rates(table, rates)?,
        cores: device_cores(table, raw.cores.as_deref(), engine)?,
        mac: raw
            .mac
            .as_deref()
            .map(parse_mac)
            .transpose()
            .map_err(in_key("mac"))?,
        mtu,
        rings: ring_options(
            table,
            [raw.ring_reset, raw.memory_files],
            [raw.call_max_used, raw.call_max_us],
        )?,
    })
}

impl RawNet {
    fn xdp_keys(&self) -> xdp::RawXdp {
        xdp::RawXdp {
            busy_poll: self.busy_poll,
            tx_csum: self.tx_csum.clone(),
        }
    }

    fn switch_port(&self) -> switch::RawSwitchPort {
        switch::RawSwitchPort {
            vlan: text(&self.vlan),
            vlan_native: self.vlan_native,
            isolated: self.isolated,
            flood_limit: self.flood_limit,
            allow_mac: self.allow_mac.clone(),
            allow_ip: self.allow_ip.clone(),
            stations: self.stations.clone(),
        }
    }

    fn port_rates(&self) -> rates::RawPortRates {
        rates::RawPortRates {
            ingress_bits: text(&self.ingress_bits),
            ingress_frames: text(&self.ingress_frames),
            egress_bits: text(&self.egress_bits),
            egress_frames: text(&self.egress_frames),
            rate_burst: text(&self.rate_burst),
        }
    }
}

fn text(raw: &Option<TextOrNumber>) -> Option<String> {
    raw.as_ref().map(|TextOrNumber(text)| text.clone())
}

/// A port of a switch with an interface of the host behind it.
pub(super) fn uplink(table: &Table) -> Result<UplinkConfig, ConfigError> {
    let raw: RawNet = table.deserialize()?;
    let keys = raw.xdp_keys();
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    let name = raw.name.clone().unwrap_or_else(|| table.name.clone());
    check_name(&name).map_err(in_key("name"))?;
    let parse = |key: &'static str, text: Option<&str>| match text {
        Some(text) => parse_link(text).map_err(in_key(key)),
        None => Err(table.error(Problem::Missing(key))),
    };
    let link = parse("link", raw.link.as_deref())?;
    let host = parse("host", raw.host.as_deref())?;
    let switch = uplink::switch_of(table, &link, &host)?;
    let mtu = raw.mtu.map(|mtu| bounded(mtu, MTU.0, MTU.1));
    let mtu = mtu.transpose().map_err(in_key("mtu"))?;
    Ok(UplinkConfig {
        name,
        switch,
        rules: switch::rules(table, raw.switch_port(), mtu, true)?,
        rates: rates::port_rates(table, raw.port_rates())?,
        mtu,
        host: xdp::with_keys(table, tap_keys(table, host, raw.netns, raw.persist)?, keys)?,
    })
}

/// The keys of taps: where one is, and whether one that is made here stays.
fn tap_keys(
    table: &Table,
    link: LinkConfig,
    netns: Option<String>,
    persist: Option<bool>,
) -> Result<LinkConfig, ConfigError> {
    let mut link = in_netns(table, link, netns)?;
    match (&mut link, persist) {
        (_, None) => {}
        (LinkConfig::Tap(place), Some(persist)) if matches!(place.source, TapSource::Name(_)) => {
            place.persist = persist;
        }
        _ => {
            let problem = Problem::OnlyWith("link = \"tap:NAME\"");
            return Err(table.key_error("persist", problem));
        }
    }
    Ok(link)
}

/// A tap is in a namespace, if one is given.
fn in_netns(
    table: &Table,
    link: LinkConfig,
    netns: Option<String>,
) -> Result<LinkConfig, ConfigError> {
    let Some(netns) = netns else {
        return Ok(link);
    };
    let error = |problem| table.key_error("netns", problem);
    let netns = check_netns(netns).map_err(error)?;
    match link {
        LinkConfig::Tap(place) if !matches!(place.source, TapSource::Fds(_)) => {
            let netns = Some(netns);
            Ok(LinkConfig::Tap(TapPlace { netns, ..place }))
        }
        _ => Err(error(Problem::OnlyWith(
            "link = \"tap:NAME\" or \"macvtap:NAME\"",
        ))),
    }
}

/// Descriptors are one for each queue pair.
fn fd_queues(table: &Table, link: &LinkConfig, queues: u16) -> Result<u16, ConfigError> {
    let there = match link {
        LinkConfig::Tap(TapPlace {
            source: TapSource::Fds(fds),
            ..
        }) => fds.len(),
        LinkConfig::Xdp(XdpPlace {
            passed: Some(passed),
            ..
        }) => passed.sockets.len(),
        _ => return Ok(queues),
    };
    let count = u16::try_from(there).unwrap_or(u16::MAX);
    if count > u16::try_from(QUEUES_MAX).unwrap_or(u16::MAX) {
        let max = QUEUES_MAX;
        return Err(table.key_error("link", Problem::OutOfRange { min: 1, max }));
    }
    if table.entry("queues").is_some() && queues != count {
        return Err(table.key_error("queues", Problem::FdQueues(there)));
    }
    Ok(count)
}
