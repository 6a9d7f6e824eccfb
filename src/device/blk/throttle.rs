//! `Throttle`: requests of one queue that wait for a limit.
//!
//! A request that a limit does not let pass keeps its slot and waits here, reads and writes apart,
//! so that one kind does not hold up the other. When neither may pass and something waits, nothing
//! more is taken from the ring: the rest stays where a stop finds it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::host::limit::{Direction, DiskLimits, QueueLimits};

use super::config::BlkCounters;

/// What waits, and for what.
#[derive(Debug)]
pub(super) struct Throttle {
    limits: QueueLimits,
    /// Slots, by direction, in order.
    held: [VecDeque<u16>; 2],
    /// This turn looks at limits.
    active: bool,
    /// The queue stops: nothing waits any longer.
    at_its_end: bool,
    /// When the last turn was in which something waited, in nanoseconds.
    since: Option<u64>,
    counters: Arc<BlkCounters>,
}

impl Throttle {
    /// For queue `index` with so many slots.
    pub(super) fn new(
        disk: Arc<DiskLimits>,
        index: u16,
        slots: u16,
        counters: Arc<BlkCounters>,
    ) -> Throttle {
        let room = || VecDeque::with_capacity(usize::from(slots));
        Throttle {
            limits: QueueLimits::new(disk, index),
            held: [room(), room()],
            active: false,
            at_its_end: false,
            since: None,
            counters,
        }
    }

    fn holds(&self) -> bool {
        self.held.iter().any(|held| !held.is_empty())
    }

    /// A turn begins. Whether it has to look at limits.
    #[inline]
    pub(super) fn begin(&mut self) -> bool {
        self.active = self.limits.is_on() || self.holds();
        if self.active {
            self.limits.begin();
        }
        self.active
    }

    /// Whether this turn looks at limits.
    #[inline]
    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    /// Whether another request may be taken from the ring.
    pub(super) fn is_open(&self) -> bool {
        !self.active || !self.holds() || self.passes_any()
    }

    fn passes_any(&self) -> bool {
        let mut both = Direction::ALL.into_iter();
        both.any(|direction| self.limits.is_left(direction))
    }

    /// A request that is new in slot `index`: whether it passes now. If not, it waits here.
    pub(super) fn admits(&mut self, index: u16, direction: Direction, bytes: u64) -> bool {
        let held = &mut self.held[direction as usize];
        if held.is_empty() && self.limits.is_left(direction) {
            self.limits.take(direction, bytes);
            return true;
        }
        held.push_back(index);
        self.counters.throttled.add(1);
        false
    }

    /// The queue stops: nothing waits any longer.
    pub(super) fn end(&mut self) {
        self.at_its_end = true;
    }

    /// Whether the queue stops.
    pub(super) fn is_at_its_end(&self) -> bool {
        self.at_its_end
    }

    /// The slot of a request that waited and may pass now, or need not wait any longer. It is to be
    /// counted by [`Throttle::passed`].
    pub(super) fn release(&mut self) -> Option<(u16, Direction)> {
        let mut both = Direction::ALL.into_iter();
        both.find_map(|direction| {
            let passes = self.at_its_end || self.limits.is_left(direction);
            let held = &mut self.held[direction as usize];
            passes
                .then(|| held.pop_front())?
                .map(|index| (index, direction))
        })
    }

    /// Counts a request that waited.
    pub(super) fn passed(&mut self, direction: Direction, bytes: u64) {
        self.limits.take(direction, bytes);
    }

    /// The turn is over.
    #[cold]
    pub(super) fn settle(&mut self) {
        let waits = self.held.each_ref().map(|held| !held.is_empty());
        self.limits.settle(waits);
        let now = self.limits.nanos();
        if let Some(since) = self.since {
            self.counters.throttled_ns.add(now.saturating_sub(since));
        }
        self.since = self.holds().then_some(now);
    }

    /// How long until something may pass that waits; `None` when nothing does.
    pub(super) fn wait(&self) -> Option<Duration> {
        if !self.holds() {
            return None;
        }
        // While nothing is taken from the ring, either direction may wait there.
        let waits = self.held.each_ref().map(|held| !held.is_empty());
        self.limits
            .wait(if self.is_open() { waits } else { [true; 2] })
    }
}
