//! A front-end of one queue of a disk, of our own: the `vhost` crate's messages and the rings of
//! `src/testing`, so that a test decides on every descriptor. One request at a time.
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::memory::GuestRam;
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Driver, RingMemory, UVA, read_guest, write_guest};

pub use crate::support::virtio_blk::*;

/// Longer than any answer takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: u16 = 256;
const TABLE: u64 = 0x2_0000;
const READABLE: u64 = 0x10_0000;
const WRITABLE: u64 = 0x40_0000;
const RAM: u64 = 0x70_0000;
/// What is posted and not waited for, in places of so many bytes: readable ones in the first half,
/// writable ones in the second.
const POSTED: u64 = 0x30_0000;
const PLACE: u64 = 0x1_0000;
const AROUND: u8 = 0xa7;

/// How a request lies in memory: where its readable and its writable bytes are cut into
/// descriptors.
#[derive(Clone, Debug)]
pub struct Framing {
    pub readable: Vec<u32>,
    pub writable: Vec<u32>,
    pub indirect: bool,
}

impl Framing {
    /// Header, data and status in a descriptor each.
    pub fn usual(data_in: u32) -> Framing {
        Framing {
            readable: vec![16],
            writable: vec![data_in],
            indirect: false,
        }
    }
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub used: u32,
    pub data: Vec<u8>,
}

pub struct FrontEnd<D: Driver> {
    front: Frontend,
    ram: Arc<GuestRam>,
    driver: D,
    kick: EventFd,
    features: u64,
    /// Where the back-end says that config space has changed.
    channel: Option<UnixStream>,
    /// Ids, places and lengths of what is posted and not answered.
    posted: Vec<(u16, u64, usize)>,
    /// Requests that were sent and have no answer yet: the chain, and the place.
    sent: Vec<(u16, usize)>,
    _alive: Sender<()>,
}

/// Closes `socket` when the test takes too long: the crate's front-end waits for ever.
fn watch(socket: &UnixStream) -> Sender<()> {
    let socket = socket.try_clone().expect("another handle");
    let (alive, gone) = channel();
    std::thread::spawn(move || {
        if gone.recv_timeout(Duration::from_secs(120)) == Err(RecvTimeoutError::Timeout) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    });
    alive
}

impl<D: Driver> FrontEnd<D> {
    /// Makes the file of its memory so many bytes long.
    pub fn cut_memory(&self, bytes: u64) {
        self.ram.specs()[0].file.set_len(bytes).unwrap();
    }

    /// Kicks, and waits until the back-end has closed the connection.
    pub fn is_left(&mut self) {
        self.kick.write(1).unwrap();
        while self.front.get_features().is_ok() {}
    }

    /// Connects and starts the first queue with those of `features` that are offered.
    pub fn open(socket: &Path, features: u64) -> FrontEnd<D> {
        let socket = UnixStream::connect(socket).expect("the daemon listens");
        let alive = watch(&socket);
        let mut front = Frontend::from_stream(socket, 1);
        front.set_owner().unwrap();
        let packed = if D::Format::PACKED { F_PACKED } else { 0 };
        let needed = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | packed;
        let offered = front.get_features().unwrap();
        assert_eq!(offered & needed, needed);
        let features = offered & (needed | features);
        let protocol = front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        front.set_protocol_features(protocol & wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(features).unwrap();
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let memory = RingMemory::new::<D::Format>(&ram, 0, SIZE);
        front.set_mem_table(&regions(&ram, 1)).unwrap();
        front.set_vring_num(0, SIZE).unwrap();
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: UVA + memory.at[0],
            used_ring_addr: UVA + memory.at[2],
            avail_ring_addr: UVA + memory.at[1],
            log_addr: None,
        };
        front.set_vring_addr(0, &addresses).unwrap();
        let (kick, call) = (eventfd(), eventfd());
        front.set_vring_kick(0, &kick).unwrap();
        front.set_vring_call(0, &call).unwrap();
        front.set_vring_enable(0, true).unwrap();
        FrontEnd {
            front,
            driver: D::new(&memory, false),
            ram,
            kick,
            features,
            channel: None,
            sent: Vec::new(),
            posted: Vec::new(),
            _alive: alive,
        }
    }

    /// Asks to be told when config space changes.
    pub fn listen(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.front.set_backend_request_fd(&theirs).unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        self.channel = Some(ours);
    }

    /// Waits for the word that config space has changed.
    pub fn wait_config_change(&mut self) {
        let mut message = [0; 12];
        let mut channel = self.channel.as_ref().expect("it listens");
        channel.read_exact(&mut message).expect("word in time");
        // CONFIG_CHANGE_MSG, version 1, no body.
        assert_eq!(message[..], [2u32, 1, 0].map(u32::to_ne_bytes).concat());
    }

