//! The daemon: builds everything from the settings, waits for signals, and shuts down in order.
//!
//! Whatever can fail is done before the first thread serves anything: files, taps and sockets are
//! opened first, and an error there leaves nothing behind.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{BlkBackend, BlkConfig, Config, IdlePolicy, LinkConfig, NetConfig};
use crate::control::session;
use crate::device::blk::{BlkModel, BlkOptions};
use crate::device::net::{NetModel, NetOptions};
use crate::device::{DeviceKind, DeviceModel};
use crate::engine::{self, Backing, DeviceHandle, DeviceSpec, Engine, EngineOptions, LinkSpec};
use crate::host::tap::TapQueue;
use crate::sys::disk::DiskFile;
use crate::sys::listen::{ListenError, Listener};
use crate::sys::ramdisk::RamStore;
use crate::sys::signals::{Signal, Signals};
use crate::sys::systemd;
use crate::sys::tap::{Tap, TapError};

/// Why the daemon did not start. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A socket can't listen.
    #[error("{kind} {name}: {source}")]
    Socket {
        /// Which kind of device.
        kind: DeviceKind,
        /// Its name.
        name: String,
        /// What is wrong.
        source: ListenError,
    },
    /// A disk can't be opened.
    #[error("blk {name}: {source}")]
    Disk {
        /// The disk's name.
        name: String,
        /// What is wrong.
        source: io::Error,
    },
    /// A tap can't be opened.
    #[error("net {name}: link = \"tap:{tap}\": {source}")]
    Tap {
        /// The port's name.
        name: String,
        /// The interface.
        tap: String,
        /// What is wrong.
        source: TapError,
    },
    /// The threads can't start.
    #[error("{what}: {source}")]
    Start {
        /// What was being started.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// One device with its socket, before its session thread runs.
struct Device {
    model: Arc<dyn DeviceModel>,
    listener: Listener,
    socket: String,
}
