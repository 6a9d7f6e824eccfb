//! `SessionState`: all facts of a session that can be written down, and the fds that can't.
//!
//! The `vhost` crate's parser is never the only holder of a fact, so that a session can be saved in
//! its middle and resumed by another process: this structure goes through serde, the descriptors
//! travel beside it in [`SessionFds`].

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::engine::VringAddr;
use crate::memory::RegionInfo;

/// Where a vring is in its life. docs/threading.md has the table of transitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum VringStatus {
    /// Something that it needs to run is unknown.
    #[default]
    Unset,
    /// Everything is known; it is not enabled.
    Ready,
    /// A worker polls it.
    Running,
    /// A worker holds it, but it is disabled.
    Paused,
    /// It is being stopped.
    Draining,
}

/// What a session knows of one vring.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringState {
    /// SET_VRING_NUM.
    pub size: Option<u16>,
    /// SET_VRING_ADDR.
    pub addr: Option<VringAddr>,
    /// SET_VRING_BASE, or what the vring stood at when it was last stopped.
    pub base: Option<u32>,
    /// What it stood at when a reset took `base` away: for GET_VRING_BASE, not for its next start,
    /// until the driver begins anew.
    pub stood: Option<u32>,
    /// The last SET_VRING_ENABLE; QEMU's virtio-net sends its only one before SET_FEATURES.
    pub enable: Option<bool>,
    /// SET_VRING_KICK came, with or without an fd.
    pub kick_known: bool,
    /// Where it is in its life.
    pub status: VringStatus,
}

impl VringState {
    /// Whether a worker has it.
    pub fn is_started(&self) -> bool {
        matches!(self.status, VringStatus::Running | VringStatus::Paused)
    }
}

/// The facts of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// SET_OWNER came.
    pub owned: bool,
    /// The acknowledged features, virtio's and vhost-user's bit 30; `None` before SET_FEATURES.
    pub features: Option<u64>,
    /// The acknowledged protocol features.
    pub protocol_features: u64,
    /// The virtio device status, as SET_STATUS brought it.
    pub status: u8,
    /// The vrings, by index.
    pub vrings: Vec<VringState>,
    /// The memory table, in the order of guest physical addresses.
    pub regions: Vec<RegionInfo>,
    /// Regions that were added again while they were there, once for each time.
    pub repeated_regions: Vec<RegionInfo>,
}

impl SessionState {
    /// The state of a new session of a device with `vrings` vrings.
    pub fn new(vrings: u16) -> SessionState {
        let vrings = (0..vrings).map(|_| VringState::default()).collect();
        SessionState {
            vrings,
            ..SessionState::default()
        }
    }

    /// VHOST_USER_F_PROTOCOL_FEATURES was acknowledged.
    pub fn has_protocol_features(&self) -> bool {
        self.features
            .is_some_and(|features| features & PROTOCOL_FEATURES_BIT != 0)
    }

    /// Whether vring `index` is to be processed: as SET_VRING_ENABLE said, and without
    /// VHOST_USER_F_PROTOCOL_FEATURES from the start (vhost-user: "Ring states").
    pub fn is_enabled(&self, index: usize) -> bool {
        let enable = self.vrings.get(index).and_then(|vring| vring.enable);
        enable.unwrap_or(!self.has_protocol_features())
    }
}

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const PROTOCOL_FEATURES_BIT: u64 = 1 << 30;

/// The descriptors of one vring.
#[derive(Debug, Default)]
pub struct VringFds {
    /// `None` also when the front-end said that there is none.
    pub kick: Option<EventFd>,
    /// Used buffer notifications.
    pub call: Option<EventFd>,
    /// Told when the ring breaks.
    pub err: Option<EventFd>,
}

impl VringFds {
    /// Copies of call and err, for a worker.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn call_and_err(&self) -> std::io::Result<(Option<EventFd>, Option<EventFd>)> {
        let copy = |fd: &Option<EventFd>| fd.as_ref().map(EventFd::try_clone).transpose();
        Ok((copy(&self.call)?, copy(&self.err)?))
    }
}

/// The descriptors of a session: what [`SessionState`] can't hold.
#[derive(Debug, Default)]
pub struct SessionFds {
    /// By vring index.
    pub vrings: Vec<VringFds>,
    /// Where requests of our own go.
    pub channel: Option<UnixStream>,
    /// Guest memory, in the order of [`SessionState::regions`].
    pub regions: Vec<Arc<File>>,
}
