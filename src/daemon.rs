//! The daemon: builds everything from the settings, waits for signals, and shuts down in order.
//!
//! Whatever can fail is done before the first thread serves anything: sockets, files and taps are
//! opened first, and an error there leaves nothing behind.

use std::io::{self, Write};
use std::iter;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{
    BlkBackend, BlkConfig, CallsConfig, Config, ConfigError, IdlePolicy, LinkConfig, NetConfig,
    Placement, PortRates, RingsConfig, SickConfig, UplinkConfig,
};
use crate::control::session::{self, FrontEnds, Link, Served, Surroundings};
use crate::device::blk::{BlkModel, BlkSetup, BlkTopology, RangeLimits, SickPolicy};
use crate::device::net::{NetCounters, NetModel, NetOptions, Offloads};
use crate::device::{CallLimits, DeviceKind, DeviceModel, RingOptions};
use crate::engine::{
    self, Backing, DeviceHandle, Engine, EngineOptions, Host, LinkSpec, Member, Parts, Uplink,
};
use crate::host::limit::{DiskLimits, LimitSet, PortLimits};
use crate::logging;
use crate::memory::Store;
use crate::sys::disk::DiskError;
use crate::sys::key::KeyError;
use crate::sys::link::{LinkError, LinkWatch};
use crate::sys::listen::ListenError;
use crate::sys::privileges;
use crate::sys::signals::{Signal, Signals};
use crate::sys::systemd;
use crate::sys::tap::{Tap, TapError, TapPlace, TapSource};
use crate::sys::xdp::{Xdp, XdpError, XdpPlace};

mod cores;
mod disks;
mod doors;
mod faults;
mod limits;
mod links;
mod sizes;

