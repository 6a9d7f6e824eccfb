//! `Fabric`: ports joined to ports, by a wire or a switch, as all workers see it.
//!
//! A *gate* is where the frames of one queue pair enter the fabric; it lives on the worker of that
//! pair, as the sink of a link. A frame leaves the fabric at a queue pair of another port, which
//! may live on another worker: then the whole burst travels there by reference in a *parcel*, is
//! copied into the receiver's buffers by the receiver's worker, and comes back to be completed.
//! Parcels travel over rings with one producer and one consumer; nothing here takes a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::device::net::{NetModel, Tally};
use crate::host::net::{DropReason, Frame, Verdict, decided};
use crate::host::switch::Switch;
use crate::memory::Segments;

use super::uplink::HostOutlet;
use super::worker::Slots;

mod gate;
mod hub;
mod lane;

pub(crate) use gate::Gate;
pub(crate) use lane::{Inbound, LANE_PARCELS, Lane, lane};

/// Whether a receive vring runs: a hint for senders on any worker, kept by the vring's worker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Running(Arc<AtomicBool>);

impl Running {
    /// Says whether the vring runs.
    pub(crate) fn set(&self, running: bool) {
        self.0.store(running, Ordering::Relaxed);
    }

    #[inline]
    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a queue pair of a port receives.
#[derive(Debug, Clone)]
pub(crate) struct Outlet {
    /// Number of its worker.
    pub(crate) worker: usize,
    /// The receive vring's place there.
    pub(crate) slot: usize,
    /// Whether it runs.
    pub(crate) running: Running,
}

/// Two ports, each of which receives what the other sends.
#[derive(Debug)]
pub(crate) struct Fabric {
    /// The outlets of each port.
    ports: Box<[Box<[Outlet]>]>,
    /// How long frames that enter at each port of a wire wait for a receiver without buffers.
    holds: Box<[Duration]>,
    /// Who finds the ports that a frame goes to; `None` on a wire.
    switch: Option<Switch>,
    /// The devices of a switch's guests, one for each port, to count what none of their vrings is
    /// there to count: all are on the switch's worker, which is who writes there.
    models: Box<[Arc<NetModel>]>,
    /// The uplinks of a switch, whose ports follow those of the guests.
    hosts: Box<[HostOutlet]>,
    /// The switch counts its seconds from here.
    since: Instant,
}

impl Fabric {
    /// A wire between two ports; `holds` is how long what each of them sends may wait.
    pub(crate) fn wire(ports: [Vec<Outlet>; 2], holds: [Duration; 2]) -> Fabric {
        Fabric {
            ports: ports.into_iter().map(Vec::into_boxed_slice).collect(),
            holds: holds.into(),
            switch: None,
            models: Box::default(),
            hosts: Box::default(),
            since: Instant::now(),
        }
    }

    /// A switch between the guests of `ports`, whose devices are `models`, and the uplinks `hosts`,
    /// all on one worker.
    pub(crate) fn switch(
        switch: Switch,
        ports: Vec<Vec<Outlet>>,
        models: Vec<Arc<NetModel>>,
        hosts: Vec<HostOutlet>,
    ) -> Fabric {
        Fabric {
            ports: ports.into_iter().map(Vec::into_boxed_slice).collect(),
            holds: Box::default(),
            switch: Some(switch),
            models: models.into_boxed_slice(),
            hosts: hosts.into_boxed_slice(),
            since: Instant::now(),
        }
    }

    /// Where `port` receives what came on queue pair `pair` of another port: on the pair of the
    /// same number, so that a flow stays on the pair that its guest chose, or another when that
    /// one does not run. `None` when none does.
    #[inline]
    fn outlet(&self, port: usize, pair: usize) -> Option<&Outlet> {
        let outlets = &self.ports[port];
        let first = pair % outlets.len().max(1);
        let (before, from) = outlets.split_at_checked(first)?;
        from.iter()
            .chain(before)
            .find(|outlet| outlet.running.get())
    }

    /// The uplink at `port`; `None` where a guest is.
    #[inline]
    fn host(&self, port: usize) -> Option<&HostOutlet> {
        self.hosts.get(port.checked_sub(self.ports.len())?)
    }

