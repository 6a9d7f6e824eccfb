//! The thread of an image: takes operations from all queues, round after round.
//!
//! A round takes some operations of each queue, in their order. Reads are answered at once. Writes,
//! zeroes, discards and flushes are answered together at its end, when the tables are settled and,
//! if one of them asks for that, all of it is durable: the price of a barrier is shared by as many
//! operations as came meanwhile.
//!
//! Should the library panic, which a release build else ends for, the image is given up: nothing is
//! written any more, and every operation fails.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};

use crate::host::blk::Completion;
use crate::sync::{AtomicBool, Ordering, fence};
use crate::sys::qcow2::{Image, errno};
use crate::sys::spsc::{Consumer, Producer};

use super::map::{Users, after_clear};
use super::{Done, Job, Shared, Waker, What};

/// Operations of one queue in a round.
const ROUND: usize = 64;
/// How long the thread looks for work before it sleeps: as long as it takes to wake it.
const SPIN: Duration = Duration::from_micros(20);
/// How long clusters that go are waited for.
const WAIT_MAX: Duration = Duration::from_millis(50);
/// Errors are told this often at most.
const TELL_EVERY: Duration = Duration::from_secs(10);
const EIO: i32 = 5;

/// What the thread is told.
pub(super) enum Command {
    /// There is another queue.
    Add(Lane),
    /// A queue may be gone; answered when nothing of it is under way.
    Sweep(Sender<()>),
    /// The image is closed.
    Exit,
}

/// The thread's side of a queue.
pub(super) struct Lane {
    jobs: Consumer<Job>,
    done: Producer<Done>,
    users: Arc<Users>,
    gone: Arc<AtomicBool>,
    /// Whom to wake, and where a queue's next worker says that it is to be another.
    waker: Option<Waker>,
    wakers: Receiver<Waker>,
    /// Writes of this round that were done: answered at its end.
    acks: Vec<Ack>,
}

/// An operation that is done but for its answer.
struct Ack {
    job: Job,
    result: Result<u32, i32>,
}

impl Lane {
    pub(super) fn new(
        jobs: Consumer<Job>,
        done: Producer<Done>,
        users: Arc<Users>,
        gone: Arc<AtomicBool>,
        wakers: Receiver<Waker>,
    ) -> Lane {
        Lane {
            jobs,
            done,
            users,
            gone,
            waker: None,
            wakers,
            acks: Vec::with_capacity(ROUND),
        }
    }

    /// Wakes the worker that serves the queue now.
    fn wake(&mut self) {
        // Orders what we have answered before the look at whom to tell of it. Pairs with the fence
        // of `Qcow2Disk::wakes`.
        fence(Ordering::SeqCst);
        self.waker = self.wakers.try_iter().last().or(self.waker.take());
        if let Some(waker) = &self.waker {
            (waker.0)();
        }
    }

    fn answer(&mut self, job: Job, result: Result<u32, i32>) {
        let completion = Completion {
            token: job.token,
            result,
        };
        // There is room for as many as can be under way.
        let _ = self.done.push(Done {
            completion,
            segments: job.segments,
        });
    }
}

fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Acquire)
}

/// What was done in a round.
#[derive(Default)]
struct Round {
    operations: usize,
    /// Tables may have changed.
    settle: bool,
    /// Somebody asked for durability.
    sync: bool,
    /// Clusters that could be read or written in the file from now on.
    touched: Vec<core::ops::Range<u64>>,
}

/// The image and the thread's own things.
pub(super) struct Server {
    name: String,
    /// `None` once it is given up.
    image: Option<Image>,
    shared: Arc<Shared>,
    inbox: Receiver<Command>,
    lanes: Vec<Lane>,
    /// Who may use places in the map, and whether that queue is gone.
    users: Vec<(Arc<Users>, Arc<AtomicBool>)>,
    round: Round,
    /// Tables could not be written, and are not in the file yet.
    unsettled: bool,
    told: Option<Instant>,
}

impl Server {
    pub(super) fn new(
        name: String,
        image: Image,
        shared: Arc<Shared>,
        inbox: Receiver<Command>,
    ) -> Server {
        Server {
            name,
            image: Some(image),
            shared,
            inbox,
            lanes: Vec::new(),
            users: Vec::new(),
            round: Round::default(),
            unsettled: false,
            told: None,
        }
    }