/// Why the daemon did not start. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A socket can't listen.
    #[error("{kind} {name}")]
    Socket {
        /// Which kind of device.
        kind: DeviceKind,
        /// Its name.
        name: String,
        /// What is wrong.
        source: ListenError,
    },
    /// A disk can't be opened.
    #[error("blk {name}")]
    Disk {
        /// The disk's name.
        name: String,
        /// What is wrong.
        source: DiskError,
    },
    /// The key of a disk can't be had.
    #[error("blk {name}")]
    Key {
        /// The disk's name.
        name: String,
        /// What is wrong.
        source: KeyError,
    },
    /// A disk in memory is too large.
    #[error("blk {name}: backend = \"ram:{bytes}\"")]
    Ram {
        /// The disk's name.
        name: String,
        /// Its size.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// An interface can't be used.
    #[error("net {name}: link = \"{place}\"")]
    Xdp {
        /// The device.
        name: String,
        /// The interface.
        place: Box<XdpPlace>,
        /// Why.
        source: XdpError,
    },
    /// A tap can't be opened.
    #[error("net {name}: link = \"{tap}\"")]
    Tap {
        /// The port's name.
        name: String,
        /// The tap.
        tap: TapSource,
        /// What is wrong.
        source: TapError,
    },
    /// The link of a port can't be followed.
    #[error("net {name}: link_follows")]
    Link {
        /// The port's name.
        name: String,
        /// What is wrong.
        source: LinkError,
    },
    /// The threads can't start.
    #[error("{what}")]
    Start {
        /// What was being started.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Everything of one device, while the daemon runs.
struct Device {
    parts: Parts,
    model: Arc<dyn DeviceModel>,
    handle: Arc<DeviceHandle>,
    thread: Option<JoinHandle<bool>>,
}

/// Reads the settings again.
pub type Reload<'a> = &'a dyn Fn() -> Result<Config, ConfigError>;

/// What runs.
struct Running {
    devices: Vec<Device>,
    /// With their names.
    uplinks: Vec<(String, Uplink)>,
    /// Of the disks, in the order of the settings.
    sizes: Vec<sizes::Size>,
    /// Limits that disks share, as the settings list them.
    groups: Arc<[LimitSet]>,
    engine: Engine,
}

/// Serves what `config` says until SIGTERM or SIGINT. `true`: everything was drained and closed. At
/// SIGHUP, what can be changed while devices are in use is taken from `reload`.
///
/// # Errors
/// [`DaemonError`] when something could not be started; nothing was served then.
pub fn run(config: Config, reload: Reload<'_>) -> Result<bool, DaemonError> {
    let start = |what: &str| {
        let what = what.to_owned();
        move |source| DaemonError::Start { what, source }
    };
    // Before any other thread: they all inherit the blocked signals.
    let signals = Signals::block().map_err(start("signals"))?;
    logging::start_writer().map_err(start("log thread"))?;
    privileges::raise_open_files().map_err(start("RLIMIT_NOFILE"))?;
    let mut doors = Vec::new();
    let mut parts = Vec::new();
    let mut watches = Vec::new();
    for net in &config.nets {
        doors.push(open(DeviceKind::Net, &net.name, &net.socket)?);
        let (net_parts, watch) = net_parts(net, &config.nets)?;
        watches.push(watch);
        parts.push(Member {
            parts: net_parts,
            cores: net.cores.clone(),
        });
    }
    let groups = limits::groups(&config);
    for (number, blk) in config.blks.iter().enumerate() {
        doors.push(open(DeviceKind::Blk, &blk.name, &blk.socket)?);
        parts.push(Member {
            parts: blk_parts(blk, limits::disk(number, blk, &config, &groups))?,
            cores: blk.cores.clone(),
        });
    }
    let uplinks = uplinks(&config)?;
    let links = links::join(&config.nets, watches).map_err(start("links"))?;
    let options = EngineOptions {
        cores: config.engine.cores.clone(),
        idle: idle_policy(config.engine.idle),
        stop_timeout: config.engine.stop_timeout,
        uplinks: uplinks.iter().map(|(_, uplink)| uplink.clone()).collect(),
        ageing: links::ageing(&config),
        placement: match config.engine.placement {
            Placement::Spread => engine::Placement::Spread,
            Placement::Auto => engine::Placement::Auto,
        },
        ..EngineOptions::default()
    };
    let (engine, handles) = Engine::start(&options, parts.clone())
        .map_err(start(&format!("workers on cores {:?}", options.cores)))?;
    let exit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(start("eventfd"))?;
    let mut devices = Vec::new();
    let links = links.into_iter().chain(iter::repeat_with(Link::default));
    let mut sizes = Vec::new();
    for (((parts, handle), door), link) in parts.into_iter().zip(handles).zip(doors).zip(links) {
        let (size, medium) = sizes::watch(&parts.parts, &handle)
            .map_err(start("size of a disk"))?
            .unzip();
        sizes.extend(size);
        let around = Surroundings { link, medium };
        let device =
            serve(&parts.parts, handle, door, around, &exit).map_err(start("session thread"))?;
        devices.push(device);
    }
    announce(&config);
    let running = Running {
        devices,
        uplinks,
        sizes,
        groups,
        engine,
    };
    wait(&signals, &running, config, reload);
    Ok(shut_down(running, &exit))
}

fn open(
    kind: DeviceKind,
    name: &str,
    socket: &crate::config::SocketConfig,
) -> Result<Box<dyn FrontEnds>, DaemonError> {
    doors::open(socket).map_err(|source| DaemonError::Socket {
        kind,
        name: name.to_owned(),
        source,
    })
}

/// What stands behind the port `net`, one of `nets`, which are the engine's first devices.
fn net_parts(
    net: &NetConfig,
    nets: &[NetConfig],
) -> Result<(Parts, Option<LinkWatch>), DaemonError> {
    let (link, queues) = match &net.link {
        LinkConfig::Echo => (LinkSpec::Echo, net.queues),
        LinkConfig::Sink => (LinkSpec::Sink, net.queues),
        LinkConfig::Wire(peer) => {
            let peer = nets.iter().position(|other| other.name == *peer);
            let wire = LinkSpec::Wire {
                peer: peer.unwrap_or_default(),
                hold: net.hold,
            };
            (wire, net.queues)
        }
        LinkConfig::Switch(name) => {
            // A switch has the number of its first port.
            let same = |other: &NetConfig| other.link == LinkConfig::Switch(name.clone());
            let port = LinkSpec::Switch {
                switch: nets.iter().position(same).unwrap_or_default(),
                rules: Box::new(net.rules.clone()),
            };
            (port, net.queues)
        }
        LinkConfig::Tap(tap) => {
            let tap = open_tap(&net.name, tap, net.queues, net.mtu)?;
            (LinkSpec::Tap(tap), net.queues)
        }
        LinkConfig::Xdp(place) => {
            let xdp = open_xdp(&net.name, place, net.queues, net.mtu)?;
            (LinkSpec::Xdp(xdp), net.queues)
        }
    };
    let watch = links::watch(net)?;
    let model = NetModel::new(NetOptions {
        name: net.name.clone(),
        queue_pairs: queues,
        mac: net.mac,
        mtu: net.mtu,
        offloads: offloads(&link),
        link: links::info(net, watch.is_some()),
        rings: ring_options(net.rings),
    });
    limit(model.limits(), net.rates);
    Ok((Parts::Net(Arc::new(model), link), watch))
}

fn open_tap(
    name: &str,
    tap: &TapPlace,
    queues: u16,
    mtu: Option<u16>,
) -> Result<Arc<Tap>, DaemonError> {
    let named = |source| DaemonError::Tap {
        name: name.to_owned(),
        tap: tap.source.clone(),
        source,
    };
    Ok(Arc::new(Tap::open_at(tap, queues, mtu).map_err(named)?))
}

fn open_xdp(
    name: &str,
    place: &XdpPlace,
    queues: u16,
    mtu: Option<u16>,
) -> Result<Arc<Xdp>, DaemonError> {
    let named = |source| DaemonError::Xdp {
        name: name.to_owned(),
        place: Box::new(place.clone()),
        source,
    };
    Ok(Arc::new(Xdp::open_at(place, queues, mtu).map_err(named)?))
}

/// The uplinks of all switches, with their names.
fn uplinks(config: &Config) -> Result<Vec<(String, Uplink)>, DaemonError> {
    let open = |uplink: &UplinkConfig| {
        let host = match &uplink.host {
            LinkConfig::Xdp(place) => Host::Xdp(open_xdp(&uplink.name, place, 1, uplink.mtu)?),
            LinkConfig::Tap(tap) => Host::Tap(open_tap(&uplink.name, tap, 1, uplink.mtu)?),
            // Nothing else comes through the checks.
            _ => return Ok(None),
        };
        let link = LinkConfig::Switch(uplink.switch.clone());
        let limits = PortLimits::default();
        limit(&limits, uplink.rates);
        let made = Uplink {
            switch: config
                .nets
                .iter()
                .position(|net| net.link == link)
                .unwrap_or_default(),
            rules: uplink.rules.clone(),
            host,
            counters: Arc::new(NetCounters::new(1)),
            limits: Arc::new(limits),
        };
        Ok(Some((uplink.name.clone(), made)))
    };
    let opened: Result<Vec<_>, _> = config.uplinks.iter().map(open).collect();
    Ok(opened?.into_iter().flatten().collect())
}

fn limit(limits: &PortLimits, rates: PortRates) {
    limits.ingress.set(rates.ingress);
    limits.egress.set(rates.egress);
}

/// What a port offers: all, because what a receiver does not take is done for it; on a tap what the
/// kernel does.
fn offloads(link: &LinkSpec) -> Offloads {
    match link {
        LinkSpec::Tap(tap) => Offloads {
            uso: tap.supports_uso(),
            ..Offloads::CSUM_TSO
        },
        _ => Offloads::ALL,
    }
}

fn ring_options(rings: RingsConfig) -> RingOptions {
    let limits = |calls: CallsConfig| CallLimits {
        used: calls.max_used.into(),
        wait: calls.max_wait,
    };
    RingOptions {
        ring_reset: rings.ring_reset,
        memory_files: rings.memory_files,
        calls: rings.calls.map(limits),
    }
}

fn blk_parts(blk: &BlkConfig, limits: Arc<DiskLimits>) -> Result<Parts, DaemonError> {
    let mut topology = BlkTopology::default();
    let (backing, capacity_bytes, mut ranges) = match &blk.backend {
        BlkBackend::Path(path) => {
            let opened = disks::open(blk, path)?;
            topology = opened.topology;
            (opened.backing, opened.bytes, opened.ranges)
        }
        &BlkBackend::Ram(bytes) => {
            let store = Store::growable(bytes).map_err(|source| DaemonError::Ram {
                name: blk.name.clone(),
                bytes,
                source,
            })?;
            (Backing::Ram(Arc::new(store)), bytes, RangeLimits::RAM)
        }
        &BlkBackend::Null(bytes) => (Backing::Null, bytes, RangeLimits::NULL),
    };
    ranges.discard = blk.discard;
    let model = BlkModel::new(BlkSetup {
        name: blk.name.clone(),
        capacity_bytes,
        block_size: blk.block_size,
        queues: blk.queues,
        read_only: blk.read_only,
        write_through: blk.write_through,
        topology,
        ranges,
        serial: blk.serial.clone(),
        sick: sick_policy(blk.sick),
        rings: ring_options(blk.rings),
        limits,
        faults: faults::of(blk),
    });
    Ok(Parts::Blk(Arc::new(model), backing))
}

fn sick_policy(sick: SickConfig) -> SickPolicy {
    SickPolicy {
        hold: sick.hold,
        io_timeout: sick.io_timeout,
    }
}

fn idle_policy(policy: IdlePolicy) -> engine::IdlePolicy {
    match policy {
        IdlePolicy::Spin => engine::IdlePolicy::Spin,
        IdlePolicy::Adaptive => engine::IdlePolicy::Adaptive,
        IdlePolicy::Interrupt => engine::IdlePolicy::Interrupt,
    }
}

/// Starts the session thread of one device.
fn serve(
    parts: &Parts,
    handle: Arc<DeviceHandle>,
    front_ends: Box<dyn FrontEnds>,
    around: Surroundings,
    exit: &EventFd,
) -> io::Result<Device> {
    let model: Arc<dyn DeviceModel> = match parts {
        Parts::Net(model, _) => Arc::clone(model) as Arc<dyn DeviceModel>,
        Parts::Blk(model, _) => Arc::clone(model) as Arc<dyn DeviceModel>,
    };
    let runner = Arc::clone(&handle);
    let served = Served {
        device: Arc::clone(&model),
        runner,
    };
    let thread = session::spawn(served, front_ends, around, exit.try_clone()?)?;
    Ok(Device {
        parts: parts.clone(),
        model,
        handle,
        thread: Some(thread),
    })
}

/// One line per socket, `ready`, and the word to systemd. A closed stdout is no reason to stop.
fn announce(config: &Config) {
    let mut out = io::stdout().lock();
    for net in &config.nets {
        let _ = writeln!(
            out,
            "{}",
            front_end_line(DeviceKind::Net, &net.name, &net.socket)
        );
    }
    for blk in &config.blks {
        let _ = writeln!(
            out,
            "{}",
            front_end_line(DeviceKind::Blk, &blk.name, &blk.socket)
        );
    }
    let _ = writeln!(out, "ready");
    let _ = out.flush();
    if let Err(error) = systemd::notify("READY=1") {
        tracing::warn!("systemd was not told that we are ready: {error}");
    }
}

fn front_end_line(kind: DeviceKind, name: &str, socket: &crate::config::SocketConfig) -> String {
    let how = if socket.client {
        "connecting"
    } else {
        "listening"
    };
    let preposition = if socket.client { "to" } else { "on" };
    format!("{how}: {kind} {name} {preposition} {}", socket.source)
}

/// Waits for the signal that ends the daemon; SIGUSR1 logs the counters, SIGHUP reads the settings
/// again.
fn wait(signals: &Signals, running: &Running, mut config: Config, reload: Reload<'_>) {
    loop {
        match signals.wait() {
            Ok(Signal::Terminate | Signal::Interrupt) => return,
            Ok(Signal::User1) => log_counters(running),
            Ok(Signal::Hangup) => match reload() {
                Ok(new) => change(running, &mut config, new),
                Err(error) => tracing::error!("the settings stay as they are: {error}"),
            },
            Err(error) => {
                tracing::error!("signals can't be waited for: {error}");
                return;
            }
        }
    }
}

/// Takes over from `new` what can be changed while devices are in use, and says what can't.
fn change(running: &Running, config: &mut Config, new: Config) {
    for net in &mut config.nets {
        let kind = DeviceKind::Net;
        let same = new.nets.iter().find(|other| other.name == net.name);
        let mut of_name = running.devices.iter().map(|device| &device.parts);
        let model = of_name.find_map(|parts| match parts {
            Parts::Net(model, _) if model.name() == net.name => Some(model),
            _ => None,
        });
        let (Some(same), Some(model)) = (same, model) else {
            tracing::warn!(
                "{kind} {}: gone from the settings, it stays until a restart",
                net.name
            );
            continue;
        };
        if same.rates != net.rates {
            net.rates = same.rates;
            limit(model.limits(), net.rates);
            let rates = limits::of_port(&net.rates);
            tracing::info!("{kind} {}: other rates: {rates}", net.name);
        }
        if same != net {
            tracing::warn!("{kind} {}: what else has changed takes a restart", net.name);
        }
    }
    let known = |name: &String| config.nets.iter().any(|net| net.name == *name);
    for net in new.nets.iter().filter(|net| !known(&net.name)) {
        tracing::warn!("{} {}: new ports take a restart", DeviceKind::Net, net.name);
    }
    for (uplink, (name, port)) in config.uplinks.iter_mut().zip(&running.uplinks) {
        if let Some(same) = new.uplinks.iter().find(|other| other.name == *name)
            && same.rates != uplink.rates
        {
            uplink.rates = same.rates;
            limit(&port.limits, uplink.rates);
            let rates = limits::of_port(&uplink.rates);
            tracing::info!("{} {name}: other rates: {rates}", DeviceKind::Net);
        }
    }
    if new.uplinks != config.uplinks {
        tracing::warn!("what else has changed of uplinks takes a restart");
    }
    if new.switches != config.switches {
        tracing::warn!("what has changed of switches takes a restart");
    }
    cores::change(running, config, &new);
    sizes::change(&running.sizes, &mut config.blks, &new.blks);
    limits::change(running, config, &new);
    faults::change(running, config, &new);
    if new.blks != config.blks || new.engine != config.engine {
        tracing::warn!("what has changed of disks or of the engine takes a restart");
    }
}

fn log_counters(running: &Running) {
    fn join<N: std::fmt::Display>(counters: Vec<(N, u64)>) -> String {
        let pairs: Vec<_> = counters
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        pairs.join(" ")
    }
    for device in &running.devices {
        for queue in device.model.queue_counters() {
            tracing::info!("xstats device={} {}", device.model.name(), join(queue));
        }
        let mut counters = device.model.counters();
        counters.extend(device.handle.counters());
        tracing::info!("counters device={} {}", device.model.name(), join(counters));
    }
    for (name, uplink) in &running.uplinks {
        for queue in uplink.counters.by_queue() {
            tracing::info!("xstats device={name} {}", join(queue));
        }
        let mut counters = uplink.counters.totals();
        counters.extend(uplink.host_counters());
        tracing::info!("counters device={name} {}", join(counters));
    }
    for (number, counters) in running.engine.counters().into_iter().enumerate() {
        tracing::info!("counters worker={number} {}", join(counters));
    }
}

/// Sessions first (each drains its vrings), then workers. Whether everything was drained.
fn shut_down(mut running: Running, exit: &EventFd) -> bool {
    tracing::info!("shutting down");
    if let Err(error) = exit.write(1) {
        tracing::error!("sessions can't be told to end: {error}");
        return false;
    }
    let mut clean = true;
    for device in &mut running.devices {
        let drained = device
            .thread
            .take()
            .is_none_or(|thread| thread.join().unwrap_or(false));
        if !drained {
            let (kind, name) = (device.model.kind(), device.model.name());
            let left = device.handle.in_flight();
            tracing::error!("{kind} {name}: not drained, {left} requests still in flight");
        }
        clean &= drained;
    }
    log_counters(&running);
    if clean {
        running.engine.stop();
    }
    clean
}
