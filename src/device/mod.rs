//! Virtio device logic: what a guest sees, apart from threads, fds and sockets.
//!
//! The logic is generic over [`crate::ring::ChainQueue`], so it names no ring format, and its tests
//! need no ring. What control asks of a device is in [`DeviceModel`].
#![forbid(unsafe_code)]

use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_RING_RESET;

pub mod blk;
pub mod net;

/// Which device a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// virtio-net (VIRTIO 1.3 §5.1).
    Net,
    /// virtio-blk (VIRTIO 1.3 §5.2).
    Blk,
}

impl core::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            DeviceKind::Net => "net",
            DeviceKind::Blk => "blk",
        })
    }
}

/// Why a write to config space was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("config space of {size} bytes: bytes {offset}..{offset}+{len} can't be written")]
pub struct ConfigWriteError {
    /// Offset of the write.
    pub offset: u32,
    /// Its length.
    pub len: usize,
    /// Size of the config space.
    pub size: usize,
}

/// How long calls to the driver may be put off, so that one call serves several bursts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Call when so many buffers were used since the last call.
    pub used: u32,
    /// Call when the oldest of them has waited for so long.
    pub wait: Duration,
}

/// What an operator may choose about the vrings of a device, and the memory that they are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingOptions {
    /// VIRTIO_F_RING_RESET is offered.
    pub ring_reset: bool,
    /// Calls are put off; without it every burst that the driver wants to hear of is told at once.
    pub calls: Option<CallLimits>,
    /// Guest memory may be in files that are not kept in memory: touching it may wait for a disk.
    pub memory_files: bool,
}

impl RingOptions {
    /// The feature bits that they add.
    pub fn features(self) -> u64 {
        if self.ring_reset {
            1 << VIRTIO_F_RING_RESET
        } else {
            0
        }
    }
}

/// What the control plane asks of a device. Cold; shared by the session thread and the daemon.
pub trait DeviceModel: Send + Sync + core::fmt::Debug {
    /// The name from the configuration.
    fn name(&self) -> &str;
    /// Which device it is.
    fn kind(&self) -> DeviceKind;
    /// Virtio feature bits offered, without the vhost-user bits.
    fn features(&self) -> u64;
    /// Vrings at most (a net device has two per queue pair).
    fn vrings_max(&self) -> u16;
    /// Queues as GET_QUEUE_NUM counts them: queue pairs of a net device, queues of a disk.
    fn queues_max(&self) -> u16;
    /// What was chosen about its vrings.
    fn ring_options(&self) -> RingOptions;
    /// The config space, whole.
    fn config(&self) -> Vec<u8>;
    /// The guest writes to config space.
    ///
    /// # Errors
    /// [`ConfigWriteError`] when the bytes are outside or read-only.
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigWriteError>;
    /// The driver acknowledged these features.
    fn negotiated(&self, _features: u64) {}
    /// Whether there is a link that may come and go, of which config space tells.
    fn has_link_status(&self) -> bool {
        false
    }
    /// Whether config space may change by itself, of which a front-end is told.
    fn config_changes(&self) -> bool {
        self.has_link_status()
    }
    /// The link is up, or down: whether config space has changed by that.
    fn set_link(&self, _up: bool) -> bool {
        false
    }
    /// What was chosen for this device that only config space tells.
    fn only_in_config(&self) -> Vec<String> {
        Vec::new()
    }
    /// The counters by name, for the status line.
    fn counters(&self) -> Vec<(&'static str, u64)>;
    /// The same for the port and for each queue that was in use, where there is more to say of
    /// them.
    fn queue_counters(&self) -> Vec<Vec<(String, u64)>> {
        Vec::new()
    }
}