    /// Whether nothing was said of config space.
    pub fn hears_nothing(&mut self) -> bool {
        let mut channel = self.channel.as_ref().expect("it listens");
        channel.set_nonblocking(true).unwrap();
        let read = channel.read(&mut [0; 12]);
        channel.set_nonblocking(false).unwrap();
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// The disk's size in sectors, from config space.
    pub fn sectors(&mut self) -> u64 {
        u64::from_le_bytes(self.config()[..8].try_into().unwrap())
    }

    /// GET_VRING_BASE: the queue is stopped when this returns.
    pub fn stop(&mut self) {
        self.front.get_vring_base(0).expect("a base");
    }

    /// SET_VRING_ENABLE 0: nothing new is taken.
    pub fn disable(&mut self) {
        self.front.set_vring_enable(0, false).unwrap();
    }

    /// The queue goes on where it was stopped.
    pub fn go_on(&mut self) {
        self.front.set_vring_kick(0, &self.kick).unwrap();
    }

    /// Posts a request without waiting for it, in memory of its own: the `place`th of sixteen.
    pub fn post(&mut self, place: u64, kind: u32, sector: u64, out: &[u8], data_in: usize) {
        let readable = POSTED + place * PLACE;
        let writable = readable + PLACE / 2;
        assert!(place < 16 && out.len() + 16 <= 0x8000 && data_in < 0x8000);
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes.extend(out);
        write_guest(&self.ram, readable, &bytes);
        write_guest(&self.ram, writable, &vec![AROUND; data_in + 1]);
        let len = |bytes: usize| u32::try_from(bytes).unwrap();
        let bufs = [
            Buf::readable(readable, len(bytes.len())),
            Buf::writable(writable, len(data_in + 1)),
        ];
        let id = self.driver.add(&bufs).expect("room in the ring");
        self.posted.push((id, place, data_in));
        if self.driver.publish() {
            self.kick.write(1).expect("the kick eventfd takes a write");
        }
    }

    /// Posts a chain of so many readable and writable bytes that asks for nothing that can be
    /// answered.
    pub fn post_unanswerable(&mut self, readable: u32, writable: u32) {
        let bufs = [
            Buf::readable(READABLE, readable),
            Buf::writable(WRITABLE, writable),
        ];
        let bufs: Vec<_> = bufs.into_iter().filter(|buf| buf.len > 0).collect();
        self.driver.add(&bufs).expect("room in the ring");
        self.driver.publish();
        self.kick.write(1).expect("the kick eventfd takes a write");
    }

    /// How many requests that were posted are not known to be answered.
    pub fn waits(&self) -> usize {
        self.posted.len()
    }

    /// What was posted in some place, if it is answered by now.
    pub fn answered(&mut self) -> Option<(u64, Answer)> {
        let (id, used) = self.driver.used()?;
        let at = self.posted.iter().position(|posted| posted.0 == id);
        let (_, place, data_in) = self.posted.swap_remove(at.expect("posted before"));
        let writable = POSTED + place * PLACE + PLACE / 2;
        let mut data = read_guest(&self.ram, writable, data_in + 1);
        let status = data.pop().expect("a status byte");
        Some((place, Answer { status, used, data }))
    }

    /// Waits for the answer to all that was posted; by place.
    pub fn all_answers(&mut self) -> Vec<(u64, Answer)> {
        let deadline = Instant::now() + PATIENCE;
        let mut answers = Vec::new();
        while !self.posted.is_empty() {
            assert!(Instant::now() < deadline, "no answer: {:?}", self.posted);
            answers.extend(self.answered());
            std::thread::yield_now();
        }
        answers.sort_by_key(|(place, _)| *place);
        answers
    }

    /// Hands the memory over anew, in so many regions: the back-end maps all of it anew.
    pub fn share_in(&mut self, parts: u64) {
        let regions = regions(&self.ram, parts);
        self.front.set_mem_table(&regions).expect("an ack");
    }

    /// Adds a region of `bytes` bytes behind the memory, and takes it away again with `false`.
    pub fn more_memory(&mut self, bytes: u64, there: bool) {
        let more = GuestRam::for_test(&[(0, bytes)]);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: RAM,
            memory_size: bytes,
            userspace_addr: UVA + RAM,
            mmap_offset: 0,
            mmap_handle: more.specs()[0].file.as_raw_fd(),
        };
        let done = match there {
            true => self.front.add_mem_region(&region).map(|_| ()),
            false => self.front.remove_mem_region(&region),
        };
        done.expect("an ack");
    }