    /// Counts frames for all that did not get as far as a vring of `port`, from queue pair `pair`
    /// of another. An uplink has counted them itself.
    fn count_lost(&self, [port, pair]: [usize; 2], tally: &Tally) {
        let Some(model) = self.models.get(port).filter(|_| !tally.is_empty()) else {
            return;
        };
        let pair = u16::try_from(pair % self.ports[port].len().max(1));
        if let Some(counters) = pair.ok().and_then(|pair| model.pair_counters(pair)) {
            counters.rx.add(tally);
        }
    }

    /// Number of its ports.
    fn count(&self) -> usize {
        self.ports.len() + self.hosts.len()
    }

    /// How long frames that enter at `port` wait for a receiver without buffers.
    pub(crate) fn hold(&self, port: usize) -> Duration {
        self.holds[port]
    }

    /// The workers, other than `worker`, on which `port` may receive.
    pub(crate) fn workers_of(&self, port: usize, worker: usize) -> Vec<usize> {
        let mut workers: Vec<usize> = self.ports[port]
            .iter()
            .map(|outlet| outlet.worker)
            .filter(|&other| other != worker)
            .collect();
        workers.sort_unstable();
        workers.dedup();
        workers
    }
}

/// How long the frame at the front has waited for a receiver's buffers. A receiver that takes one
/// is there, however slow it is: with each frame that goes, time begins anew for the next.
#[derive(Debug, Default)]
struct Hold(Option<Instant>);

impl Hold {
    /// Frames wait, after `moved` others went. Whether the first has waited for long enough: then
    /// all of them are given up, and none waits.
    #[cold]
    fn expired(&mut self, moved: usize, most: Duration) -> bool {
        self.expired_at(Instant::now(), moved, most)
    }

    fn expired_at(&mut self, now: Instant, moved: usize, most: Duration) -> bool {
        if moved > 0 {
            self.over();
        }
        let since = *self.0.get_or_insert(now);
        let expired = now.saturating_duration_since(since) >= most;
        if expired {
            self.over();
        }
        expired
    }

    /// Whether frames wait.
    fn is_active(&self) -> bool {
        self.0.is_some()
    }

    /// No frame waits.
    #[inline]
    fn over(&mut self) {
        self.0 = None;
    }
}

/// Hands `frames`, of which the first `done` are decided, to the receive vring at `slot`. Returns
/// how many are decided then.
#[inline]
fn deliver(
    slots: &mut Slots,
    slot: usize,
    frames: &mut [Frame],
    done: usize,
    segments: &Segments,
) -> usize {
    let Some(sink) = slots.sink(slot) else {
        drop_waiting(&mut frames[done..], DropReason::PeerDown);
        return frames.len();
    };
    sink.transmit(&mut frames[done..], segments);
    done + decided(&frames[done..])
}

/// Gives up the frames that wait.
#[cold]
fn drop_waiting(frames: &mut [Frame], reason: DropReason) {
    for frame in frames {
        if frame.verdict == Verdict::Retry {
            frame.verdict = Verdict::Dropped(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_is_as_long_as_the_first_frame_waits_and_each_has_its_own() {
        let most = Duration::from_millis(10);
        let start = Instant::now();
        let mut hold = Hold::default();
        let mut expired =
            |at, moved| hold.expired_at(start + Duration::from_millis(at), moved, most);
        // Nobody takes any: time is up once, and again for those that come then.
        assert_eq!(
            [(0, 0), (9, 0), (10, 0)].map(|(at, n)| expired(at, n)),
            [false, false, true]
        );
        assert_eq!(
            [(11, 0), (20, 0), (21, 0)].map(|(at, n)| expired(at, n)),
            [false, false, true]
        );
        // A slow receiver, which is late in the end.
        for at in [30, 39, 48, 57] {
            assert!(!expired(at, 1));
        }
        assert_eq!(
            [(66, 0), (67, 0)].map(|(at, n)| expired(at, n)),
            [false, true]
        );
        assert!(!hold.is_active());
        // Nothing may wait.
        assert!(hold.expired_at(start, 1, Duration::ZERO) && !hold.is_active());
    }
}
