//! `Qcow2Disk`: a qcow2 image, with a thread of its own that alone works on the image.
//!
//! What lies in clusters that are allocated already, and only the image itself has, the worker
//! reads and writes in the image's file, as in any other file, through its io_uring: the thread
//! tells where they are (`map`). All else goes to the thread by a ring: the first write of a
//! cluster, what comes from a backing file, zeroes, discards, durable writes and every flush
//! (`server`).
//!
//! A write that needed a cluster is answered when the image's tables say so in the file, so nothing
//! that was answered is lost with the process; a flush, when all of that is durable.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

use crossbeam::channel::{Sender, bounded, unbounded};

use crate::memory::{GuestRam, Segment};
use crate::sync::parking::Parking;
use crate::sync::{AtomicBool, AtomicUsize, Ordering, fence};
use crate::sys::disk::{DiskError, DiskFile, DiskOptions, DiskReason, IoOptions};
use crate::sys::panics;
use crate::sys::qcow2::Image;
use crate::sys::spsc::{Consumer, Producer, channel};
use crate::sys::uring::Uring;

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};
use super::uring::{self, UringDisk};

mod map;
mod server;
#[cfg(test)]
mod tests;

use map::{Map, Users};
use server::{Command, Lane, Server};

/// Segments that are passed to the thread without allocating: a request of the usual kind, cut
/// once.
const SEGMENTS_USUAL: usize = 132;

/// What the thread is asked to do.
#[derive(Debug, Clone, Copy)]
enum What {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
        durable: bool,
    },
    Flush,
    Discard {
        offset: u64,
        bytes: u32,
    },
    Zero {
        offset: u64,
        bytes: u32,
        unmap: bool,
    },
}

/// An operation on its way to the thread.
struct Job {
    token: Token,
    what: What,
    /// Of reads and writes. Comes back to be used again.
    segments: Vec<Segment>,
}

/// An operation on its way back.
struct Done {
    completion: Completion,
    segments: Vec<Segment>,
}

/// What the thread and the queues share.
#[derive(Debug)]
struct Shared {
    parking: Parking,
    /// Once it runs.
    thread: OnceLock<Thread>,
    map: Map,
    /// In which number of [`Users`] an operation is counted that begins now.
    which: AtomicUsize,
    given_up: AtomicBool,
    /// Tables can't be written.
    #[cfg(test)]
    is_stuck: AtomicBool,
}

