//! `Uring`: one io_uring for all disks of a worker, made and used by the worker's thread alone.
//!
//! Several *clients* (disk queues) share the ring; completions are sorted back to them. Operations
//! are queued by `submit`, and `enter` makes one system call for all of them. See io_uring(7).
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
/// How long a ring that is dropped waits for its operations.
const DROP_WITHIN: Duration = Duration::from_secs(5);

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

/// A kernel ring and who waits for what in it.
pub struct Uring {
    ring: IoUring,
    /// Told by the kernel when something completes: what a sleeping worker waits for.
    completed: EventFd,
    clients: Vec<Client>,
    operations: Box<[Operation]>,
    /// The lists of queued operations, one behind the other. Never grows, so that addresses in it
    /// stay; emptied when the kernel has taken all of them.
    lists: Vec<Segment>,
    free: Vec<u32>,
    files: Vec<bool>,
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
        .or_else(|_| Uring::build(|_| {}))?;
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
            completed,
            clients: Vec::new(),
            operations: vec![Operation::default(); IN_FLIGHT_MAX].into(),
            lists: Vec::with_capacity(SEGMENTS_QUEUED),
            free: (0..count).rev().collect(),
            files: vec![false; FILES_MAX as usize],
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
        let at = self.files.iter().position(|used| !used);
        let at = at.and_then(|at| u32::try_from(at).ok()).ok_or_else(|| {
            io::Error::other(format!("all {FILES_MAX} files of the io_uring are in use"))
        })?;
        self.ring
            .submitter()
            .register_files_update(at, &[file.as_raw_fd()])?;
        self.files[at as usize] = true;
        Ok(at)
    }

    /// Takes a file out of the ring.
    pub fn remove_file(&mut self, file: u32) {
        // The place is ours, so the kernel has no reason to refuse.
        let _ = self.ring.submitter().register_files_update(file, &[-1]);
        self.files[file as usize] = false;
    }

    /// Queues an operation for `client`, which calls it `tag`. `false`: no room now.
    #[must_use]
    pub fn submit(&mut self, client: ClientId, tag: u64, op: UringOp<'_>) -> bool {
        if self.ring.submission().is_full() {
            return false;
        }
        let Some(&index) = self.free.last() else {
            return false;
        };
        let segments = match op {
            UringOp::Read { segments, .. } | UringOp::Write { segments, .. } => segments,
            UringOp::Sync { .. } | UringOp::Zero { .. } | UringOp::Nothing => &[],
        };
        let segments = &segments[..segments.len().min(SEGMENTS_PER_OPERATION)];
        let start = self.lists.len();
        if start + segments.len() > SEGMENTS_QUEUED {
            return false;
        }
        self.lists.extend_from_slice(segments);
        // A segment is laid out as an iovec.
        let list = self.lists[start..].as_ptr().cast::<libc::iovec>();
        let count = u32::try_from(segments.len()).unwrap_or(u32::MAX);
        let entry = entry(op, list, count).user_data(u64::from(index));
        // SAFETY: the list of segments stays in `lists` until the kernel took the entry, which
        // copies it (IORING_FEAT_SUBMIT_STABLE); the buffers are mapped until the completion by the
        // caller's promise.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.lists.truncate(start);
            return false;
        }
        let client = client.0;
        self.operations[index as usize] = Operation { client, tag };
        self.free.pop();
        self.in_flight += 1;
        self.clients[client].in_flight += 1;
        true
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

    /// Whether `enter` would find something to do now.
    pub fn has_work(&mut self) -> bool {
        let submission = self.ring.submission();
        let queued = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        queued || !self.ring.completion().is_empty()
    }

    /// At most one system call: submits what is queued and sorts what finished to its clients.
    /// Returns how many operations finished.
    #[inline]
    pub fn enter(&mut self) -> usize {
        if self.in_flight == 0 {
            return 0;
        }
        let submission = self.ring.submission();
        let queued = submission.len();
        let wanted = queued > 0 || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if wanted {
            self.system_call(queued);
            if queued > 0 && self.ring.submission().is_empty() {
                self.lists.clear();
            }
        }
        let mut count = 0;
        for entry in self.ring.completion() {
            let Ok(index) = u32::try_from(entry.user_data()) else {
                continue;
            };
            let operation = &self.operations[index as usize];
            let client = &mut self.clients[operation.client];
            client.done.push_back((operation.tag, entry.result()));
            self.free.push(index);
            count += 1;
        }
        self.in_flight -= count;
        count
    }

    fn system_call(&self, queued: usize) {
        const GETEVENTS: u32 = 1;
        let queued = u32::try_from(queued).unwrap_or(u32::MAX);
        // SAFETY: no signal mask is passed. EINTR, EBUSY and EAGAIN leave the entries queued: the
        // next turn tries again.
        let _ = unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(queued, 0, GETEVENTS, None)
        };
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
                self.system_call(0);
                std::thread::yield_now();
            }
        }
        self.in_flight == 0
    }
}

