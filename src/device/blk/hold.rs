//! Requests that wait for space: what a full disk does not take is tried again every second.
//!
//! They stay in flight, in their slots; everything else goes on beside them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::request::Request;
use super::slots::Slot;

/// Between two attempts.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

// Error numbers; the same on every Linux.
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

/// The requests of a queue that wait for space.
#[derive(Debug)]
pub(super) struct Held {
    /// Whether there are any to be.
    on: bool,
    /// Slots whose request waits for the next attempt.
    waiting: VecDeque<u16>,
    /// Requests that have waited and are not answered; those that are being tried again too.
    count: u64,
    /// When the first of them began to wait.
    since: Instant,
    /// When all that wait are tried again.
    due: Instant,
    /// Those that were answered with an error, since then.
    failed: u64,
}

impl Held {
    /// No request waits, at most `slots` can.
    pub(super) fn new(on: bool, slots: u16) -> Held {
        let now = Instant::now();
        let room = if on { usize::from(slots) } else { 0 };
        Held {
            on,
            waiting: VecDeque::with_capacity(room),
            count: 0,
            since: now,
            due: now,
            failed: 0,
        }
    }

    /// Whether the request in `slot`, which failed with `errno`, is to wait. A flush is not: the
    /// kernel tells of data that it could not write once, and the next flush would succeed.
    pub(super) fn takes(&self, errno: i32, slot: &Slot) -> bool {
        let writes = match slot.request {
            Request::Out { .. } => true,
            Request::WriteZeroes => slot.ranges.next < slot.ranges.list.len(),
            Request::In { .. } | Request::Flush | Request::GetId | Request::Discard => false,
        };
        self.on && writes && matches!(errno, ENOSPC | EDQUOT)
    }

    /// Takes the request in `slot`, which has this index.
    pub(super) fn put(&mut self, index: u16, slot: &mut Slot, label: &str) {
        if self.waiting.is_empty() {
            let now = Instant::now();
            self.due = now + AGAIN_AFTER;
            if self.count == 0 {
                self.since = now;
                self.failed = 0;
                tracing::warn!(
                    "{label}: no space left: what can't be written waits, and is tried again every \
                     {AGAIN_AFTER:?}"
                );
            }
        }
        self.count += u64::from(!slot.held);
        slot.held = true;
        self.waiting.push_back(index);
    }

    /// A request that waited was answered.
    pub(super) fn answered(&mut self, ok: bool, label: &str) {
        self.count -= 1;
        self.failed += u64::from(!ok);
        if self.count == 0 {
            let (seconds, failed) = (self.since.elapsed().as_secs(), self.failed);
            tracing::info!(
                "{label}: nothing waits for space any more, after {seconds} s; {failed} of it \
                 failed"
            );
        }
    }

    /// Requests that have waited and are not answered.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// When those that wait are tried again, if any do.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then_some(self.due)
    }

    /// Whether they are to be tried again at `now`.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due().is_some_and(|due| due <= now)
    }

    /// How many to [`Held::take`].
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The next one to be tried again.
    pub(super) fn take(&mut self) -> Option<u16> {
        self.waiting.pop_front()
    }

    /// None waits from now on: those that do are tried once more, at once.
    pub(super) fn end(&mut self) {
        if self.on {
            self.on = false;
            self.due = Instant::now();
        }
    }
}