impl Shared {
    /// Wakes the thread if it sleeps: something lies where it looks before it does.
    #[inline]
    fn nudge(&self) {
        if self.parking.must_wake()
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

/// Wakes the worker that serves a queue.
#[derive(Clone)]
pub struct Waker(pub Arc<dyn Fn() + Send + Sync>);

impl core::fmt::Debug for Waker {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Waker")
    }
}

/// An open image, and the thread that works on it. Settled, durable and closed when it is dropped.
#[derive(Debug)]
pub struct Qcow2Image {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    disk: Arc<DiskFile>,
    bytes: u64,
    cluster_bits: u32,
}

impl Qcow2Image {
    /// Opens the image `path` for the disk `name`, and starts its thread. What it stands on must
    /// lie in `backing_dir`; without that it may stand on nothing.
    ///
    /// # Errors
    /// [`DiskError`] names the file that is the reason, and the reason.
    pub fn open(
        name: &str,
        (path, backing_dir): (&Path, Option<&Path>),
        options: DiskOptions,
        io: IoOptions,
    ) -> Result<Qcow2Image, DiskError> {
        let failed = |doing| {
            move |error| DiskError {
                path: path.to_owned(),
                reason: DiskReason::Failed { doing, error },
            }
        };
        let thread_name = format!("qcow2-{name}");
        let opened = panics::caught_on(thread_name.clone(), || {
            crate::sys::qcow2::begins_here();
            Image::open((path, backing_dir), options, io)
        });
        let panicked = || {
            io::Error::other(
                "the library for qcow2 images panicked over it; qemu-img check says what there is \
                 to repair",
            )
        };
        let opened = opened.map_err(failed("thread"))?;
        let (image, disk) = opened.map_err(|_| failed("open")(panicked()))??;
        let (bytes, cluster_bits) = (image.bytes(), image.cluster_bits());
        let shared = Arc::new(Shared {
            parking: Parking::new(),
            thread: OnceLock::new(),
            map: Map::new(bytes, cluster_bits),
            which: AtomicUsize::new(0),
            given_up: AtomicBool::new(false),
            #[cfg(test)]
            is_stuck: AtomicBool::new(false),
        });
        let (commands, inbox) = unbounded();
        let server = Server::new(name.to_owned(), image, Arc::clone(&shared), inbox);
        let thread = std::thread::Builder::new()
            .name(thread_name)
            .spawn(move || server.run());
        let thread = thread.map_err(failed("thread"))?;
        let _ = shared.thread.set(thread.thread().clone());
        Ok(Qcow2Image {
            shared,
            commands,
            thread: Some(thread),
            disk,
            bytes,
            cluster_bits,
        })
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u32 {
        1 << self.cluster_bits
    }

    /// Whether the library has panicked over it, so that every request fails.
    pub fn is_given_up(&self) -> bool {
        self.shared.given_up.load(Ordering::Acquire)
    }

    /// What is asked of io_uring beside the usual.
    pub fn io(&self) -> IoOptions {
        self.disk.io()
    }

    /// One queue's access, with at most `in_flight` operations. Nobody is woken until
    /// [`Qcow2Disk::wakes`] says whom.
    pub fn queue(self: &Arc<Self>, in_flight: u16) -> Qcow2Disk {
        let places = usize::from(in_flight);
        let (to, jobs) = channel(places);
        let (done, from) = channel(places);
        let users = Arc::new(Users::new());
        let gone = Arc::new(AtomicBool::new(false));
        let (wakers, told) = unbounded();
        let lane = Lane::new(jobs, done, Arc::clone(&users), Arc::clone(&gone), told);
        // The thread ends with the image, so it is there.
        let _ = self.commands.send(Command::Add(lane));
        self.shared.nudge();
        let spare = (0..places).map(|_| Vec::with_capacity(SEGMENTS_USUAL));
        Qcow2Disk {
            file: UringDisk::without_syncs(Arc::clone(&self.disk)),
            rest: Rest {
                image: Arc::clone(self),
                to,
                from,
                users,
                gone,
                wakers,
                spare: spare.collect(),
                which: vec![0; places].into(),
                in_flight: 0,
            },
        }
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Exit);
        self.shared.nudge();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One queue's access to an image.
#[derive(Debug)]
pub struct Qcow2Disk {
    file: UringDisk,
    rest: Rest,
}

/// What there is beside the file.
struct Rest {
    image: Arc<Qcow2Image>,
    to: Producer<Job>,
    from: Consumer<Done>,
    users: Arc<Users>,
    gone: Arc<AtomicBool>,
    /// Says whom to wake.
    wakers: Sender<Waker>,
    /// Lists of segments that no job has.
    spare: Vec<Vec<Segment>>,
    /// By slot: in which number an operation in the file is counted.
    which: Box<[u8]>,
    /// Operations with the thread.
    in_flight: usize,
}

impl core::fmt::Debug for Rest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Rest")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Qcow2Disk {
    /// The file that the image is in.
    pub fn file(&self) -> &UringDisk {
        &self.file
    }

    /// Whether something is done that was not reaped, and of which the ring tells nothing.
    pub fn has_done(&mut self) -> bool {
        self.file.has_done() || !self.rest.from.is_empty()
    }

    /// Has `waker` called when something is done from now on. What was done before is found by the
    /// next reap.
    pub fn wakes(&self, waker: Waker) {
        // The thread is there as long as the image, which we hold.
        let _ = self.rest.wakers.send(waker);
        // Orders the message before our next look at what is done. Pairs with the fence of
        // `Lane::wake`: either the thread wakes us, or we find what it has done.
        fence(Ordering::SeqCst);
    }

    /// Registers with the worker's ring.
    ///
    /// # Errors
    /// As [`UringDisk::attach`].
    pub fn attach(&mut self, ring: &mut Uring, in_flight: usize) -> io::Result<()> {
        self.file.attach(ring, in_flight)
    }

    /// Takes everything out of the ring; nothing may be in flight.
    pub fn detach(&mut self, ring: &mut Uring) {
        self.file.detach(ring);
    }

    /// As [`UringDisk::pin`].
    pub fn pin(&self, ring: &mut Uring, ram: &GuestRam) {
        self.file.pin(ring, ram);
    }

    /// As [`UringDisk::unpin`].
    pub fn unpin(&self, ring: &mut Uring, ram: &GuestRam) {
        self.file.unpin(ring, ram);
    }

    /// The disk for one turn.
    pub fn lend<'a>(&'a mut self, ring: &'a mut Uring) -> Lent<'a> {
        Lent {
            file: self.file.lend(ring),
            rest: &mut self.rest,
        }
    }
}

impl Rest {
    /// Hands an operation to the thread.
    fn send(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let (what, from) = match op {
            BlkOp::Read { offset, segments } => (What::Read { offset }, segments),
            BlkOp::Write {
                offset,
                segments,
                durable,
            } => (What::Write { offset, durable }, segments),
            BlkOp::Flush => (What::Flush, &[][..]),
            BlkOp::Discard { offset, bytes } => (What::Discard { offset, bytes }, &[][..]),
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => {
                let what = What::Zero {
                    offset,
                    bytes,
                    unmap,
                };
                (what, &[][..])
            }
        };
        let mut segments = self.spare.pop().ok_or(Full)?;
        segments.clear();
        segments.extend_from_slice(from);
        let job = Job {
            token,
            what,
            segments,
        };
        if let Err(job) = self.to.push(job) {
            self.spare.push(job.segments);
            return Err(Full);
        }
        self.in_flight += 1;
        self.image.shared.nudge();
        Ok(())
    }

