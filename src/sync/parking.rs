//! `Parking`: who sleeps, and who must wake it. A worker sleeps on its mailbox, the thread of a
//! qcow2 image on its queues; a loom model in `engine/mailbox.rs` checks it.

use super::{AtomicBool, Ordering, fence};

/// Who sleeps, and who must wake it.
#[derive(Debug)]
pub(crate) struct Parking {
    parked: AtomicBool,
}

impl Parking {
    /// Awake.
    pub(crate) fn new() -> Parking {
        Parking {
            parked: AtomicBool::new(false),
        }
    }

    /// Consumer: announces sleep. Everything that could hold work must be looked at once more
    /// after this and before sleeping.
    pub(crate) fn announce(&self) {
        self.parked.store(true, Ordering::Relaxed);
        // Orders the announcement before the last look at the queue. Pairs with the fence in
        // `must_wake`: either the producer sees `parked`, or we see its message. Without it both
        // could read the old value, and the message would wait for the next kick.
        fence(Ordering::SeqCst);
    }

    /// Consumer: awake again.
    pub(crate) fn awake(&self) {
        self.parked.store(false, Ordering::Relaxed);
    }

    /// Whoever wants to know it: whether the consumer sleeps, or is about to.
    pub(crate) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed)
    }

    /// Producer, after its message is in the queue: whether the consumer has to be woken.
    pub(crate) fn must_wake(&self) -> bool {
        // Orders the message before the look at `parked`; pairs with the fence in `announce`.
        fence(Ordering::SeqCst);
        self.parked.load(Ordering::Relaxed)
    }
}