    /// What was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The config space.
    pub fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) = self.front.get_config(0, 60, flags, &[0; 60]).unwrap();
        bytes
    }

    /// Writes one byte of it.
    pub fn set_config(&mut self, offset: u32, byte: u8) -> bool {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front.set_config(offset, flags, &[byte]).is_ok()
    }

    /// Stops the queue; returns where it stands.
    pub fn base(&mut self) -> u32 {
        self.front.get_vring_base(0).unwrap()
    }

    /// Sends a request about the first `bytes` bytes of the disk, without waiting for its answer.
    /// Each that is sent at a time has a place of its own.
    pub fn send(&mut self, place: usize, kind: u32, bytes: usize) {
        let [header, status] = places(place);
        write_guest(&self.ram, header, &kind.to_le_bytes());
        write_guest(&self.ram, header + 4, &[0; 12]);
        let len = u32::try_from(bytes).unwrap();
        let data = match kind {
            OUT => Buf::readable(header + 16, len),
            _ => Buf::writable(status + 1, len),
        };
        let bufs = [Buf::readable(header, 16), data, Buf::writable(status, 1)];
        let id = self.driver.add(&bufs).expect("the ring has room");
        if self.driver.publish() {
            self.kick.write(1).expect("the kick eventfd takes a write");
        }
        self.sent.push((id, place));
    }

    /// The place and the status of a request that was sent and has an answer now.
    pub fn ended(&mut self) -> Option<(usize, u8)> {
        let (id, _) = self.driver.used()?;
        let at = self.sent.iter().position(|(sent, _)| *sent == id);
        let (_, place) = self
            .sent
            .swap_remove(at.expect("an answer to what was sent"));
        let [_, status] = places(place);
        Some((place, read_guest(&self.ram, status, 1)[0]))
    }

    /// Posts a request with `out` behind its header and room for `data_in` bytes before its status,
    /// and waits for the answer. What lies around the writable bytes must stay as it was.
    pub fn run(&mut self, kind: u32, sector: u64, out: &[u8], data_in: usize) -> Answer {
        let framing = Framing::usual(u32::try_from(data_in).unwrap());
        self.run_framed(kind, sector, out, data_in, &framing)
    }

    /// As [`FrontEnd::run`], cut up as `framing` says.
    pub fn run_framed(
        &mut self,
        kind: u32,
        sector: u64,
        out: &[u8],
        data_in: usize,
        framing: &Framing,
    ) -> Answer {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header.extend(out);
        write_guest(&self.ram, READABLE, &header);
        let room = data_in + 1;
        write_guest(&self.ram, WRITABLE - 64, &vec![AROUND; room + 128]);
        let mut bufs = cut(READABLE, header.len(), &framing.readable, false);
        bufs.extend(cut(WRITABLE, room, &framing.writable, true));
        let id = if framing.indirect {
            self.driver.add_indirect(&bufs, TABLE)
        } else {
            self.driver.add(&bufs)
        };
        let id = id.expect("an empty ring has room");
        if self.driver.publish() {
            self.kick.write(1).expect("the kick eventfd takes a write");
        }
        let deadline = Instant::now() + PATIENCE;
        let used = loop {
            if let Some((used_id, used)) = self.driver.used() {
                assert_eq!(used_id, id);
                break used;
            }
            assert!(Instant::now() < deadline, "request {kind} has no answer");
            std::thread::yield_now();
        };
        let mut data = read_guest(&self.ram, WRITABLE - 64, room + 128);
        let around = data.drain(..64).chain([]).collect::<Vec<_>>();
        assert_eq!(around, [AROUND; 64], "before the request's memory");
        assert_eq!(data.split_off(room), [AROUND; 64], "behind it");
        let status = data.pop().expect("a status byte");
        Answer { status, used, data }
    }
}

/// Where the header and the status of a sent request are, with its data behind one of them.
fn places(place: usize) -> [u64; 2] {
    let place = u64::try_from(place).unwrap() * 0x4000;
    [READABLE + place, WRITABLE + place]
}

/// The memory table, in so many regions.
fn regions(ram: &GuestRam, parts: u64) -> Vec<VhostUserMemoryRegionInfo> {
    let bytes = RAM / parts;
    let region = |at| VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: bytes,
        userspace_addr: UVA + at,
        mmap_offset: at,
        mmap_handle: ram.specs()[0].file.as_raw_fd(),
    };
    (0..parts).map(|part| region(part * bytes)).collect()
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// Cuts `total` bytes at `gpa` at the given places; no buffer is empty.
fn cut(gpa: u64, total: usize, cuts: &[u32], write: bool) -> Vec<Buf> {
    let total = u32::try_from(total).expect("a short request");
    let mut ends: Vec<u32> = cuts.iter().copied().filter(|cut| *cut < total).collect();
    ends.extend([0, total]);
    ends.sort_unstable();
    ends.dedup();
    let buf = |ends: &[u32]| Buf {
        addr: gpa + u64::from(ends[0]),
        len: ends[1] - ends[0],
        write,
    };
    ends.windows(2).map(buf).collect()
}

/// A `struct virtio_blk_discard_write_zeroes`.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}
