//! The daemon: builds everything from the settings, waits for signals, and shuts down in order.
//!
//! Whatever can fail is done before the first thread serves anything: sockets, files and taps are
//! opened first, and an error there leaves nothing behind.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{
    BlkBackend, BlkConfig, CallsConfig, Config, EncryptConfig, IdlePolicy, LinkConfig, NetConfig,
    Placement, RingsConfig, SocketSource,
};
use crate::control::session::{self, Accept, Served};
use crate::device::blk::{BlkModel, BlkSetup, BlkTopology, RangeLimits};
use crate::device::net::{NetModel, NetOptions, Offloads};
use crate::device::{CallLimits, DeviceKind, DeviceModel, RingOptions};
use crate::engine::{
    self, Backing, DeviceHandle, Encryption, Engine, EngineOptions, LinkSpec, Member, Parts,
};
use crate::memory::Store;
use crate::sys::connect::Connector;
use crate::sys::disk::{DiskError, DiskFile, DiskOptions};
use crate::sys::key::{DiskKey, KeyError};
use crate::sys::listen::{ListenError, Listener};
use crate::sys::signals::{Signal, Signals};
use crate::sys::systemd;
use crate::sys::tap::{Tap, TapError};

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
    /// A tap can't be opened.
    #[error("net {name}: link = \"tap:{tap}\"")]
    Tap {
        /// The port's name.
        name: String,
        /// The interface.
        tap: String,
        /// What is wrong.
        source: TapError,
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
    model: Arc<dyn DeviceModel>,
    handle: Arc<DeviceHandle>,
    thread: Option<JoinHandle<bool>>,
}

/// Serves what `config` says until SIGTERM or SIGINT. `true`: everything was drained and closed.
///
/// # Errors
/// [`DaemonError`] when something could not be started; nothing was served then.
pub fn run(config: &Config) -> Result<bool, DaemonError> {
    let start = |what: &str| {
        let what = what.to_owned();
        move |source| DaemonError::Start { what, source }
    };
    // Before any other thread: they all inherit the blocked signals.
    let signals = Signals::block().map_err(start("signals"))?;
    let mut doors = Vec::new();
    let mut parts = Vec::new();
    for net in &config.nets {
        doors.push(front_ends(DeviceKind::Net, &net.name, &net.socket)?);
        parts.push(Member {
            parts: net_parts(net, &config.nets)?,
            cores: net.cores.clone(),
        });
    }
    for blk in &config.blks {
        doors.push(front_ends(DeviceKind::Blk, &blk.name, &blk.socket)?);
        parts.push(Member {
            parts: blk_parts(blk)?,
            cores: blk.cores.clone(),
        });
    }
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
    for ((parts, handle), door) in parts.into_iter().zip(handles).zip(doors) {
        let device = serve(&parts.parts, handle, door, &exit).map_err(start("session thread"))?;
        devices.push(device);
    }
    announce(config);
    wait(&signals, &devices, &engine);
    Ok(shut_down(devices, engine, &exit))
}

/// Where a device's front-ends come from.
fn front_ends(
    kind: DeviceKind,
    name: &str,
    socket: &crate::config::SocketConfig,
) -> Result<Accept, DaemonError> {
    if let (SocketSource::Path(path), true) = (&socket.source, socket.client) {
        let mut connector = Connector::new(path);
        return Ok(Box::new(move |exit: &EventFd| {
            connector.connect_or_exit(exit)
        }));
    }
    let named = |source| DaemonError::Socket {
        kind,
        name: name.to_owned(),
        source,
    };
    let listener = Listener::open(socket).map_err(named)?;
    Ok(Box::new(move |exit: &EventFd| {
        listener.accept_or_exit(exit)
    }))
}

/// What stands behind the port `net`, one of `nets`, which are the engine's first devices.
fn net_parts(net: &NetConfig, nets: &[NetConfig]) -> Result<Parts, DaemonError> {
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
            let open = Tap::open(tap, net.queues, net.mtu);
            let named = |source| DaemonError::Tap {
                name: net.name.clone(),
                tap: tap.clone(),
                source,
            };
            (LinkSpec::Tap(Arc::new(open.map_err(named)?)), net.queues)
        }
    };
    let model = NetModel::new(NetOptions {
        name: net.name.clone(),
        queue_pairs: queues,
        mac: net.mac,
        mtu: net.mtu,
        offloads: Offloads::CSUM_TSO,
        rings: ring_options(net.rings),
    });
    Ok(Parts::Net(Arc::new(model), link))
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
    let mut topology = BlkTopology::default();
    let (backing, capacity_bytes, mut ranges) = match &blk.backend {
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
            let told = file.topology();
            topology = BlkTopology::from_bytes(
                blk.block_size,
                told.physical_block,
                told.offset,
                told.min_io,
                told.opt_io,
            );
            let mut ranges = RangeLimits::file(told.physical_block);
            // Zeros are written there, as ciphertext.
            ranges.zero_unmaps = blk.encrypt.is_none();
            let file = Arc::new(file);
            let backing = match &blk.encrypt {
                None => Backing::File(file),
                Some(how) => Backing::Encrypted(file, encryption(&blk.name, how)?),
            };
            (backing, bytes, ranges)
        }
        &BlkBackend::Ram(bytes) => {
            let store = Store::new(bytes).map_err(|source| DaemonError::Ram {
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
        rings: ring_options(blk.rings),
    });
    Ok(Parts::Blk(Arc::new(model), backing))
}

/// Reads the key of the disk `name`.
fn encryption(name: &str, how: &EncryptConfig) -> Result<Encryption, DaemonError> {
    let key = DiskKey::load(&how.key).map_err(|source| DaemonError::Key {
        name: name.to_owned(),
        source,
    })?;
    let sector = how.sector;
    tracing::info!("blk {name}: encrypted with aes-256-xts in sectors of {sector} bytes");
    let key = Arc::new(key);
    Ok(Encryption { key, sector })
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
    front_ends: Accept,
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
    let thread = session::spawn(served, front_ends, exit.try_clone()?)?;
    Ok(Device {
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

/// Waits for the signal that ends the daemon; SIGUSR1 logs the counters.
fn wait(signals: &Signals, devices: &[Device], engine: &Engine) {
    loop {
        match signals.wait() {
            Ok(Signal::Terminate | Signal::Interrupt) => return,
            Ok(Signal::User1) => log_counters(devices, engine),
            Ok(Signal::Hangup) => {}
            Err(error) => {
                tracing::error!("signals can't be waited for: {error}");
                return;
            }
        }
    }
}

fn log_counters(devices: &[Device], engine: &Engine) {
    let join = |counters: Vec<(&str, u64)>| {
        let pairs: Vec<_> = counters
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        pairs.join(" ")
    };
    for device in devices {
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
