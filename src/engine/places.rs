//! Where the vrings of a device can be: a slot of a worker is kept for each, so that starting one
//! makes no worker's table longer.

use std::sync::Arc;
use std::sync::atomic::AtomicU16;

use super::build::{LinkSpec, Parts, Plan};
use super::fabric::Running;
use super::handle::Place;
use super::placement::worker_of;

/// The places of the vrings of device number `device`, among the workers of each group. A disk's
/// vrings have one at every worker, a group for each: they may go to any while they run.
pub(super) fn places_of(
    plans: &mut [Plan],
    device: usize,
    parts: &Parts,
    groups: &[(Option<usize>, Vec<usize>)],
) -> Vec<Vec<Place>> {
    let Parts::Blk(model, backing) = parts else {
        let place = |(node, workers): &(_, Vec<_>)| place(plans, device, parts, workers, *node);
        return share_counters(groups.iter().map(place).collect());
    };
    // What can't be had is known at the start, of workers that need it then.
    for (_, workers) in groups {
        for index in 0..model.setup().queues {
            let plan = &mut plans[worker_of(device, index, workers)];
            plan.uring = plan.uring.max(backing.uring());
        }
    }
    let all = 0..plans.len();
    let place = |worker| place(plans, device, parts, &[worker], None);
    share_counters(all.map(place).collect())
}

/// Gives every vring of a device a place among `workers`, near to memory node `node`.
fn place(
    plans: &mut [Plan],
    device: usize,
    parts: &Parts,
    workers: &[usize],
    node: Option<usize>,
) -> Vec<Place> {
    let (per_unit, group) = match parts {
        // The ends of a wire are served side by side.
        Parts::Net(_, LinkSpec::Wire { peer, .. }) => (2, device.min(*peer)),
        Parts::Net(..) => (2, device),
        Parts::Blk(..) => (1, device),
    };
    let mut places = Vec::new();
    for index in 0..parts.model().vrings_max() {
        let worker = worker_of(group, index / per_unit, workers);
        let plan = &mut plans[worker];
        let running = Running::default();
        places.push(Place {
            mailbox: Arc::clone(&plan.mailbox),
            worker,
            node,
            slot: plan.slots.len(),
            running: running.clone(),
            bursts: 1,
            size: AtomicU16::new(0),
            counters: Arc::default(),
        });
        plan.slots.push(running);
    }
    places
}

/// The places of each vring, from those of each group: a vring is the same at each of them.
fn share_counters(mut groups: Vec<Vec<Place>>) -> Vec<Vec<Place>> {
    if let Some((first, others)) = groups.split_first_mut() {
        for group in others {
            for (place, same) in group.iter_mut().zip(first.iter()) {
                place.counters = Arc::clone(&same.counters);
            }
        }
    }
    groups
}
