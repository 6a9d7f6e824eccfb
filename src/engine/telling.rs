//! Telling the front-end: its call and err fds, which may turn out to block.
//!
//! Whether a write to an eventfd may sleep is a flag of the open file, which the front-end has too.
//! One that clears the flag and fills the counter would put the worker to sleep for ever, with all
//! devices that it serves. So a worker shows when it is telling (two plain stores, on a cache line
//! of its own), and a thread that looks at all workers now and then interrupts those that are. Only
//! a write that would sleep ends by that; an honest front-end's does not, so nobody waits for a
//! second look, between which an fd could be made to sleep and let go again and again. The worker
//! then tells nothing more for that device, whose session ends.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use crossbeam::utils::CachePadded;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sys::eventfd::{Told, tell};
use crate::sys::interrupt::Interruptible;

use super::mailbox::Mailbox;
use super::runner::{BlockingFd, FdKind};

/// Between two looks at most, while a worker is awake; and at least half of it, by chance, so that
/// nobody knows when to let a worker go on.
const LOOK_WITHIN: Duration = Duration::from_millis(20);
/// While all of them are parked, where nobody writes.
const LOOK_WITHIN_PARKED: Duration = Duration::from_millis(100);

/// Whether a worker is telling a front-end right now.
#[derive(Debug, Default)]
pub(crate) struct Telling {
    is_on: CachePadded<AtomicBool>,
    /// The worker's thread; 0 before it has begun.
    thread: AtomicI32,
}

impl Telling {
    /// On the worker's thread, before it serves anything.
    ///
    /// # Errors
    /// When the thread can't be interrupted.
    pub(crate) fn begin(&self) -> io::Result<()> {
        let thread = Interruptible::this_thread()?;
        self.thread.store(thread.id(), Ordering::Relaxed);
        Ok(())
    }

    #[inline]
    fn tell(&self, fd: &EventFd) -> Told {
        self.is_on.store(true, Ordering::Relaxed);
        let told = tell(fd);
        self.is_on.store(false, Ordering::Relaxed);
        told
    }

    /// Has the worker go on if it sleeps in a write. One that was about to is found again.
    fn look(&self) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let id = self.thread.load(Ordering::Relaxed);
        if id != 0 {
            Interruptible::of_id(id).interrupt();
        }
    }
}

/// Which fd of a device's front-end has blocked, until its session is over.
#[derive(Debug)]
pub(crate) struct Blocking {
    /// 0, or what [`word_of`] makes of it. The last one counts when there are several.
    fd: AtomicU32,
    /// Rung for the session's thread.
    bell: EventFd,
}

impl Blocking {
    /// None has.
    ///
    /// # Errors
    /// When the kernel has no eventfd to give.
    pub(crate) fn new() -> io::Result<Blocking> {
        Ok(Blocking {
            fd: AtomicU32::new(0),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Readable after one has blocked, until [`Blocking::forget`].
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// The one that has.
    pub(super) fn find(&self) -> Option<BlockingFd> {
        fd_of(self.fd.load(Ordering::Acquire))
    }

    /// The session is over, and its vrings are stopped.
    pub(super) fn forget(&self) -> Option<BlockingFd> {
        let found = self.find();
        self.fd.store(0, Ordering::Release);
        let _ = self.bell.read();
        found
    }

    #[cold]
    fn report(&self, fd: BlockingFd) {
        self.fd.store(word_of(fd), Ordering::Release);
        // Ours, and never full.
        let _ = self.bell.write(1);
    }
}

/// `fd` in a word that is not 0.
fn word_of(fd: BlockingFd) -> u32 {
    let kind = match fd.kind {
        FdKind::Call => 0,
        FdKind::Err => 1,
    };
    1 + u32::from(fd.vring) * 2 + kind
}

fn fd_of(word: u32) -> Option<BlockingFd> {
    let word = word.checked_sub(1)?;
    Some(BlockingFd {
        vring: u16::try_from(word / 2).unwrap_or(u16::MAX),
        kind: if word % 2 == 0 {
            FdKind::Call
        } else {
            FdKind::Err
        },
    })
}

/// How a vring tells its front-end.
#[derive(Debug)]
pub(crate) struct Teller {
    vring: u16,
    /// Of the worker that serves it.
    worker: Option<Arc<Mailbox>>,
    /// Of its device.
    blocking: Arc<Blocking>,
    /// Nothing is told any more: one of the session's fds has blocked.
    is_mute: bool,
}

impl Teller {
    /// Of vring number `vring` of the device of `blocking`.
    pub(crate) fn new(vring: u16, blocking: Arc<Blocking>) -> Teller {
        Teller {
            vring,
            worker: None,
            blocking,
            is_mute: false,
        }
    }

    /// From now on the worker of `mailbox` serves the vring.
    pub(crate) fn served_by(&mut self, mailbox: &Arc<Mailbox>) {
        self.worker = Some(Arc::clone(mailbox));
    }

    /// Adds 1 to the counter of `fd`, which is of this kind; `None` when nothing is told any more.
    #[inline]
    pub(crate) fn tell(&mut self, fd: &EventFd, kind: FdKind) -> Option<Told> {
        // All fds of the session may be made like this one, and each would cost a look.
        self.is_mute |= self.blocking.fd.load(Ordering::Relaxed) != 0;
        let worker = self.worker.as_ref().filter(|_| !self.is_mute)?;
        let told = worker.telling().tell(fd);
        if told == Told::Interrupted {
            self.is_mute = true;
            let vring = self.vring;
            self.blocking.report(BlockingFd { vring, kind });
        }
        Some(told)
    }
}

/// The thread that looks at the workers. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Watch {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to look at the workers of these mailboxes.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn begin(workers: Vec<Arc<Mailbox>>) -> io::Result<Watch> {
        let (end, ended) = bounded(1);
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || watch(&workers, &ended))?;
        Ok(Watch {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(workers: &[Arc<Mailbox>], ended: &Receiver<()>) {
    let chance = RandomState::new();
    for number in 0u64.. {
        let parked = workers.iter().all(|worker| worker.parking().is_parked());
        let within = if parked {
            LOOK_WITHIN_PARKED
        } else {
            LOOK_WITHIN
        };
        if ended.recv_timeout(some_of(within, chance.hash_one(number)))
            != Err(RecvTimeoutError::Timeout)
        {
            return;
        }
        workers.iter().for_each(|worker| worker.telling().look());
    }
}

/// Half of `time` to all of it.
fn some_of(time: Duration, chance: u64) -> Duration {
    let half = time / 2;
    let micros = u64::try_from(half.as_micros()).unwrap_or(u64::MAX);
    half + Duration::from_micros(chance % micros.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_comes_in_the_second_half_of_its_time() {
        let time = LOOK_WITHIN;
        for chance in [0, 1, 9_999, 10_000, u64::MAX] {
            let some = some_of(time, chance);
            assert!(some >= time / 2 && some < time, "{some:?}");
        }
    }

    #[test]
    fn a_word_names_every_fd_of_every_vring() {
        assert_eq!(fd_of(0), None);
        for vring in [0, 1, 2, 255, u16::MAX] {
            for kind in [FdKind::Call, FdKind::Err] {
                let fd = BlockingFd { vring, kind };
                assert_eq!(fd_of(word_of(fd)), Some(fd));
            }
        }
    }
}
