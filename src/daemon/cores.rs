//! Which workers serve a disk, as that changes.

use crate::config::Config;
use crate::device::DeviceKind;

use super::Running;

/// Takes over the cores of disks from `new`. Their session threads move the queues, when they look
/// for news.
pub(super) fn change(running: &Running, config: &mut Config, new: &Config) {
    for blk in &mut config.blks {
        let same = new.blks.iter().find(|other| other.name == blk.name);
        let device = running.devices.iter().find(|device| {
            device.model.kind() == DeviceKind::Blk && device.model.name() == blk.name
        });
        if let (Some(same), Some(device)) = (same, device)
            && same.cores != blk.cores
        {
            blk.cores.clone_from(&same.cores);
            device.handle.allow(&blk.cores);
        }
    }
}
