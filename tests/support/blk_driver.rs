//! A front-end of a disk on libblkio's virtio-blk driver, which shares no code with the daemon.
//!
//! The crate has the wire protocol, the split and packed rings (VIRTIO 1.3 §2.7, §2.8) and the
//! requests of §5.2.6; here is what it leaves to its user: memory that the device can see, kicks,
//! waiting with a deadline, and a check of what was negotiated. Whatever talks to the daemon has a
//! deadline: a daemon that does not answer fails the test, and does not hang it.
#![expect(
    unsafe_code,
    reason = "the crate's iovec calls, and memory shared with a device"
)]
#![expect(unreachable_pub, reason = "a module of one test binary")]

use std::ffi::CStr;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    ByteValued, EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags,
    VirtioBlkQueue, VirtioBlkReqBuf, VirtioFeatureFlags, VirtioTransport, iovec,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::support::daemon::Daemon;
use super::support::deadline::wait_until;
use super::vring_base::Relay;

/// Longer than any answer takes on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of data memory per queue.
pub const DATA_BYTES: usize = 16 << 20;

/// The ring format that a session negotiates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    Split,
    Packed,
}

impl Ring {
    /// The other one.
    pub fn other(self) -> Ring {
        match self {
            Ring::Split => Ring::Packed,
            Ring::Packed => Ring::Split,
        }
    }

    /// Packed rings may have any size; 250 wraps in the middle of chains.
    fn size(self) -> u16 {
        match self {
            Ring::Split => 256,
            Ring::Packed => 250,
        }
    }
}

/// How completions are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// By looking at the ring, with notifications off.
    Polling,
    /// By the call eventfd, with event indexes.
    Call,
}

/// A request type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A request: its data is in pieces of the queue's memory, one descriptor each.
#[derive(Clone, Debug)]
pub struct Request {
    pub op: Op,
    /// In bytes.
    pub offset: u64,
    pub pieces: Vec<Range<usize>>,
}

impl Request {
    /// A request whose data is in one piece of the queue's memory.
    pub fn whole(op: Op, offset: u64, piece: Range<usize>) -> Request {
        let pieces = vec![piece];
        Request { op, offset, pieces }
    }
}

/// Runs `work` on another thread; panics when it is not done in time.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, answer) = channel();
    thread::spawn(move || done.send(work()));
    answer
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Where to connect: a packed ring needs the relay, which has to live until then.
fn way_to(socket: &Path, ring: Ring) -> (Option<Relay>, String) {
    let relay = (ring == Ring::Packed).then(|| Relay::start(socket));
    let path = relay.as_ref().map_or(socket, Relay::path);
    let path = path.to_str().expect("a path in UTF-8").to_owned();
    (relay, path)
}

/// Memory that a device can map.
fn shared_memory(name: &CStr, bytes: usize) -> MmapRegion {
    // SAFETY: the name is a C string; the call has no other condition.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64)
        .expect("the memory has its length");
    MmapRegion::from_file(FileOffset::new(file, 0), bytes).expect("the memory is mapped")
}

fn map<C: ByteValued, R: Copy>(transport: &mut VhostUser<C, R>, memory: &MmapRegion) {
    let file = memory.file_offset().expect("made from a file").file();
    transport
        .map_mem_region(memory.as_ptr() as usize, memory.size(), file.as_raw_fd(), 0)
        .expect("the device takes the memory");
}

/// The eventfd by which a device tells of used buffers.
struct Call {
    eventfd: Arc<EventFd>,
    epoll: Epoll,
}

impl Call {
    fn new(eventfd: Arc<EventFd>) -> Call {
        let epoll = Epoll::new().expect("an epoll");
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
            .expect("the call eventfd can be waited for");
        Call { eventfd, epoll }
    }

    /// How many there were since the last time; waits up to `timeout` for one.
    fn wait(&self, timeout: Duration) -> u64 {
        let millis = i32::try_from(timeout.as_millis()).expect("a short wait");
        let mut events = [EpollEvent::default()];
        match self.epoll.wait(millis, &mut events) {
            Ok(0) => 0,
            Ok(_) => self.eventfd.read().expect("the call eventfd can be read"),
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll: {error}"),
        }
    }
}

/// One request queue with its data memory.
pub struct Queue {
    vq: VirtioBlkQueue<'static, usize>,
    kick: Box<dyn QueueNotifier>,
    call: Call,
    wait: Wait,
    data: MmapRegion,
    in_flight: usize,
}

impl Queue {
    fn new(
        mut vq: VirtioBlkQueue<'static, usize>,
        transport: &mut Transport,
        index: usize,
        wait: Wait,
    ) -> Queue {
        let data = shared_memory(c"driver-data", DATA_BYTES);
        map(transport, &data);
        vq.set_used_notif_enabled(wait == Wait::Call);
        Queue {
            vq,
            kick: transport.get_submission_notifier(index),
            call: Call::new(transport.get_completion_fd(index)),
            wait,
            data,
            in_flight: 0,
        }
    }

