//! Requests that take too long: noticed, counted and shown, not given up.
//!
//! Nothing is noted when a request begins. A look at all slots, now and then, finds those whose
//! request was there at the look before: so what is told of a request's age is less than the truth
//! by up to the time between two looks, and costs nothing per request.

use std::time::{Duration, Instant};

use super::request::Request;
use super::slots::Slots;

/// Between two looks, at least and at most.
const LOOK_EVERY: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];
/// Looks within the time that a request may take.
const LOOKS: u32 = 8;
/// Between two log lines.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// What was in a slot at the last look.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    generation: u16,
    /// When it was first there; `None` when the slot was free.
    since: Option<Instant>,
    /// It has taken too long, which was counted.
    late: bool,
}

/// Looks for requests of a queue that take too long.
#[derive(Debug)]
pub(super) struct Overdue {
    timeout: Duration,
    every: Duration,
    next: Instant,
    seen: Box<[Seen]>,
    /// When the last line was logged.
    said: Option<Instant>,
    /// Requests that no line has told of.
    unsaid: u64,
}

/// What a look found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Since when the oldest request is there, as far as is known.
    pub(super) oldest: Option<Instant>,
    /// Requests that have taken too long since the last look.
    pub(super) late: u64,
}

impl Overdue {
    /// For a queue of `slots` slots whose requests should not take longer than `timeout`.
    pub(super) fn new(timeout: Duration, slots: u16) -> Overdue {
        let [least, most] = LOOK_EVERY;
        Overdue {
            timeout,
            every: (timeout / LOOKS).clamp(least, most),
            next: Instant::now(),
            seen: vec![Seen::default(); slots.into()].into(),
            said: None,
            unsaid: 0,
        }
    }

    /// When the next look is.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Looks at all slots.
    pub(super) fn look(&mut self, now: Instant, slots: &Slots, label: &str) -> Found {
        self.next = now + self.every;
        let mut found = Found {
            oldest: None,
            late: 0,
        };
        let mut oldest_request = Request::Flush;
        for (seen, (generation, request)) in self.seen.iter_mut().zip(slots.requests()) {
            let Some(request) = request else {
                seen.since = None;
                continue;
            };
            if seen.generation != generation || seen.since.is_none() {
                *seen = Seen {
                    generation,
                    since: Some(now),
                    late: false,
                };
            }
            let since = seen.since.unwrap_or(now);
            if found.oldest.is_none_or(|oldest| since < oldest) {
                found.oldest = Some(since);
                oldest_request = request;
            }
            if now - since >= self.timeout && !seen.late {
                seen.late = true;
                found.late += 1;
            }
        }
        self.unsaid += found.late;
        let may_say = self.said.is_none_or(|said| now - said >= SAY_EVERY);
        if let (1.., true, Some(oldest)) = (self.unsaid, may_say, found.oldest) {
            tracing::warn!(
                "{label}: {} in flight for longer than {:?}; the oldest, {}, for {:.1} s",
                counted(self.unsaid),
                self.timeout,
                described(oldest_request),
                (now - oldest).as_secs_f32(),
            );
            self.said = Some(now);
            self.unsaid = 0;
        }
        found
    }
}

fn counted(requests: u64) -> String {
    let plural = if requests == 1 { "" } else { "s" };
    format!("{requests} request{plural}")
}

fn described(request: Request) -> String {
    match request {
        Request::In { offset, bytes } => format!("a read of {bytes} bytes at {offset}"),
        Request::Out { offset, bytes } => format!("a write of {bytes} bytes at {offset}"),
        Request::Flush | Request::GetId => "a flush".into(),
        Request::Discard => "a discard".into(),
        Request::WriteZeroes => "zeroing".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use crate::ring::{ChainQueue, Popped, Split};
    use crate::testing::driver::{Buf, Driver, RingMemory, SplitDriver};

    #[test]
    fn a_request_is_late_once_and_a_new_one_in_its_slot_is_young() {
        let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
        let memory = RingMemory::new::<Split>(&ram, 0, 16);
        let mut driver = SplitDriver::new(&memory, false);
        let mut device = memory.device::<Split>(false);
        let mut chain = || {
            driver.add(&[Buf::readable(0x10_0000, 16)]).unwrap();
            driver.publish();
            let mut segments = crate::memory::Segments::with_capacity(4);
            match device.pop(&mut segments) {
                Ok(Popped::Chain(chain)) => chain.id,
                other => panic!("{other:?}"),
            }
        };
        let mut slots = Slots::new(4);
        let timeout = Duration::from_secs(8);
        let mut overdue = Overdue::new(timeout, 4);
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let found = |oldest: Option<u64>, late| Found {
            oldest: oldest.map(at),
            late,
        };
        let mut look = |slots: &Slots, seconds| overdue.look(at(seconds), slots, "test");
        assert_eq!(look(&slots, 0), found(None, 0));
        let (first, _) = slots.take(chain(), Request::Flush);
        assert_eq!(look(&slots, 1), found(Some(1), 0));
        let (second, _) = slots.take(chain(), Request::Flush);
        assert_eq!(look(&slots, 2), found(Some(1), 0));
        assert_eq!(look(&slots, 8), found(Some(1), 0));
        assert_eq!(look(&slots, 9), found(Some(1), 1));
        assert_eq!(look(&slots, 10), found(Some(1), 1));
        assert_eq!(look(&slots, 11), found(Some(1), 0), "told once each");
        slots.get(first).chain = None;
        slots.free(first);
        assert_eq!(look(&slots, 12), found(Some(2), 0));
        let (again, _) = slots.take(chain(), Request::Flush);
        assert_eq!(again, first, "the same slot");
        slots.get(second).chain = None;
        slots.free(second);
        assert_eq!(look(&slots, 13), found(Some(13), 0));
        assert_eq!(look(&slots, 21), found(Some(13), 1));
    }
}