/// The entry for an operation whose segments are the `count` at `list`.
#[inline(always)]
fn entry(op: UringOp<'_>, list: *const libc::iovec, count: u32) -> squeue::Entry {
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
mod tests {
    use super::*;
    use crate::memory::{Access, GuestRam, Segments, copy};
    use crate::sys::peer;
    use vmm_sys_util::tempfile::TempFile;

    fn segments(ram: &GuestRam, at: u64, len: u32) -> Segments {
        let mut list = Segments::with_capacity(4);
        ram.translate(at, len, Access::Write, &mut list).unwrap();
        list
    }

    fn finish(ring: &mut Uring, client: ClientId) -> (u64, i32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            ring.enter();
            if let Some(done) = ring.reap(client) {
                return done;
            }
            assert!(Instant::now() < deadline, "nothing completes");
        }
    }

    #[test]
    fn two_clients_get_their_own_completions() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let file = TempFile::new().unwrap();
        let mut ring = Uring::new().unwrap();
        let (a, b) = (ring.add_client(8), ring.add_client(8));
        let place = ring.add_file(file.as_file()).unwrap();
        let out = segments(&ram, 0, 4096);
        copy::write(out.as_slice(), 0, &[7; 4096]);
        let write = UringOp::Write {
            file: place,
            offset: 4096,
            segments: out.as_slice(),
            durable: true,
        };
        assert!(ring.submit(a, 11, write));
        assert_eq!(finish(&mut ring, a), (11, 4096));
        let back = segments(&ram, 8192, 4096);
        let read = UringOp::Read {
            file: place,
            offset: 4096,
            segments: back.as_slice(),
        };
        assert!(ring.submit(a, 12, UringOp::Sync { file: place }));
        assert!(ring.submit(b, 13, read));
        assert_eq!(finish(&mut ring, b), (13, 4096));
        assert_eq!(finish(&mut ring, a), (12, 0));
        let mut bytes = [0; 4096];
        copy::read(back.as_slice(), 0, &mut bytes);
        assert_eq!(bytes, [7; 4096]);
        let past = UringOp::Read {
            file: place,
            offset: 1 << 20,
            segments: back.as_slice(),
        };
        assert!(ring.submit(b, 14, past));
        assert_eq!(finish(&mut ring, b), (14, 0), "end of file");
        ring.remove_file(place);
        ring.remove_client(a);
        ring.remove_client(b);
    }

    #[test]
    fn a_sleeper_is_woken_by_a_completion() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut ring = Uring::new().unwrap();
        let client = ring.add_client(1);
        let place = ring.add_file(&ours).unwrap();
        let buffer = segments(&ram, 0, 4);
        // Not ready yet: the read waits in the kernel.
        let read = UringOp::Read {
            file: place,
            offset: u64::MAX,
            segments: buffer.as_slice(),
        };
        assert!(ring.submit(client, 1, read));
        ring.enter();
        assert_eq!(ring.reap(client), None);
        io::Write::write_all(&mut &theirs, b"wake").unwrap();
        let never = std::os::unix::net::UnixStream::pair().unwrap();
        let arrivals = peer::Arrivals::new(&never.0).unwrap();
        assert_eq!(arrivals.wait(&ring).unwrap(), peer::Ready::Exit);
        assert!(ring.has_work());
        assert_eq!(finish(&mut ring, client), (1, 4));
    }

    #[test]
    fn a_dropped_ring_cancels_what_would_never_end() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut ring = Uring::new().unwrap();
        let client = ring.add_client(1);
        let place = ring.add_file(&ours).unwrap();
        let buffer = segments(&ram, 0, 4);
        let read = UringOp::Read {
            file: place,
            offset: u64::MAX,
            segments: buffer.as_slice(),
        };
        assert!(ring.submit(client, 1, read));
        ring.enter();
        assert_eq!(ring.reap(client), None);
        assert!(ring.quiesce(Duration::from_secs(10)), "still in flight");
        assert_eq!(ring.reap(client), Some((1, -libc::ECANCELED)));
    }

    #[test]
    fn lists_of_segments_take_no_memory_and_a_full_ring_says_so() {
        let ram = GuestRam::for_test(&[(0, 1 << 20)]);
        let file = TempFile::new().unwrap();
        let mut ring = Uring::new().unwrap();
        let client = ring.add_client(IN_FLIGHT_MAX);
        let place = ring.add_file(file.as_file()).unwrap();
        let mut list = Segments::with_capacity(2 * SEGMENTS_PER_OPERATION);
        for at in 0..2 * SEGMENTS_PER_OPERATION as u64 {
            ram.translate(at * 8, 8, Access::Write, &mut list).unwrap();
        }
        let bytes: Vec<u8> = (0..16384).map(|i| u8::try_from(i % 251).unwrap()).collect();
        copy::write(list.as_slice(), 0, &bytes);
        let storage = ring.lists.as_ptr();
        let mut queued = 0;
        while ring.submit(
            client,
            queued,
            UringOp::Write {
                file: place,
                offset: queued * 8192,
                segments: list.as_slice(),
                durable: false,
            },
        ) {
            queued += 1;
            assert!(queued <= 16, "more than there is room for");
        }
        assert_eq!(queued, 16);
        // Longer than one writev: the first 1024 segments are written, each time.
        for _ in 0..queued {
            assert_eq!(finish(&mut ring, client).1, 8192);
        }
        let written = std::fs::read(file.as_path()).unwrap();
        assert!(
            written == bytes[..8192].repeat(16),
            "other bytes on the file"
        );
        assert_eq!(ring.lists.as_ptr(), storage);
        let again = UringOp::Sync { file: place };
        assert!(ring.submit(client, 99, again) && ring.lists.is_empty());
        assert_eq!(finish(&mut ring, client), (99, 0));
    }
}
