//! What a guest sends on a disabled vring.
//!
//! A driver that uses fewer queue pairs may have left frames on one that it uses no more, and
//! waits for them: Linux repeats no TCP segment that still lies in a ring. So a network device must
//! drop what is on a disabled TX vring (vhost-user, "Ring states"). Front-ends also disable a vring
//! for a moment, QEMU before it stops one: for that time the frames are kept.

use std::time::{Duration, Instant};

use super::{Endpoint, Slot, Worker};
use crate::engine::endpoint::GuestSource;
use crate::engine::link::Armed;

/// How long a disabled vring keeps its frames: no longer than TCP waits before it sends again.
pub(super) const GRACE: Duration = Duration::from_millis(200);
/// Turns of a worker that does not sleep before it looks again at disabled vrings that had nothing.
const TURNS_BETWEEN: u32 = 64;

impl Slot {
    /// The TX vring in it, if that is disabled and stays.
    fn disabled(&mut self) -> Option<&mut (dyn GuestSource + 'static)> {
        match &mut self.endpoint {
            Some(Endpoint::Source(source)) if self.paused && self.stopping.is_none() => {
                Some(source.as_mut())
            }
            _ => None,
        }
    }

    /// What is left of the time in which frames are kept.
    fn grace(&mut self) -> Duration {
        let left = match self.grace {
            Some(end) => end.saturating_duration_since(Instant::now()),
            None => return Duration::ZERO,
        };
        if left.is_zero() {
            self.grace = None;
        }
        left
    }
}

impl Worker {
    /// Finds the disabled TX vrings, after vrings came, went, or were paused.
    pub(super) fn find_disabled(&mut self) {
        self.disabled.clear();
        let slots = self.slots.0.iter_mut().enumerate();
        let disabled = slots.filter_map(|(at, slot)| slot.disabled().map(|_| at));
        self.disabled.extend(disabled);
    }

    /// Drops a burst of each of them, if it is time to look. Returns the frames.
    pub(super) fn discard_disabled(&mut self) -> usize {
        if self.discard_in > 0 {
            self.discard_in -= 1;
            return 0;
        }
        let mut dropped = 0;
        for &at in &self.disabled {
            let slot = &mut self.slots.0[at];
            if slot.grace().is_zero()
                && let Some(source) = slot.disabled()
            {
                dropped += source.discard(&mut self.burst);
            }
        }
        self.discard_in = if dropped > 0 { 0 } else { TURNS_BETWEEN };
        dropped
    }

    /// Before a sleep: kicks on where frames would be dropped. The second is how long others keep
    /// theirs.
    pub(super) fn arm_disabled(&mut self) -> (Armed, Option<Duration>) {
        let (mut armed, mut least) = (Armed::Sleep, None);
        for &at in &self.disabled {
            let slot = &mut self.slots.0[at];
            let left = slot.grace();
            if !left.is_zero() {
                least = Some(least.map_or(left, |least: Duration| least.min(left)));
            } else if slot.disabled().is_some_and(GuestSource::arm_discard) {
                armed = Armed::Work;
            }
        }
        (armed, least)
    }
}
