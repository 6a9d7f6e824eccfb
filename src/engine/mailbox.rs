//! Messages from control to a worker, and how a parked worker is woken.
//!
//! The queue is bounded and lock-free: many producers (a thread per session, the daemon), one
//! consumer. Replies travel the other way through one-shot channels; the worker never waits for
//! control. [`Parking`] is the part that a loom model checks.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use crossbeam::queue::ArrayQueue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::ring::Areas;
use crate::sync::parking::Parking;

use super::endpoint::Endpoint;
use super::telling::Telling;

/// Commands waiting at most. Each session has one outstanding, so this many sessions can ask one
/// worker at the same moment before any has to wait.
const COMMANDS_MAX: usize = 256;

/// What control asks of a worker. `slot` is the place of a vring in the worker's table, fixed when
/// the daemon starts.
#[derive(Debug)]
pub(crate) enum Command {
    /// Takes over a vring, built and checked by control.
    Start {
        slot: usize,
        endpoint: Endpoint,
        paused: bool,
        reply: Sender<Result<(), NotStarted>>,
    },
    /// Takes no new chain, finishes what is in flight, then gives the endpoint back.
    Stop {
        slot: usize,
        how: Leave,
        reply: Sender<Stopped>,
    },
    /// Calls a stop off; whether it was not too late for that.
    Stay { slot: usize, reply: Sender<bool> },
    /// A disabled vring is not processed in either direction; what lies on one that sends is
    /// dropped after a while.
    Pause {
        slot: usize,
        paused: bool,
        reply: Sender<()>,
    },
    /// Exchanges the call and err fds; the old ones come back to be closed by control.
    Call {
        slot: usize,
        fds: CallFds,
        reply: Sender<CallFds>,
    },
    /// Goes over to another memory table.
    Swap {
        slot: usize,
        ram: Arc<GuestRam>,
        areas: Areas,
        reply: Sender<Option<Retired>>,
    },
    /// Ends the worker's thread.
    Exit,
}

/// Where a vring is signalled.
#[derive(Debug, Default)]
pub(crate) struct CallFds {
    /// Used buffer notifications; `None` when the driver polls.
    pub(crate) call: Option<EventFd>,
    /// Told once when the ring breaks.
    pub(crate) err: Option<EventFd>,
}

/// What a vring that is stopped waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The end of all that is in flight.
    Drained,
    /// The end of what only this worker can finish; the rest goes with it to another one.
    Movable,
}

/// A stopped vring on its way back to control, where it is dropped or given to another worker.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// The 32-bit value for GET_VRING_BASE.
    pub(crate) base: u32,
    /// What the worker owned.
    pub(crate) endpoint: Endpoint,
    /// It was disabled.
    pub(crate) paused: bool,
}

/// A vring that a worker could not take over.
#[derive(Debug)]
pub(crate) struct NotStarted {
    /// Why.
    pub(crate) error: io::Error,
    /// As it came.
    pub(crate) endpoint: Endpoint,
}

/// An old memory table that nothing uses any more.
#[derive(Debug)]
#[expect(dead_code, reason = "held to be dropped off the polling core")]
pub(crate) struct Retired {
    /// Keeps the mappings until it is dropped, off the polling core.
    pub(crate) ram: Arc<GuestRam>,
    /// The ring's areas in it.
    pub(crate) areas: Areas,
}

/// The mailbox of one worker.
#[derive(Debug)]
pub(crate) struct Mailbox {
    queue: ArrayQueue<Command>,
    parking: Parking,
    telling: Telling,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the kernel has no eventfd to give.
    pub(crate) fn new() -> io::Result<Mailbox> {
        let flags = vmm_sys_util::eventfd::EFD_NONBLOCK | vmm_sys_util::eventfd::EFD_CLOEXEC;
        Ok(Mailbox {
            queue: ArrayQueue::new(COMMANDS_MAX),
            parking: Parking::new(),
            telling: Telling::default(),
            wake: EventFd::new(flags)?,
        })
    }

    /// Sends `command`; waits for room until `deadline`.
    ///
    /// # Errors
    /// The command, when there was no room in time.
    pub(crate) fn send(&self, command: Command, deadline: Instant) -> Result<(), Command> {
        let mut command = command;
        while let Err(back) = self.queue.push(command) {
            if Instant::now() >= deadline {
                return Err(back);
            }
            command = back;
            std::thread::sleep(Duration::from_micros(100));
        }
        self.nudge();
        Ok(())
    }

    /// Wakes the worker if it sleeps: something lies where it looks before it does.
    #[inline]
    pub(crate) fn nudge(&self) {
        if self.parking.must_wake() {
            // A saturated counter has woken the worker already.
            let _ = self.wake.write(1);
        }
    }

    /// Whether nothing waits: two plain loads.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The next command.
    pub(crate) fn receive(&self) -> Option<Command> {
        self.queue.pop()
    }

    /// The worker's side of parking.
    pub(crate) fn parking(&self) -> &Parking {
        &self.parking
    }

    /// What the worker tells a front-end.
    pub(crate) fn telling(&self) -> &Telling {
        &self.telling
    }

    /// What the worker sleeps on.
    pub(crate) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use crate::sync::parking::Parking;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};

    /// The queue is one relaxed counter, sleep is "would block for ever": a lost wake-up is a state
    /// where the worker sleeps, a message waits, and nobody wakes it.
    #[test]
    fn loom_a_message_never_waits_for_a_sleeping_worker() {
        loom::model(|| {
            let shared = Arc::new((Parking::new(), AtomicUsize::new(0), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let producer = loom::thread::spawn(move || {
                let (parking, queue, wake) = &*other;
                queue.store(1, Ordering::Relaxed);
                if parking.must_wake() {
                    wake.store(1, Ordering::Relaxed);
                }
            });
            let (parking, queue, wake) = &*shared;
            parking.announce();
            let sleeps = queue.load(Ordering::Relaxed) == 0;
            producer.join().unwrap();
            assert!(
                !sleeps || wake.load(Ordering::Relaxed) == 1,
                "asleep with a message waiting"
            );
            parking.awake();
        });
    }
}