    fn reap(&mut self) -> Option<Completion> {
        let done = self.from.pop()?;
        self.spare.push(done.segments);
        self.in_flight -= 1;
        Some(done.completion)
    }

    /// Counts the operation in `token` as one in the file, and says where it is there; `None` when
    /// the thread has to do it.
    #[inline]
    fn enter(&mut self, token: Token, offset: u64, segments: &[Segment]) -> Option<u64> {
        let shared = &self.image.shared;
        let bytes: usize = segments.iter().map(Segment::len).sum();
        let which = shared.which.load(Ordering::Relaxed) & 1;
        self.users.enter(which);
        let found = shared.map.find(offset, bytes as u64);
        match found {
            Some(_) => self.which[usize::from(token.slot)] = u8::from(which == 1),
            None => self.users.leave(which),
        }
        found
    }

    #[inline]
    fn leave(&self, token: Token) {
        self.users
            .leave(usize::from(self.which[usize::from(token.slot)]));
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Release);
        // The thread may be writing to the guest's memory, which goes after us.
        let (reply, seen) = bounded(1);
        let _ = self.image.commands.send(Command::Sweep(reply));
        self.image.shared.nudge();
        if self.in_flight > 0 {
            let _ = seen.recv();
        }
    }
}

/// A queue's disk and the worker's ring, together for one turn.
#[derive(Debug)]
pub struct Lent<'a> {
    file: uring::Lent<'a>,
    rest: &'a mut Rest,
}

impl BlkIo for Lent<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let (BlkOp::Read { offset, segments }
        | BlkOp::Write {
            offset,
            segments,
            durable: false,
        }) = op
        else {
            return self.rest.send(token, op);
        };
        let Some(offset) = self.rest.enter(token, offset, segments) else {
            return self.rest.send(token, op);
        };
        let there = match op {
            BlkOp::Read { .. } => BlkOp::Read { offset, segments },
            _ => BlkOp::Write {
                offset,
                segments,
                durable: false,
            },
        };
        let submitted = self.file.submit(token, there);
        if submitted.is_err() {
            self.rest.leave(token);
        }
        submitted
    }

    fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.rest.reap() {
            return Some(completion);
        }
        let completion = self.file.reap()?;
        self.rest.leave(completion.token);
        Some(completion)
    }

    fn in_flight(&self) -> usize {
        self.file.in_flight() + self.rest.in_flight
    }
}