    /// Puts `bytes` into the data memory, over the pieces in order.
    pub fn fill(&self, pieces: &[Range<usize>], mut bytes: &[u8]) {
        for piece in pieces {
            let (now, later) = bytes.split_at(piece.len());
            let memory = self.data.as_volatile_slice();
            memory.write_slice(now, piece.start).expect("in range");
            bytes = later;
        }
    }

    /// What is in the data memory, over the pieces in order.
    pub fn data(&self, pieces: &[Range<usize>]) -> Vec<u8> {
        let mut bytes = vec![0; pieces.iter().map(Range::len).sum()];
        let mut rest = &mut bytes[..];
        for piece in pieces {
            let (now, later) = rest.split_at_mut(piece.len());
            let memory = self.data.as_volatile_slice();
            memory.read_slice(now, piece.start).expect("in range");
            rest = later;
        }
        bytes
    }

    /// Puts a request into the ring. The device may see it before [`Queue::kick`].
    pub fn submit(&mut self, request: &Request, tag: usize) {
        let (base, size) = (self.data.as_ptr(), self.data.size());
        let iovecs = request.pieces.iter().map(|piece| {
            assert!(piece.start < piece.end && piece.end <= size, "{piece:?}");
            iovec {
                iov_base: base.wrapping_add(piece.start).cast(),
                iov_len: piece.len(),
            }
        });
        let iovecs: Vec<iovec> = iovecs.collect();
        let (vq, offset) = (&mut self.vq, request.offset);
        let bytes = request.pieces.iter().map(Range::len).sum::<usize>() as u64;
        let queued = match request.op {
            // SAFETY: every piece is inside the mapping, which lives as long as the queue.
            Op::Read => unsafe { vq.readv(offset, iovecs.as_ptr(), iovecs.len(), tag) },
            // SAFETY: as for reads.
            Op::Write => unsafe { vq.writev(offset, iovecs.as_ptr(), iovecs.len(), tag) },
            Op::Flush => vq.flush(tag),
            Op::Discard => vq.discard(offset, bytes, tag),
            Op::WriteZeroes => vq.write_zeroes(offset, bytes, false, tag),
        };
        queued.unwrap_or_else(|error| panic!("{request:?}: {error}"));
        self.in_flight += 1;
    }

    /// Tells the device, if it wants to be told.
    pub fn kick(&mut self) {
        if self.vq.avail_notif_needed() {
            self.kick.notify().expect("the kick eventfd takes a write");
        }
    }

    /// Waits for at least one completion; returns tags and results (0 or a negative errno).
    pub fn reap(&mut self) -> Vec<(usize, i32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let done = self.completions();
            if !done.is_empty() {
                return done;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "{} requests unanswered, waiting by {:?}",
                self.in_flight,
                self.wait
            );
            match self.wait {
                Wait::Polling => thread::yield_now(),
                Wait::Call => {
                    self.call.wait(left);
                }
            }
        }
    }

    /// What has completed so far.
    pub fn completions(&mut self) -> Vec<(usize, i32)> {
        let mut done = Vec::new();
        loop {
            done.extend(self.vq.completions().map(|c| (c.context, c.ret)));
            // The crate's packed ring stores the event index without a fence before its next look
            // at the ring (§2.8.21): without this one, a call could be lost on our side.
            fence(Ordering::SeqCst);
            if !self.vq.completions().has_next() {
                break;
            }
        }
        self.in_flight -= done.len();
        done
    }

    /// Calls that the device made since the last time, without waiting.
    pub fn calls(&self) -> u64 {
        self.call.wait(Duration::ZERO)
    }

    /// Submits one request and waits for its result. Nothing else may be in flight.
    pub fn run(&mut self, request: &Request) -> i32 {
        self.submit(request, 0);
        self.kick();
        let done = self.reap();
        assert_eq!(done.len(), 1);
        done[0].1
    }

    /// Reads `len` bytes at `offset`, in requests of at most 256 KiB.
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            let request = Request::whole(Op::Read, at, 0..(len - bytes.len()).min(256 << 10));
            assert_eq!(self.run(&request), 0, "{request:?}");
            bytes.extend(self.data(&request.pieces));
        }
        bytes
    }

    /// Writes `bytes` at `offset`, in one request.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        let request = Request::whole(Op::Write, offset, 0..bytes.len());
        self.fill(&request.pieces, bytes);
        self.run(&request)
    }

    /// Makes everything durable.
    pub fn flush(&mut self) {
        let request = Request {
            op: Op::Flush,
            offset: 0,
            pieces: Vec::new(),
        };
        assert_eq!(self.run(&request), 0, "flush");
    }
}

type Transport = VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>;

/// How a session is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub ring: Ring,
    pub wait: Wait,
    pub queues: usize,
}

/// A session of the driver with one disk. Dropping it closes the socket and nothing else.
pub struct Session {
    // Before the transport, which owns the memory of the rings.
    pub queues: Vec<Queue>,
    transport: Transport,
}

