//! `Uring`: one io_uring for all disks of a worker, made and used by the worker's thread alone.
//!
//! Several *clients* (disk queues) share the ring; completions are sorted back to them. Operations
//! are queued by `submit`, and `enter` makes one system call for all that are queued; some go
//! before, so that a device is not without work until then. See io_uring(7).
//!
//! The segments of an operation must stay mapped until its completion was reaped; the client's
//! owner keeps the memory table that long. The lists of segments are copied into storage that
//! lives until the kernel has read them, at `enter`; nothing is allocated after set-up.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::memory::Segment;

mod buffers;
mod polled;

use buffers::Buffers;
use polled::Polled;
pub use polled::probe as probe_iopoll;

/// Operations queued between two system calls at most.
const SUBMISSIONS: u32 = 256;
/// Operations in flight at most.
const IN_FLIGHT_MAX: usize = 4096;
/// Files registered at most.
const FILES_MAX: u32 = 1024;
/// Segments of all operations queued between two system calls at most: many, and at least one
/// operation's.
const SEGMENTS_QUEUED: usize = 16 * SEGMENTS_PER_OPERATION;
/// Segments that readv(2) takes (IOV_MAX). With more, an operation does only the first.
const SEGMENTS_PER_OPERATION: usize = 1024;
/// Operations that are worth a system call of their own.
const HANDED_OVER_MIN: usize = 2;
/// After so many milliseconds without work the kernel's own thread sleeps (SQPOLL).
const SQPOLL_IDLE_MS: u32 = 1000;
/// linux/blkdev.h: `_IO(0x12, 0)`.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;
/// How long a ring that is dropped waits for its operations.
const DROP_WITHIN: Duration = Duration::from_secs(5);

/// Says what is missing: the ring's memory counts as locked memory.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => io::Error::new(
            error.kind(),
            "io_uring: too little memory may be locked: \
             raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) or give CAP_IPC_LOCK",
        ),
        _ => io::Error::new(error.kind(), format!("io_uring: {error}")),
    }
}

/// How fallocate(2) zeroes a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// The space behind it is given back.
    Punch,
    /// The space stays allocated.
    Keep,
}

/// What the kernel is to do; `file` is what [`Uring::add_file`] gave.
#[derive(Debug, Clone, Copy)]
pub enum UringOp<'a> {
    /// readv(2) at an offset.
    Read {
        /// Which file.
        file: u32,
        /// First byte.
        offset: u64,
        /// Where to.
        segments: &'a [Segment],
    },
    /// writev(2) at an offset.
    Write {
        /// Which file.
        file: u32,
        /// First byte.
        offset: u64,
        /// Where from.
        segments: &'a [Segment],
        /// Complete only when durable (RWF_DSYNC).
        durable: bool,
    },
    /// fdatasync(2).
    Sync {
        /// Which file.
        file: u32,
    },
    /// fallocate(2), the size of the file kept.
    Zero {
        /// Which file.
        file: u32,
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u32,
        /// With or without the space behind it.
        how: Zero,
    },
    /// What BLKDISCARD does, for block devices. Completes with 0; refused by kernels before 6.12.
    Discard {
        /// Which file.
        file: u32,
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u32,
    },
    /// Nothing: completes with 0.
    Nothing,
}

/// Names a client of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientId(usize);

#[derive(Debug, Default)]
struct Client {
    used: bool,
    in_flight: usize,
    done: VecDeque<(u64, i32)>,
}

/// An operation in flight.
#[derive(Debug, Default, Clone, Copy)]
struct Operation {
    client: usize,
    /// What the client calls it.
    tag: u64,
}

/// What a place for a file is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Free,
    /// A file.
    File,
    /// A file whose reads and writes are polled for.
    Polled,
}

/// A kernel ring and who waits for what in it.
pub struct Uring {
    ring: IoUring,
    /// A thread of the kernel takes what is queued (SQPOLL).
    has_thread: bool,
    /// For files whose reads and writes are polled for; made for the first of them.
    polled: Option<Polled>,
    /// Registered memory.
    buffers: Buffers,
    /// Told by the kernel when something completes: what a sleeping worker waits for.
    completed: EventFd,
    clients: Vec<Client>,
    operations: Box<[Operation]>,
    /// The lists of queued operations, one behind the other. Never grows, so that addresses in it
    /// stay; emptied when the kernel has taken all of them.
    lists: Vec<Segment>,
    free: Vec<u32>,
    files: Vec<Place>,
    /// In both rings.
    in_flight: usize,
}

