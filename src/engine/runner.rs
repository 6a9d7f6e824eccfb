//! `VringRunner`: what control asks of the engine, vring by vring. Cold, blocking, with deadlines.

use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestRam, MemoryError};
use crate::ring::RingFault;

/// The three addresses of SET_VRING_ADDR, in the front-end's address space, by their spec names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VringAddr {
    /// Descriptor area.
    pub desc: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
}

/// Everything that a vring needs to run.
#[derive(Debug)]
pub struct VringSetup {
    /// Vring index within the device.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Virtio feature bits that the driver acknowledged.
    pub features: u64,
    /// The 32-bit value of SET_VRING_BASE; `None` when the front-end never sent one.
    pub base: Option<u32>,
    /// Where the areas are.
    pub addr: VringAddr,
    /// The memory table.
    pub ram: Arc<GuestRam>,
    /// Kicks; `None` when the front-end has none to give (the vring is polled).
    pub kick: Option<EventFd>,
    /// Calls; `None` when the driver polls.
    pub call: Option<EventFd>,
    /// Told once when the ring breaks.
    pub err: Option<EventFd>,
}

/// Why the engine could not do what control asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A ring area is not in guest memory.
    #[error("vring {index}: {source}")]
    Memory {
        /// Vring index.
        index: u16,
        /// What is wrong with the area.
        source: MemoryError,
    },
    /// Size, base or areas are impossible.
    #[error("vring {index}: {fault}")]
    Ring {
        /// Vring index.
        index: u16,
        /// Which rule is broken.
        fault: RingFault,
    },
    /// The vring is not started (or started already).
    #[error("vring {index} is in the wrong state for that")]
    State {
        /// Vring index.
        index: u16,
    },
    /// Requests were still in flight at the deadline.
    #[error("vring {index}: {in_flight} requests still in flight after {waited_ms} ms")]
    Draining {
        /// Vring index.
        index: u16,
        /// Requests that the host has not finished.
        in_flight: u32,
        /// How long we waited.
        waited_ms: u64,
    },
    /// The worker did not answer in time.
    #[error("vring {index}: the worker did not answer within {waited_ms} ms")]
    Timeout {
        /// Vring index.
        index: u16,
        /// How long we waited.
        waited_ms: u64,
    },
    /// A system call around the vring failed.
    #[error("vring {index}: {source}")]
    System {
        /// Vring index.
        index: u16,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A kind of fd that a front-end is told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdKind {
    /// Used buffer notifications.
    Call,
    /// Told when the ring breaks.
    Err,
}

impl core::fmt::Display for FdKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            FdKind::Call => "call",
            FdKind::Err => "err",
        })
    }
}

/// An fd of a front-end that a worker slept in, until it was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "vring {vring}: a worker slept in its {kind} fd, whose O_NONBLOCK was cleared and whose \
     counter was filled"
)]
pub struct BlockingFd {
    /// Vring index.
    pub vring: u16,
    /// Which of its fds.
    pub kind: FdKind,
}

/// What control asks of the engine for one device. Calls block until the worker has answered.
///
/// The index is below [`crate::device::DeviceModel::vrings_max`]; control has checked that.
pub trait VringRunner: Send + Sync + core::fmt::Debug {
    /// Starts a vring. Nothing is processed before this returns `Ok`.
    ///
    /// # Errors
    /// [`EngineError`]; the vring is not started then.
    fn start(&self, setup: VringSetup) -> Result<(), EngineError>;

    /// Stops a started vring: no new chain is taken, what is in flight finishes, and the base (as
    /// GET_VRING_BASE carries it) is returned. Afterwards nothing touches the guest's memory for
    /// this vring.
    ///
    /// # Errors
    /// [`EngineError::Draining`] or [`EngineError::Timeout`] when the deadline passed.
    fn stop(&self, index: u16) -> Result<u32, EngineError>;

    /// Stops several vrings as [`VringRunner::stop`] does, within the time of one; the answers are
    /// in the order of `indices`.
    fn stop_all(&self, indices: &[u16]) -> Vec<Result<u32, EngineError>> {
        indices.iter().map(|&index| self.stop(index)).collect()
    }

    /// Disables (`true`) or enables a started vring; a disabled one is not processed in either
    /// direction.
    ///
    /// # Errors
    /// [`EngineError`].
    fn pause(&self, index: u16, paused: bool) -> Result<(), EngineError>;

    /// Exchanges the call and err fds of a started vring.
    ///
    /// # Errors
    /// [`EngineError`].
    fn set_call(
        &self,
        index: u16,
        call: Option<EventFd>,
        err: Option<EventFd>,
    ) -> Result<(), EngineError>;

    /// Goes over to another memory table at a burst boundary, without draining.
    ///
    /// # Errors
    /// [`EngineError::Memory`] when the ring is not in the new table; the vring goes on in the old
    /// one then.
    fn swap(&self, index: u16, ram: Arc<GuestRam>, addr: VringAddr) -> Result<(), EngineError>;

    /// The driver's acknowledged features are final: the host side follows them (offloads of a
    /// tap, for one). Called before the first vring of a session starts.
    ///
    /// # Errors
    /// The host's refusal.
    fn negotiated(&self, features: u64) -> std::io::Result<()>;

    /// Readable when [`VringRunner::blocking`] has something to tell; `None` where it never has.
    fn bell(&self) -> Option<RawFd> {
        None
    }

    /// An fd of the session that a worker slept in. Nothing is told over any fd of the session
    /// then, which should end.
    fn blocking(&self) -> Option<BlockingFd> {
        None
    }

    /// The session is over: the next one may be told again. What [`VringRunner::blocking`] was.
    fn session_over(&self) -> Option<BlockingFd> {
        None
    }
}