    /// The thread's life.
    pub(super) fn run(mut self) {
        crate::sys::panics::caught_here();
        // A worker waits for what it has this thread do.
        crate::sys::patience::never_wait();
        let mut busy = Instant::now();
        loop {
            if !self.obey() {
                break;
            }
            if self.turn() {
                busy = Instant::now();
            } else if busy.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep();
                busy = Instant::now();
            }
        }
        self.close();
    }

    /// Sleeps until somebody has something.
    fn sleep(&mut self) {
        self.shared.parking.announce();
        let idle = self.inbox.is_empty() && self.lanes.iter_mut().all(|l| l.jobs.is_empty());
        if idle {
            std::thread::park();
        }
        self.shared.parking.awake();
    }

    /// Does what it is told; whether it goes on.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Add(lane) => {
                    let gone = Arc::clone(&lane.gone);
                    self.users.push((Arc::clone(&lane.users), gone));
                    self.lanes.push(lane);
                }
                Command::Sweep(reply) => {
                    self.lanes.retain(|lane| !is_set(&lane.gone));
                    self.users.retain(|(_, gone)| !is_set(gone));
                    // Whoever does not wait has gone.
                    let _ = reply.send(());
                }
                Command::Exit => return false,
            }
        }
        true
    }

    /// One round; whether there was anything to do.
    fn turn(&mut self) -> bool {
        let mut lanes = core::mem::take(&mut self.lanes);
        for lane in &mut lanes {
            let mut reads = false;
            for _ in 0..ROUND {
                let Some(job) = lane.jobs.pop() else { break };
                self.round.operations += 1;
                let result = self.run_job(&job);
                if matches!(job.what, What::Read { .. }) {
                    lane.answer(job, result);
                    reads = true;
                } else {
                    lane.acks.push(Ack { job, result });
                }
            }
            if reads {
                lane.wake();
            }
        }
        self.lanes = lanes;
        if self.round.operations == 0 {
            return false;
        }
        self.end_round();
        true
    }

    fn settle(&mut self) -> Result<(), i32> {
        #[cfg(test)]
        if self.shared.is_stuck.load(Ordering::Relaxed) {
            return Err(EIO);
        }
        self.guarded(|image| image.settle())
    }

    /// Settles what was done, and answers.
    fn end_round(&mut self) {
        let sync = self.round.sync;
        let settle = self.round.settle || sync || self.unsettled;
        let settled = match settle {
            true => self.settle(),
            false => Ok(()),
        };
        self.unsettled = settled.is_err();
        let durable = match (settled, sync) {
            (Ok(()), true) => self.guarded(|image| image.sync()),
            (settled, _) => settled,
        };
        for lane in &mut self.lanes {
            let any = !lane.acks.is_empty();
            for ack in core::mem::take(&mut lane.acks) {
                let needs = match ack.job.what {
                    What::Flush | What::Write { durable: true, .. } => durable,
                    _ => settled,
                };
                lane.answer(ack.job, needs.and(ack.result));
            }
            if any {
                lane.wake();
            }
        }
        let touched = core::mem::take(&mut self.round.touched);
        if settled.is_ok() {
            self.tell_places(&touched);
        }
        self.round = Round {
            touched,
            ..Round::default()
        };
        self.round.touched.clear();
    }

    /// Lets workers read and write by themselves where clusters stay where they are: what says so
    /// is in the file.
    fn tell_places(&mut self, touched: &[core::ops::Range<u64>]) {
        let shared = Arc::clone(&self.shared);
        for cluster in touched.iter().cloned().flatten() {
            if shared.map.knows(cluster) {
                continue;
            }
            let mut at = None;
            let looked = self.guarded(|image| {
                at = image.place(cluster << image.cluster_bits());
                Ok(())
            });
            if let (Ok(()), Some(at)) = (looked, at) {
                shared.map.set(cluster, at);
            }
        }
    }

    /// Does an operation; how many bytes, or why not.
    fn run_job(&mut self, job: &Job) -> Result<u32, i32> {
        let mut moved = 0;
        match job.what {
            What::Read { offset } => {
                self.guarded(|image| {
                    moved = image.read(offset, &job.segments)?;
                    Ok(())
                })?;
                self.touch(offset, moved as u64);
            }
            What::Write { offset, durable } => {
                self.round.settle = true;
                self.round.sync |= durable;
                self.guarded(|image| {
                    moved = image.write(offset, &job.segments)?;
                    Ok(())
                })?;
                self.touch(offset, moved as u64);
            }
            What::Flush => self.round.sync = true,
            What::Discard { offset, bytes } => {
                self.round.settle = true;
                // A hint, which need not be taken.
                if self.clear(offset, bytes.into()) {
                    self.guarded(|image| image.discard(offset, bytes.into()))?;
                }
                return Ok(bytes);
            }
            What::Zero {
                offset,
                bytes,
                unmap,
            } => {
                self.round.settle = true;
                // Clusters that are kept may still be written to by who does so at the same time.
                let unmap = self.clear(offset, bytes.into()) && unmap;
                self.guarded(|image| image.zero(offset, bytes.into(), unmap))?;
                return Ok(bytes);
            }
        }
        Ok(u32::try_from(moved).unwrap_or(u32::MAX))
    }

    fn touch(&mut self, offset: u64, bytes: u64) {
        let map = &self.shared.map;
        let clusters = map.clusters(offset, bytes);
        if clusters.clone().any(|cluster| !map.knows(cluster)) {
            self.round.touched.push(clusters);
        }
    }

    /// Takes the clusters of this range from the workers; whether nobody reads or writes them in
    /// the file any more. A queue that is not served does not come to an end with what it began.
    fn clear(&mut self, offset: u64, bytes: u64) -> bool {
        let shared = &self.shared;
        if !shared.map.clear(shared.map.clusters(offset, bytes)) {
            return true;
        }
        after_clear();
        let which = shared.which.load(Ordering::Relaxed);
        // What was not waited for before may use them too.
        if !self.is_unused(which ^ 1) {
            return false;
        }
        // Those that begin from now on are counted apart, so that the old ones come to an end.
        shared.which.store(which ^ 1, Ordering::Relaxed);
        let begun = Instant::now();
        while !self.is_unused(which) {
            if begun.elapsed() > WAIT_MAX {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    fn is_unused(&self, which: usize) -> bool {
        let unused =
            |(users, gone): &(Arc<Users>, Arc<AtomicBool>)| users.is_empty(which) || is_set(gone);
        self.users.iter().all(unused)
    }

    /// Runs the library: what it says, as an errno. If it panics, the image is given up.
    fn guarded(&mut self, run: impl FnOnce(&mut Image) -> io::Result<()>) -> Result<(), i32> {
        let Some(image) = &mut self.image else {
            return Err(EIO);
        };
        crate::sys::qcow2::begins_here();
        match catch_unwind(AssertUnwindSafe(|| run(image))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                if self.told.is_none_or(|told| told.elapsed() > TELL_EVERY) {
                    self.told = Some(Instant::now());
                    tracing::warn!("blk {}: its qcow2 image: {error}", self.name);
                }
                Err(errno(&error))
            }
            Err(_) => {
                tracing::error!(
                    "blk {}: the library panicked over its qcow2 image, which is given up: every \
                     request fails; qemu-img check says what there is to repair",
                    self.name
                );
                // Not dropped: that would write tables which may be wrong.
                core::mem::forget(self.image.take());
                // Nor do workers go on in a file whose flushes fail.
                self.shared.map.clear_all();
                self.shared.given_up.store(true, Ordering::Release);
                Err(EIO)
            }
        }
    }

    /// What was done is in the file, and durable.
    fn close(&mut self) {
        let closed = self.guarded(|image| image.settle());
        let closed = closed.and_then(|()| self.guarded(|image| image.sync()));
        if closed.is_err() && self.image.is_some() {
            tracing::error!("blk {}: its qcow2 image is not closed cleanly", self.name);
        }
        let _ = catch_unwind(AssertUnwindSafe(|| drop(self.image.take())));
    }
}