impl core::fmt::Debug for Uring {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl AsRawFd for Uring {
    /// The eventfd that is written at each completion.
    fn as_raw_fd(&self) -> RawFd {
        self.completed.as_raw_fd()
    }
}

impl Uring {
    /// A ring for the calling thread, with the newest set-up that the kernel takes.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<Uring> {
        let ring = Uring::build(|b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag();
        })
        .or_else(|_| {
            Uring::build(|b| {
                b.setup_coop_taskrun().setup_taskrun_flag();
            })
        })
        .or_else(|_| Uring::build(|_| {}))
        .map_err(explain)?;
        Uring::over(ring)
    }

    /// As [`Uring::new`], with a thread of the kernel that takes what is queued (SQPOLL), so that
    /// under load there are no system calls; without, where the kernel refuses.
    ///
    /// # Errors
    /// As [`Uring::new`].
    pub fn with_thread() -> io::Result<Uring> {
        let ring = Uring::build(|b| {
            b.setup_sqpoll(SQPOLL_IDLE_MS).setup_single_issuer();
        })
        .or_else(|_| {
            Uring::build(|b| {
                b.setup_sqpoll(SQPOLL_IDLE_MS);
            })
        });
        match ring.and_then(Uring::over) {
            Ok(mut ring) => {
                ring.has_thread = true;
                Ok(ring)
            }
            Err(error) => {
                tracing::warn!(%error, "sqpoll: not here, so the worker makes the system calls");
                Uring::new()
            }
        }
    }

    fn over(ring: IoUring) -> io::Result<Uring> {
        if !ring.params().is_feature_submit_stable() {
            return Err(io::Error::other(
                "the kernel's io_uring reads lists of buffers late: Linux 5.5 is needed",
            ));
        }
        let completed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(completed.as_raw_fd())?;
        ring.submitter().register_files_sparse(FILES_MAX)?;
        let count = u32::try_from(IN_FLIGHT_MAX).unwrap_or(u32::MAX);
        Ok(Uring {
            ring,
            has_thread: false,
            polled: None,
            buffers: Buffers::default(),
            completed,
            clients: Vec::new(),
            operations: vec![Operation::default(); IN_FLIGHT_MAX].into(),
            lists: Vec::with_capacity(SEGMENTS_QUEUED),
            free: (0..count).rev().collect(),
            files: vec![Place::Free; FILES_MAX as usize],
            in_flight: 0,
        })
    }

    fn build(set: impl Fn(&mut io_uring::Builder)) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder
            .setup_cqsize(u32::try_from(IN_FLIGHT_MAX).unwrap_or(u32::MAX))
            .setup_clamp();
        builder.setup_submit_all();
        set(&mut builder);
        builder.build(SUBMISSIONS)
    }

    /// A client that has at most `in_flight` operations at a time.
    pub fn add_client(&mut self, in_flight: usize) -> ClientId {
        let at = self
            .clients
            .iter()
            .position(|client| !client.used)
            .unwrap_or_else(|| {
                self.clients.push(Client::default());
                self.clients.len() - 1
            });
        let done = VecDeque::with_capacity(in_flight);
        self.clients[at] = Client {
            used: true,
            in_flight: 0,
            done,
        };
        ClientId(at)
    }

    /// Forgets a client, which must have nothing in flight.
    pub fn remove_client(&mut self, client: ClientId) {
        assert_eq!(
            self.clients[client.0].in_flight, 0,
            "the client waits for completions"
        );
        self.clients[client.0] = Client::default();
    }

    /// Registers a file; it stays open in the ring until it is removed.
    ///
    /// # Errors
    /// When all places are taken, or the kernel refuses the file.
    pub fn add_file(&mut self, file: &impl AsRawFd) -> io::Result<u32> {
        let at = self.files.iter().position(|place| *place == Place::Free);
        let at = at.and_then(|at| u32::try_from(at).ok()).ok_or_else(|| {
            io::Error::other(format!("all {FILES_MAX} files of the io_uring are in use"))
        })?;
        self.ring
            .submitter()
            .register_files_update(at, &[file.as_raw_fd()])?;
        self.files[at as usize] = Place::File;
        Ok(at)
    }

    /// As [`Uring::add_file`]; the device is polled for the completion of reads and of writes that
    /// need not be durable. [`probe_iopoll`] tells whether it can be.
    ///
    /// # Errors
    /// As [`Uring::add_file`], and when the kernel gives no second ring.
    pub fn add_polled_file(&mut self, file: &impl AsRawFd) -> io::Result<u32> {
        if self.polled.is_none() {
            self.polled = Some(Polled::new()?);
        }
        let at = self.add_file(file)?;
        if let Some(polled) = &self.polled {
            let submitter = polled.ring.submitter();
            if let Err(error) = submitter.register_files_update(at, &[file.as_raw_fd()]) {
                self.remove_file(at);
                return Err(error);
            }
        }
        self.files[at as usize] = Place::Polled;
        Ok(at)
    }

    /// Takes a file out of the ring.
    pub fn remove_file(&mut self, file: u32) {
        // The place is ours, so the kernel has no reason to refuse.
        let _ = self.ring.submitter().register_files_update(file, &[-1]);
        if let (Place::Polled, Some(polled)) = (self.files[file as usize], &self.polled) {
            let submitter = polled.ring.submitter();
            let _ = submitter.register_files_update(file, &[-1]);
        }
        self.files[file as usize] = Place::Free;
    }

    /// Registers memory, which is pinned with that: the kernel then need not look its pages up for
    /// each operation. It must be removed again before it is unmapped.
    ///
    /// # Errors
    /// When the limit of locked memory is reached, or the kernel can't pin it. What was registered
    /// until then is used; all of `memory` must be removed all the same.
    pub fn add_memory(&mut self, memory: &[Segment]) -> io::Result<()> {
        self.buffers.add(&self.ring, memory)
    }

    /// Takes memory out that was added.
    pub fn remove_memory(&mut self, memory: &[Segment]) {
        self.buffers.remove(&self.ring, memory);
    }

    /// Queues an operation for `client`, which calls it `tag`. `false`: no room now.
    #[must_use]
    pub fn submit(&mut self, client: ClientId, tag: u64, op: UringOp<'_>) -> bool {
        let polled = match op {
            UringOp::Read { file, .. } => self.files[file as usize] == Place::Polled,
            // Where there is more to it than the write, the device is not all that is waited for.
            UringOp::Write { file, durable, .. } => {
                !durable && self.files[file as usize] == Place::Polled
            }
            _ => false,
        };
        let ring = match &mut self.polled {
            Some(second) if polled => &mut second.ring,
            _ => &mut self.ring,
        };
        if ring.submission().is_full() {
            return false;
        }
        let Some(&index) = self.free.last() else {
            return false;
        };
        let segments = match op {
            UringOp::Read { segments, .. } | UringOp::Write { segments, .. } => segments,
            _ => &[],
        };
        let segments = &segments[..segments.len().min(SEGMENTS_PER_OPERATION)];
        let start = self.lists.len();
        if start + segments.len() > SEGMENTS_QUEUED {
            return false;
        }
        self.lists.extend_from_slice(segments);
        let fixed = match segments {
            [one] if !polled => self.buffers.find(one),
            _ => None,
        };
        // A segment is laid out as an iovec.
        let list = self.lists[start..].as_ptr().cast::<libc::iovec>();
        let count = u32::try_from(segments.len()).unwrap_or(u32::MAX);
        let entry = entry(op, list, count, fixed).user_data(u64::from(index));
        // SAFETY: the list of segments stays in `lists` until the kernel took the entry, which
        // copies it (IORING_FEAT_SUBMIT_STABLE); the buffers are mapped until the completion by the
        // caller's promise.
        if unsafe { ring.submission().push(&entry) }.is_err() {
            self.lists.truncate(start);
            return false;
        }
        let client = client.0;
        self.operations[index as usize] = Operation { client, tag };
        self.free.pop();
        if let (Some(second), true) = (&mut self.polled, polled) {
            second.in_flight += 1;
        }
        self.in_flight += 1;
        self.clients[client].in_flight += 1;
        if !polled && !self.has_thread {
            self.hand_over();
        }
        true
    }

    /// Hands what is queued to the kernel before the turn ends, once it is as much as the kernel
    /// still has: a device that runs dry begins with the first of many operations while the others
    /// are made ready, instead of standing still until all are.
    #[inline]
    fn hand_over(&mut self) {
        let queued = self.ring.submission().len();
        if queued < HANDED_OVER_MIN.max(self.in_flight - queued) {
            return;
        }
        // What it does not take now goes with the turn's own call.
        let _ = self.ring.submit();
        if self.is_taken() {
            self.lists.clear();
        }
    }

    /// The next finished operation of `client`: its tag, and bytes or a negative error number.
    #[inline]
    pub fn reap(&mut self, client: ClientId) -> Option<(u64, i32)> {
        let client = &mut self.clients[client.0];
        let done = client.done.pop_front()?;
        client.in_flight -= 1;
        Some(done)
    }

    /// Operations of `client` that were not reaped yet.
    pub fn in_flight(&self, client: ClientId) -> usize {
        self.clients[client.0].in_flight
    }

    /// Whether the kernel has operations that did not finish.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        self.in_flight > 0
    }

    /// Whether `enter` would find something to do now.
    pub fn has_work(&mut self) -> bool {
        let submission = self.ring.submission();
        let queued = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        let polled = self.polled.as_ref().is_some_and(|it| it.in_flight > 0);
        queued || polled || !self.ring.completion().is_empty()
    }

    /// At most one system call, and one for polled files: submits what is queued and sorts what
    /// finished to its clients. Returns how many operations finished.
    #[inline]
    pub fn enter(&mut self) -> usize {
        if self.in_flight == 0 {
            return 0;
        }
        let submission = self.ring.submission();
        let queued = submission.len();
        let mut flags = 0;
        let wanted = if self.has_thread && queued > 0 && submission.need_wakeup() {
            flags = SQ_WAKEUP;
            true
        } else {
            !self.has_thread && queued > 0 || submission.taskrun() || submission.cq_overflow()
        };
        drop(submission);
        if wanted {
            enter(&self.ring, queued, flags);
        }
        let mut count = self.sort(false);
        if self.polled.is_some() {
            count += self.enter_polled();
        }
        // What is taken is copied.
        if !self.lists.is_empty() && self.is_taken() {
            self.lists.clear();
        }
        self.in_flight -= count;
        count
    }

    /// Whether the kernel has taken all that was queued.
    #[inline]
    fn is_taken(&mut self) -> bool {
        let mut second = self.polled.as_mut();
        let second = second
            .as_mut()
            .is_none_or(|it| it.ring.submission().is_empty());
        second && self.ring.submission().is_empty()
    }

    /// The second ring: the device is asked by the system call.
    fn enter_polled(&mut self) -> usize {
        let Some(polled) = self.polled.as_mut().filter(|it| it.in_flight > 0) else {
            return 0;
        };
        let queued = polled.ring.submission().len();
        enter(&polled.ring, queued, 0);
        let count = self.sort(true);
        if let Some(polled) = &mut self.polled {
            polled.in_flight -= count;
        }
        count
    }

    /// Sorts what finished in one of the rings to its clients.
    #[inline]
    fn sort(&mut self, polled: bool) -> usize {
        let ring = match &mut self.polled {
            Some(second) if polled => &mut second.ring,
            _ => &mut self.ring,
        };
        let mut count = 0;
        for entry in ring.completion() {
            let Ok(index) = u32::try_from(entry.user_data()) else {
                continue;
            };
            let operation = &self.operations[index as usize];
            let client = &mut self.clients[operation.client];
            client.done.push_back((operation.tag, entry.result()));
            self.free.push(index);
            count += 1;
        }
        count
    }

    /// Cancels what is in flight and waits for it. `false` when something was left at the end of
    /// `within`: then the kernel may still reach memory that was submitted.
    #[must_use]
    pub fn quiesce(&mut self, within: Duration) -> bool {
        if self.in_flight == 0 {
            return true;
        }
        let deadline = Instant::now() + within;
        // What is only queued can't be cancelled.
        self.enter();
        // A kernel before 6.0 can't cancel everything at once; then we wait. What a device is
        // doing already ends by itself.
        let at_once = Some(types::Timespec::new());
        let all = types::CancelBuilder::any();
        let _ = self.ring.submitter().register_sync_cancel(at_once, all);
        while self.in_flight > 0 && Instant::now() < deadline {
            if self.enter() == 0 {
                enter(&self.ring, 0, 0);
                std::thread::yield_now();
            }
        }
        self.in_flight == 0
    }
}

