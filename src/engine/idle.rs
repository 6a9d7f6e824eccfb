//! When a worker without work goes to sleep: policy as data.

use std::time::{Duration, Instant};

/// What a worker does when a turn of its loop found nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IdlePolicy {
    /// Polls for ever: the lowest latency, a whole core.
    Spin,
    /// Polls while there is work and a little longer, then sleeps until a kick.
    #[default]
    Adaptive,
    /// Sleeps as soon as a turn found nothing.
    Interrupt,
}

/// How long an adaptive worker polls after its last work. Longer than a guest takes from a call to
/// its next kick, short against what a sleeping core saves.
const SPIN_BEFORE_PARK: Duration = Duration::from_micros(100);

/// Empty turns between two looks at the clock.
const TURNS_PER_LOOK: u32 = 64;

/// Decides, turn by turn, whether to sleep.
#[derive(Debug)]
pub(crate) struct Idle {
    policy: IdlePolicy,
    /// Empty turns since the last work.
    empty_turns: u32,
    /// When the first look at the clock after the last work was.
    idle_since: Option<Instant>,
}

impl Idle {
    /// A worker that just had work.
    pub(crate) fn new(policy: IdlePolicy) -> Idle {
        Idle { policy, empty_turns: 0, idle_since: None }
    }

    /// A turn is over, in which `work` frames or requests moved. Whether to park now.
    #[inline]
    pub(crate) fn after(&mut self, work: usize) -> bool {
        if work > 0 {
            self.empty_turns = 0;
            self.idle_since = None;
            return false;
        }
        core::hint::spin_loop();
        match self.policy {
            IdlePolicy::Spin => false,
            IdlePolicy::Interrupt => true,
            IdlePolicy::Adaptive => self.adaptive(),
        }
    }

    fn adaptive(&mut self) -> bool {
        self.empty_turns = self.empty_turns.wrapping_add(1);
        if !self.empty_turns.is_multiple_of(TURNS_PER_LOOK) {
            return false;
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        since.elapsed() >= SPIN_BEFORE_PARK
    }

    /// The worker woke up: an adaptive one polls for a while again.
    pub(crate) fn woke(&mut self) {
        self.empty_turns = 0;
        self.idle_since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spin_never_parks_and_interrupt_parks_at_once() {
        let mut spin = Idle::new(IdlePolicy::Spin);
        assert!((0..100_000).all(|_| !spin.after(0)));
        let mut interrupt = Idle::new(IdlePolicy::Interrupt);
        assert!(!interrupt.after(1));
        assert!(interrupt.after(0));
    }

    #[test]
    fn adaptive_parks_only_after_its_time_without_work() {
        let mut idle = Idle::new(IdlePolicy::Adaptive);
        let start = Instant::now();
        let deadline = start + Duration::from_secs(10);
        while !idle.after(0) {
            assert!(Instant::now() < deadline, "never parks");
        }
        assert!(start.elapsed() >= SPIN_BEFORE_PARK);
        idle.woke();
        assert!(!idle.after(0), "polls again after it woke");
    }
}
