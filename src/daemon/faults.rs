//! Faults of disks, as they are set up and as they change.

use std::sync::Arc;

use crate::config::{BlkConfig, Config, FaultPlan};
use crate::engine::Parts;
use crate::host::fault::Faults;

use super::Running;

/// The faults that `blk` begins with.
pub(super) fn of(blk: &BlkConfig) -> Arc<Faults> {
    let faults = Faults::default();
    if let Some(plan) = blk.fault {
        set(&blk.name, &faults, Some(plan));
    }
    Arc::new(faults)
}

/// Nobody should wonder later why a disk fails.
fn set(device: &str, faults: &Faults, plan: Option<FaultPlan>) {
    faults.set(plan);
    match plan {
        Some(plan) => tracing::warn!(device, ?plan, "faults are injected, as asked for"),
        None => tracing::warn!(device, "no more faults are injected"),
    }
}

/// Takes over the faults of `new`.
pub(super) fn change(running: &Running, config: &mut Config, new: &Config) {
    for blk in &mut config.blks {
        let same = new.blks.iter().find(|other| other.name == blk.name);
        let mut parts = running.devices.iter().map(|device| &device.parts);
        let model = parts.find_map(|parts| match parts {
            Parts::Blk(model, _) if model.setup().name == blk.name => Some(model),
            _ => None,
        });
        if let (Some(same), Some(model)) = (same, model)
            && same.fault != blk.fault
        {
            blk.fault = same.fault;
            set(&blk.name, &model.setup().faults, blk.fault);
        }
    }
}
