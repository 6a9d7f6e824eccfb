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
    Placement, PortRates, RingsConfig,
};
use crate::control::session::{self, FrontEnds, Link, Served};
use crate::device::blk::{BlkModel, BlkSetup};
use crate::device::net::{NetModel, NetOptions, Offloads};
use crate::device::{CallLimits, DeviceKind, DeviceModel, RingOptions};
use crate::engine::{self, Backing, DeviceHandle, Engine, EngineOptions, LinkSpec, Member, Parts};
use crate::memory::Store;
use crate::sys::disk::{DiskError, DiskFile, DiskOptions};
use crate::sys::link::{LinkError, LinkWatch};
use crate::sys::listen::ListenError;
use crate::sys::signals::{Signal, Signals};
use crate::sys::systemd;
use crate::sys::tap::{Tap, TapError, TapSource};
use crate::sys::xdp::{Xdp, XdpError};

mod doors;
mod links;

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
    #[error("net {name}: link = \"xdp:{interface}\"")]
    Xdp {
        /// The device.
        name: String,
        /// The interface.
        interface: String,
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
    for blk in &config.blks {
        doors.push(open(DeviceKind::Blk, &blk.name, &blk.socket)?);
        parts.push(Member {
            parts: blk_parts(blk)?,
            cores: blk.cores.clone(),
        });
    }
    let links = links::join(&config.nets, watches).map_err(start("links"))?;
    let options = EngineOptions {
        cores: config.engine.cores.clone(),
        idle: idle_policy(config.engine.idle),
        stop_timeout: config.engine.stop_timeout,
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
    for (((parts, handle), door), link) in parts.into_iter().zip(handles).zip(doors).zip(links) {
        let device =
            serve(&parts.parts, handle, door, link, &exit).map_err(start("session thread"))?;
        devices.push(device);
    }
    announce(&config);
    wait(&signals, &devices, &engine, config, reload);
    Ok(shut_down(devices, engine, &exit))
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
            let open = Tap::open_at(tap, net.queues, net.mtu);
            let named = |source| DaemonError::Tap {
                name: net.name.clone(),
                tap: tap.source.clone(),
                source,
            };
            (LinkSpec::Tap(Arc::new(open.map_err(named)?)), net.queues)
        }
        LinkConfig::Xdp(interface) => {
            let open = Xdp::open(interface, net.queues, net.mtu);
            let named = |source| DaemonError::Xdp {
                name: net.name.clone(),
                interface: interface.clone(),
                source,
            };
            (LinkSpec::Xdp(Arc::new(open.map_err(named)?)), net.queues)
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
    limit(&model, net.rates);
    Ok((Parts::Net(Arc::new(model), link), watch))
}

fn limit(model: &NetModel, rates: PortRates) {
    model.limits().ingress.set(rates.ingress);
    model.limits().egress.set(rates.egress);
}

/// What a port offers: between guests all, because what one of them does not take is done for it;
/// on a tap what the kernel does.
fn offloads(link: &LinkSpec) -> Offloads {
    match link {
        LinkSpec::Tap(tap) => Offloads {
            uso: tap.supports_uso(),
            ..Offloads::CSUM_TSO
        },
        // What leaves a guest goes to the interface as it is.
        LinkSpec::Xdp(_) => Offloads::default(),
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
        calls: rings.calls.map(limits),
    }
}

fn blk_parts(blk: &BlkConfig) -> Result<Parts, DaemonError> {
    let (backing, capacity_bytes) = match &blk.backend {
        BlkBackend::Path(path) => {
            let options = DiskOptions {
                read_only: blk.read_only,
                direct: blk.direct,
                block_size: blk.block_size,
            };
            let file = DiskFile::open(path, options).map_err(|source| DaemonError::Disk {
                name: blk.name.clone(),
                source,
            })?;
            let bytes = file.bytes();
            (Backing::File(Arc::new(file)), bytes)
        }
        &BlkBackend::Ram(bytes) => {
            let store = Store::new(bytes).map_err(|source| DaemonError::Ram {
                name: blk.name.clone(),
                bytes,
                source,
            })?;
            (Backing::Ram(Arc::new(store)), bytes)
        }
        &BlkBackend::Null(bytes) => (Backing::Null, bytes),
    };
    let model = BlkModel::new(BlkSetup {
        name: blk.name.clone(),
        capacity_bytes,
        block_size: blk.block_size,
        queues: blk.queues,
        read_only: blk.read_only,
        serial: blk.serial.clone(),
        rings: ring_options(blk.rings),
    });
    Ok(Parts::Blk(Arc::new(model), backing))
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
    link: Link,
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
    let thread = session::spawn(served, front_ends, link, exit.try_clone()?)?;
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
fn wait(
    signals: &Signals,
    devices: &[Device],
    engine: &Engine,
    mut config: Config,
    reload: Reload<'_>,
) {
    loop {
        match signals.wait() {
            Ok(Signal::Terminate | Signal::Interrupt) => return,
            Ok(Signal::User1) => log_counters(devices, engine),
            Ok(Signal::Hangup) => match reload() {
                Ok(new) => change(devices, &mut config, new),
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
fn change(devices: &[Device], config: &mut Config, new: Config) {
    for net in &mut config.nets {
        let kind = DeviceKind::Net;
        let same = new.nets.iter().find(|other| other.name == net.name);
        let mut of_name = devices.iter().map(|device| &device.parts);
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
            limit(model, net.rates);
            tracing::info!("{kind} {}: other rates", net.name);
        }
        if same != net {
            tracing::warn!("{kind} {}: what else has changed takes a restart", net.name);
        }
    }
    let known = |name: &String| config.nets.iter().any(|net| net.name == *name);
    for net in new.nets.iter().filter(|net| !known(&net.name)) {
        tracing::warn!("{} {}: new ports take a restart", DeviceKind::Net, net.name);
    }
    if new.blks != config.blks || new.engine != config.engine {
        tracing::warn!("what has changed of disks or of the engine takes a restart");
    }
}

fn log_counters(devices: &[Device], engine: &Engine) {
    fn join<N: std::fmt::Display>(counters: Vec<(N, u64)>) -> String {
        let pairs: Vec<_> = counters
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        pairs.join(" ")
    }
    for device in devices {
        for queue in device.model.queue_counters() {
            tracing::info!("xstats device={} {}", device.model.name(), join(queue));
        }
        let mut counters = device.model.counters();
        counters.extend(device.handle.counters());
        tracing::info!("counters device={} {}", device.model.name(), join(counters));
    }
    for (number, counters) in engine.counters().into_iter().enumerate() {
        tracing::info!("counters worker={number} {}", join(counters));
    }
}

/// Sessions first (each drains its vrings), then workers. Whether everything was drained.
fn shut_down(mut devices: Vec<Device>, engine: Engine, exit: &EventFd) -> bool {
    tracing::info!("shutting down");
    if let Err(error) = exit.write(1) {
        tracing::error!("sessions can't be told to end: {error}");
        return false;
    }
    let mut clean = true;
    for device in &mut devices {
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
    log_counters(&devices, &engine);
    if clean {
        engine.stop();
    }
    clean
}
