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

/// A turn of a worker's loop.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Turn {
    /// Frames and requests that moved.
    pub(crate) work: usize,
    /// Operations among them that the kernel finished.
    pub(crate) finished: usize,
    /// The kernel still has operations.
    pub(crate) waits: bool,
}

/// How long an adaptive worker polls after its last work. Longer than a guest takes from a call to
/// its next kick, short against what a sleeping core saves.
const SPIN_BEFORE_PARK: Duration = Duration::from_micros(100);

/// Empty turns before it sleeps when a device works that takes its time.
const TURNS_BEFORE_DEVICE: u32 = 4;

/// A device takes its time when its answers come after so long: twice what a wake-up costs.
const DEVICE_IS_SLOW: Duration = Duration::from_micros(15);

/// A wait for a device counts for no more than this.
const DEVICE_WAIT_MAX: Duration = Duration::from_millis(1);

/// The mean is one of about so many waits.
const WAITS_REMEMBERED: u32 = 8;

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
    /// The same, of the first look that found the kernel at work; sleeping does not end it.
    waiting_since: Option<Instant>,
    /// How long the worker waited for the kernel of late: the mean, in which a wait that something
    /// else ended (a frame, another request) counts as none. Long when there is nothing but a slow
    /// device to wait for, and little is lost by sleeping.
    device_wait: Duration,
}

impl Idle {
    /// A worker that just had work.
    pub(crate) fn new(policy: IdlePolicy) -> Idle {
        Idle {
            policy,
            empty_turns: 0,
            idle_since: None,
            waiting_since: None,
            device_wait: Duration::ZERO,
        }
    }

    /// A turn is over. Whether to park now.
    #[inline]
    pub(crate) fn after(&mut self, turn: Turn) -> bool {
        if turn.work > 0 {
            if let Some(since) = self.waiting_since.take() {
                self.learn(since.elapsed(), turn.finished > 0);
            }
            self.empty_turns = 0;
            self.idle_since = None;
            return false;
        }
        core::hint::spin_loop();
        match self.policy {
            IdlePolicy::Spin => false,
            IdlePolicy::Interrupt => true,
            IdlePolicy::Adaptive => self.adaptive(turn.waits),
        }
    }

    /// A wait of this length was over, by an answer of the device or by something else.
    fn learn(&mut self, waited: Duration, by_device: bool) {
        let waited = if by_device {
            waited.min(DEVICE_WAIT_MAX)
        } else {
            Duration::ZERO
        };
        self.device_wait = (self.device_wait * (WAITS_REMEMBERED - 1) + waited) / WAITS_REMEMBERED;
    }

    fn adaptive(&mut self, waits: bool) -> bool {
        self.empty_turns = self.empty_turns.wrapping_add(1);
        if waits && self.device_wait >= DEVICE_IS_SLOW && self.empty_turns >= TURNS_BEFORE_DEVICE {
            self.waiting_since.get_or_insert_with(Instant::now);
            return true;
        }
        if !self.empty_turns.is_multiple_of(TURNS_PER_LOOK) {
            return false;
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        if waits {
            self.waiting_since.get_or_insert(since);
        }
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

    const EMPTY: Turn = Turn {
        work: 0,
        finished: 0,
        waits: false,
    };
    const WAITS: Turn = Turn {
        work: 0,
        finished: 0,
        waits: true,
    };

    fn work(finished: usize) -> Turn {
        Turn {
            work: 1,
            finished,
            waits: false,
        }
    }

    /// How long it polls before it parks, when all turns are like this one.
    fn patience(idle: &mut Idle, turn: Turn) -> Duration {
        let start = Instant::now();
        let deadline = start + Duration::from_secs(10);
        while !idle.after(turn) {
            assert!(Instant::now() < deadline, "never parks");
        }
        start.elapsed()
    }

    /// A wait of 200 µs that a turn like this one ends.
    fn wait(idle: &mut Idle, end: Turn) {
        idle.waiting_since = Instant::now().checked_sub(Duration::from_micros(200));
        assert!(!idle.after(end));
    }

    #[test]
    fn spin_never_parks_and_interrupt_parks_at_once() {
        let mut spin = Idle::new(IdlePolicy::Spin);
        assert!((0..100_000).all(|_| !spin.after(EMPTY) && !spin.after(WAITS)));
        let mut interrupt = Idle::new(IdlePolicy::Interrupt);
        assert!(!interrupt.after(work(0)));
        assert!(interrupt.after(EMPTY));
    }

    #[test]
    fn adaptive_parks_only_after_its_time_without_work() {
        let mut idle = Idle::new(IdlePolicy::Adaptive);
        assert!(patience(&mut idle, EMPTY) >= SPIN_BEFORE_PARK);
        idle.woke();
        assert!(!idle.after(EMPTY), "polls again after it woke");
        // A device of which nothing is known is polled for.
        idle.after(work(1));
        assert!(patience(&mut idle, WAITS) >= SPIN_BEFORE_PARK);
    }

    #[test]
    fn adaptive_sleeps_soon_when_a_slow_device_is_all_that_it_waits_for() {
        let mut idle = Idle::new(IdlePolicy::Adaptive);
        (0..WAITS_REMEMBERED).for_each(|_| wait(&mut idle, work(1)));
        assert!(idle.device_wait >= DEVICE_IS_SLOW);
        // The thread may be held up at any time, so the shortest of many.
        let shortest = |idle: &mut Idle, turn| {
            let measure = |_| {
                idle.woke();
                patience(idle, turn)
            };
            (0..50).map(measure).min()
        };
        assert!(shortest(&mut idle, WAITS) < Some(SPIN_BEFORE_PARK));
        assert!(shortest(&mut idle, EMPTY) >= Some(SPIN_BEFORE_PARK));
        // It sleeps through its wait, and learns from it all the same.
        assert!(idle.waiting_since.is_some());
        // Frames come while the device works: they are polled for.
        (0..3 * WAITS_REMEMBERED).for_each(|_| wait(&mut idle, work(0)));
        assert!(shortest(&mut idle, WAITS) >= Some(SPIN_BEFORE_PARK));
    }
}