impl Session {
    /// Connects to `socket` and starts the queues; checks on both sides what was negotiated.
    pub fn open(daemon: &Daemon, device: &str, socket: &Path, options: Options) -> Session {
        let position = daemon.log().len();
        let (_relay, path) = way_to(socket, options.ring);
        let session = in_time("a session", move || Session::connect(&path, options));
        let features = session.transport.get_features();
        check_bits(features, options.ring);
        let needle = format!("negotiated device={device} ");
        let line = daemon.wait_log_after(position, &needle, PATIENCE);
        let packed = options.ring == Ring::Packed;
        assert_eq!(line.contains("VIRTIO_F_RING_PACKED"), packed, "{line}");
        for name in ["VIRTIO_F_VERSION_1", "VIRTIO_F_EVENT_IDX"] {
            assert!(line.contains(name), "{line}");
        }
        session
    }

    fn connect(path: &str, options: Options) -> Session {
        let mut transport = Transport::new(path, wanted(options.ring)).expect("a session");
        let vqs = VirtioBlkQueue::setup_queues(&mut transport, options.queues, options.ring.size());
        let vqs = vqs.expect("the queues start");
        let queues = vqs.into_iter().enumerate();
        let queues = queues.map(|(at, vq)| Queue::new(vq, &mut transport, at, options.wait));
        Session {
            queues: queues.collect(),
            transport,
        }
    }

    /// The first queue.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    /// Whether the device offered a feature of virtio-blk. The driver takes every one offered.
    pub fn has(&self, feature: VirtioBlkFeatureFlags) -> bool {
        self.transport.get_features() & feature.bits() != 0
    }

    /// Config space, by GET_CONFIG.
    pub fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().expect("config space")
    }

    /// What GET_QUEUE_NUM said.
    pub fn max_queues(&self) -> Option<usize> {
        self.transport.max_queues()
    }
}

/// Every feature that the driver could use.
fn wanted(ring: Ring) -> u64 {
    let mut transport = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    if ring == Ring::Packed {
        transport |= VirtioFeatureFlags::RING_PACKED;
    }
    transport.bits() | VirtioBlkFeatureFlags::all().bits()
}

fn check_bits(features: u64, ring: Ring) {
    let bits = VirtioFeatureFlags::from_bits_truncate(features);
    let packed = bits.contains(VirtioFeatureFlags::RING_PACKED);
    assert_eq!(packed, ring == Ring::Packed, "{bits:?}");
    assert!(bits.contains(VirtioFeatureFlags::VERSION_1), "{bits:?}");
    assert!(
        bits.contains(VirtioFeatureFlags::RING_EVENT_IDX),
        "{bits:?}"
    );
}

/// Header, answer and status of a request that the crate has no call for.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawRequest {
    header: [u8; 16],
    answer: [u8; 20],
    status: u8,
}

/// Sends one request of any type over the crate's rings, in a session of its own: returns the
/// status byte and the first `answer_bytes` bytes that the device wrote before it.
pub fn raw_request(socket: &Path, ring: Ring, kind: u32, answer_bytes: usize) -> (u8, Vec<u8>) {
    let (_relay, path) = way_to(socket, ring);
    in_time("a raw request", move || {
        let (status, answer) = run_raw(&path, ring, kind, answer_bytes);
        (status, answer[..answer_bytes].to_vec())
    })
}

fn run_raw(path: &str, ring: Ring, kind: u32, answer_bytes: usize) -> (u8, [u8; 20]) {
    let transport = VhostUser::<VirtioBlkConfig, RawRequest>::new(path, wanted(ring));
    let mut transport = transport.expect("a session");
    check_bits(transport.get_features(), ring);
    let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let layout = VirtqueueLayout::new::<RawRequest>(1, 16, features).expect("a layout");
    let memory = transport.alloc_queue_mem(&layout).expect("queue memory");
    // SAFETY: the transport keeps the mapping until it is dropped, after the queue below.
    let memory = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) };
    let vq = Virtqueue::<RawRequest>::new(transport.iova_translator(), memory, 16, features);
    let mut vqs = [vq.expect("a queue")];
    transport.setup_queues(&vqs).expect("the queue starts");
    let vq = &mut vqs[0];
    let part = |bytes: &mut [u8]| iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    vq.add_request(|request, add| {
        request.header = [0; 16];
        request.header[..4].copy_from_slice(&kind.to_le_bytes());
        (request.answer, request.status) = ([0xee; 20], 0xee);
        add(part(&mut request.header), false)?;
        if answer_bytes > 0 {
            add(part(&mut request.answer[..answer_bytes]), true)?;
        }
        add(part(std::slice::from_mut(&mut request.status)), true)
    })
    .expect("room for one request");
    if vq.avail_notif_needed() {
        let kick = transport.get_submission_notifier(0);
        kick.notify().expect("the kick eventfd takes a write");
    }
    // The device calls: notifications are on in a fresh ring.
    let call = Call::new(transport.get_completion_fd(0));
    let done = wait_until("a call with the answer", PATIENCE, || {
        (call.wait(PATIENCE) > 0).then(|| vq.completions().next())?
    });
    (done.req.status, done.req.answer)
}