// io_uring_enter(2).
const GETEVENTS: u32 = 1;
const SQ_WAKEUP: u32 = 2;

/// Submits `queued` entries and lets the kernel finish what it can, without waiting.
fn enter(ring: &IoUring, queued: usize, flags: u32) {
    let queued = u32::try_from(queued).unwrap_or(u32::MAX);
    // SAFETY: no signal mask is passed. EINTR, EBUSY and EAGAIN leave the entries queued: the next
    // turn tries again.
    let _ = unsafe {
        ring.submitter()
            .enter::<libc::sigset_t>(queued, 0, GETEVENTS | flags, None)
    };
}

/// The entry for an operation whose segments are the `count` at `list`; `fixed` is the registered
/// piece of memory that has the only one of them.
#[inline(always)]
fn entry(
    op: UringOp<'_>,
    list: *const libc::iovec,
    count: u32,
    fixed: Option<u16>,
) -> squeue::Entry {
    match (op, fixed) {
        (op @ (UringOp::Read { .. } | UringOp::Write { .. }), Some(place)) => {
            fixed_entry(op, place)
        }
        (op, _) => list_entry(op, list, count),
    }
}

/// The entry for an operation in registered memory.
fn fixed_entry(op: UringOp<'_>, place: u16) -> squeue::Entry {
    match op {
        UringOp::Read {
            file,
            offset,
            segments: [one],
        } => {
            let len = u32::try_from(one.len()).unwrap_or(u32::MAX);
            opcode::ReadFixed::new(types::Fixed(file), one.base(), len, place)
                .offset(offset)
                .build()
        }
        UringOp::Write {
            file,
            offset,
            segments: [one],
            durable,
        } => {
            let len = u32::try_from(one.len()).unwrap_or(u32::MAX);
            opcode::WriteFixed::new(types::Fixed(file), one.base(), len, place)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build()
        }
        _ => opcode::Nop::new().build(),
    }
}

