//! Limits of disks, as they are set up and as they change.

use std::sync::Arc;

use crate::config::{BlkConfig, BlkLimits, Config, GroupConfig, PortRates};
use crate::device::DeviceKind;
use crate::engine::Parts;
use crate::host::limit::{DiskLimits, DiskRates, LimitSet, Rates};

use super::Running;

/// The groups, each for any of the disks.
pub(super) fn groups(config: &Config) -> Arc<[LimitSet]> {
    let group = |group: &GroupConfig| {
        let set = LimitSet::new(config.blks.len());
        set.set(group.rates);
        set
    };
    config.groups.iter().map(group).collect()
}

/// The limits of the disk `number`, which is `blk`.
pub(super) fn disk(
    number: usize,
    blk: &BlkConfig,
    config: &Config,
    groups: &Arc<[LimitSet]>,
) -> Arc<DiskLimits> {
    let limits = DiskLimits::new(number, Arc::clone(groups));
    limits.set(blk.limits.rates);
    limits.join(find(&blk.limits, config));
    Arc::new(limits)
}

/// The number of the group of a disk.
fn find(limits: &BlkLimits, config: &Config) -> Option<usize> {
    let name = limits.group.as_ref()?;
    config.groups.iter().position(|group| group.name == *name)
}

/// The rates of a port, for the log.
pub(super) fn of_port(rates: &PortRates) -> String {
    let parts = [("ingress", rates.ingress), ("egress", rates.egress)];
    shown(&parts, ["frames/s", "bit/s"])
}

/// Those of a disk or group.
fn of_disk(rates: &DiskRates) -> String {
    let parts = [
        ("reads", rates.read),
        ("writes", rates.write),
        ("both", rates.total),
    ];
    shown(&parts, ["requests/s", "bytes/s"])
}

fn shown(parts: &[(&str, Rates)], [of_count, of_size]: [&str; 2]) -> String {
    let one = |(what, rates): &(&str, Rates)| {
        let count = rates.count.map(|rate| format!("{rate} {of_count}"));
        let size = rates.size.map(|rate| format!("{rate} {of_size}"));
        match [count, size].into_iter().flatten().collect::<Vec<_>>() {
            none if none.is_empty() => format!("{what} unlimited"),
            some => format!("{what} {}, burst {:?}", some.join(", "), rates.burst),
        }
    };
    parts.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Takes over the rates of `new`, and which group each disk is in.
pub(super) fn change(running: &Running, config: &mut Config, new: &Config) {
    for (group, set) in config.groups.iter_mut().zip(running.groups.iter()) {
        let same = new.groups.iter().find(|other| other.name == group.name);
        if let Some(same) = same.filter(|same| same.rates != group.rates) {
            group.rates = same.rates;
            set.set(group.rates);
            tracing::info!(
                "group {}: other rates: {}",
                group.name,
                of_disk(&group.rates)
            );
        }
    }
    for group in &new.groups {
        if !config.groups.iter().any(|known| known.name == group.name) {
            tracing::warn!("group {}: new groups take a restart", group.name);
        }
    }
    for at in 0..config.blks.len() {
        let name = config.blks[at].name.clone();
        let kind = DeviceKind::Blk;
        let same = new.blks.iter().find(|other| other.name == name);
        let mut parts = running.devices.iter().map(|device| &device.parts);
        let limits = parts.find_map(|parts| match parts {
            Parts::Blk(model, _) if model.setup().name == name => Some(&model.setup().limits),
            _ => None,
        });
        let (Some(same), Some(limits)) = (same, limits) else {
            tracing::warn!("{kind} {name}: gone from the settings, it stays until a restart");
            continue;
        };
        if same.limits.rates != config.blks[at].limits.rates {
            config.blks[at].limits.rates = same.limits.rates;
            limits.set(same.limits.rates);
            tracing::info!(
                "{kind} {name}: other rates: {}",
                of_disk(&same.limits.rates)
            );
        }
        let group = find(&same.limits, config);
        if same.limits.group != config.blks[at].limits.group
            && (group.is_some() || same.limits.group.is_none())
        {
            config.blks[at].limits.group.clone_from(&same.limits.group);
            limits.join(group);
            let now = same.limits.group.as_deref();
            tracing::info!("{kind} {name}: now in {}", now.unwrap_or("no group"));
        }
    }
    // One of them may sleep until something may pass at the old rate.
    running.engine.wake();
}
