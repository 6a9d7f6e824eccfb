//! What a request queue does about a disk that is full or slow.

use std::time::{Duration, Instant};

use crate::sync::Counter;

use super::config::BlkCounters;
use super::hold::Held;
use super::overdue::Overdue;
use super::slots::Slots;

/// Polls between two looks at the clock: few enough for deadlines of some milliseconds, too many
/// for the clock to cost anything.
const POLLS: u32 = 1024;

/// What is done about a disk that is full or slow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SickPolicy {
    /// What finds no space waits for it, instead of failing.
    pub hold: bool,
    /// What is in flight for longer is told of.
    pub io_timeout: Option<Duration>,
}

/// One queue's.
#[derive(Debug)]
pub(super) struct Sick {
    /// For log lines.
    pub(super) label: String,
    pub(super) held: Held,
    overdue: Option<Overdue>,
    /// Polls until the clock is looked at.
    polls: u32,
    /// What the counters' times count from.
    born: Instant,
}

impl Sick {
    /// For a queue of `slots` slots. `born` is what times are counted from.
    pub(super) fn new(policy: SickPolicy, slots: u16, label: String, born: Instant) -> Sick {
        let overdue = policy.io_timeout;
        Sick {
            label,
            held: Held::new(policy.hold, slots),
            overdue: overdue.map(|timeout| Overdue::new(timeout, slots)),
            polls: POLLS,
            born,
        }
    }

    /// A turn begins: whether to look at the clock in it.
    #[inline]
    pub(super) fn looks(&mut self) -> bool {
        self.polls = self.polls.saturating_sub(1);
        self.polls == 0
    }

    /// Looks for what takes too long, if it is time. Whether what waits for space is to be tried
    /// again.
    pub(super) fn look(&mut self, slots: &Slots, counters: &BlkCounters) -> bool {
        self.polls = POLLS;
        if slots.in_flight() == 0 {
            counters.oldest.set(0);
            return false;
        }
        let now = Instant::now();
        if let Some(overdue) = &mut self.overdue
            && overdue.next() <= now
        {
            let found = overdue.look(now, slots, &self.label);
            counters.timeouts.add(found.late);
            let oldest = found.oldest.map(|since| stamp(since, self.born));
            counters.oldest.set(oldest.unwrap_or(0));
        }
        self.held.is_due(now)
    }

    /// When the next look must be; whoever asks sleeps until then, and looks at once.
    pub(super) fn due(&mut self, slots: &Slots, counters: &BlkCounters) -> Option<Instant> {
        if slots.in_flight() == 0 {
            if counters.oldest.get() != 0 {
                counters.oldest.set(0);
            }
            return None;
        }
        self.polls = 1;
        let overdue = self.overdue.as_ref().map(Overdue::next);
        [self.held.due(), overdue].into_iter().flatten().min()
    }

    /// The queue stops: nothing waits any more.
    pub(super) fn end(&mut self) {
        self.held.end();
        self.polls = 1;
    }
}

/// Milliseconds since `born`, and one: zero is no time.
fn stamp(time: Instant, born: Instant) -> u64 {
    let since = time.saturating_duration_since(born).as_millis();
    u64::try_from(since).unwrap_or(u64::MAX).saturating_add(1)
}

/// How many milliseconds ago it was what `counter` has of [`stamp`], 0 for none.
pub(super) fn age_ms(counter: &Counter, born: Instant) -> u64 {
    match counter.get() {
        0 => 0,
        then => stamp(Instant::now(), born).saturating_sub(then),
    }
}