#[inline(always)]
fn list_entry(op: UringOp<'_>, list: *const libc::iovec, count: u32) -> squeue::Entry {
    match op {
        UringOp::Read { file, offset, .. } => opcode::Readv::new(types::Fixed(file), list, count)
            .offset(offset)
            .build(),
        UringOp::Write {
            file,
            offset,
            durable,
            ..
        } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(types::Fixed(file), list, count)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
        UringOp::Sync { file } => opcode::Fsync::new(types::Fixed(file))
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        UringOp::Zero {
            file,
            offset,
            bytes,
            how,
        } => {
            let zero = match how {
                Zero::Punch => libc::FALLOC_FL_PUNCH_HOLE,
                Zero::Keep => libc::FALLOC_FL_ZERO_RANGE,
            };
            opcode::Fallocate::new(types::Fixed(file), bytes.into())
                .offset(offset)
                .mode(zero | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        }
        UringOp::Discard {
            file,
            offset,
            bytes,
        } => {
            let mut length = [0; 16];
            length[..8].copy_from_slice(&u64::from(bytes).to_ne_bytes());
            opcode::UringCmd16::new(types::Fixed(file), BLOCK_URING_CMD_DISCARD)
                .addr(Some(offset))
                .cmd(length)
                .build()
        }
        UringOp::Nothing => opcode::Nop::new().build(),
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel must not write to guest memory after this: wait, but not for a dead disk.
        let _ = self.quiesce(DROP_WITHIN);
    }
}

#[cfg(test)]
mod tests;
