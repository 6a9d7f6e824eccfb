//! A front-end of a disk with several queues and many requests in flight: the `vhost` crate's
//! messages and the rings of `src/testing`. It polls; calls are off.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::memory::GuestRam;
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Calls, Driver, RingMemory, UVA, read_guest, write_guest};

pub use crate::support::virtio_blk::*;

/// Longer than any answer takes on an emulated CPU.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const QUEUES: usize = 2;
/// Requests in flight at most.
pub const DEPTH: usize = 48;
/// Bytes of data of a request at most.
pub const DATA: usize = 64 << 10;
const RING: u16 = 256;
const RINGS: u64 = 1 << 20;
/// Header and status are in the first page of a request's memory, the data behind it.
const SLOT: u64 = 4096 + DATA as u64;
const STATUS: u64 = 2048;
const UNANSWERED: u8 = 0xee;

struct Queue<D> {
    driver: D,
    kick: EventFd,
    /// Slot and name of each request in flight, by the id of its chain.
    in_flight: HashMap<u16, (usize, u32)>,
}

pub struct FrontEnd<D: Driver> {
    front: Frontend,
    ram: Arc<GuestRam>,
    queues: Vec<Queue<D>>,
    free: Vec<usize>,
    features: u64,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

impl<D: Driver> FrontEnd<D> {
    /// Connects and starts all queues; every one of `features` has to be offered.
    pub fn open(socket: &Path, features: u64) -> FrontEnd<D> {
        let socket = UnixStream::connect(socket).expect("the daemon listens");
        // The crate's front-end waits for ever.
        let patience = Some(PATIENCE);
        socket.set_read_timeout(patience).expect("a time-out");
        let mut front = Frontend::from_stream(socket, QUEUES as u64);
        front.set_owner().unwrap();
        let packed = if D::Format::PACKED { F_PACKED } else { 0 };
        let features = features | F_MQ | F_PROTOCOL | F_VERSION_1 | F_INDIRECT | packed;
        let offered = front.get_features().unwrap();
        assert_eq!(offered & features, features, "features offered");
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol & wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(features).unwrap();
        let size = RINGS + SLOT * DEPTH as u64;
        let ram = GuestRam::for_test(&[(0, size)]);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: size,
            userspace_addr: UVA,
            mmap_offset: 0,
            mmap_handle: ram.specs()[0].file.as_raw_fd(),
        };
        front.set_mem_table(&[region]).unwrap();
        let queues = (0..QUEUES).map(|index| start(&mut front, &ram, index));
        FrontEnd {
            queues: queues.collect(),
            front,
            ram,
            free: (0..DEPTH).collect(),
            features,
        }
    }

    /// Writes one byte of config space.
    pub fn set_config(&mut self, offset: u32, byte: u8) {
        let flags = VhostUserConfigFlags::WRITABLE;
        let set = self.front.set_config(offset, flags, &[byte]);
        set.unwrap_or_else(|error| panic!("config space at {offset}: {error}"));
    }

    /// The disk's size in sectors, from config space.
    pub fn sectors(&mut self) -> u64 {
        let flags = VhostUserConfigFlags::WRITABLE;
        let read = self.front.get_config(0, 8, flags, &[0; 8]);
        let (_, bytes) = read.expect("config space");
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    }

    /// What was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// Makes a request with `data` behind its header available. There has to be room for it.
    pub fn submit(&mut self, queue: usize, name: u32, kind: u32, sector: u64, data: &[u8]) {
        let slot = self.free.pop().expect("fewer requests than DEPTH");
        let at = RINGS + SLOT * slot as u64;
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        write_guest(&self.ram, at, &header);
        write_guest(&self.ram, at + STATUS, &[UNANSWERED]);
        let mut bufs = vec![Buf::readable(at, 16)];
        if !data.is_empty() {
            write_guest(&self.ram, at + 4096, data);
            let bytes = u32::try_from(data.len()).expect("at most DATA");
            bufs.push(Buf::readable(at + 4096, bytes));
        }
        bufs.push(Buf::writable(at + STATUS, 1));
        let queue = &mut self.queues[queue];
        let id = queue.driver.add(&bufs).expect("a ring for all requests");
        queue.in_flight.insert(id, (slot, name));
        if queue.driver.publish() {
            queue.kick.write(1).expect("the kick eventfd takes a write");
        }
    }

    /// Names of the requests that were answered since, at least one. All are to succeed.
    pub fn reap(&mut self) -> Vec<u32> {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.is_empty() {
            for queue in &mut self.queues {
                while let Some((id, used)) = queue.driver.used() {
                    let (slot, name) = queue.in_flight.remove(&id).expect("a request in flight");
                    let at = RINGS + SLOT * slot as u64 + STATUS;
                    let status = read_guest(&self.ram, at, 1);
                    assert_eq!((status[0], used), (0, 1), "request {name}");
                    self.free.push(slot);
                    done.push(name);
                }
            }
            let late = Instant::now() > deadline;
            assert!(!late, "{} requests unanswered", self.in_flight());
            std::thread::yield_now();
        }
        done
    }
}

/// Tells the daemon of one vring and starts it.
fn start<D: Driver>(front: &mut Frontend, ram: &Arc<GuestRam>, index: usize) -> Queue<D> {
    let memory = RingMemory::new::<D::Format>(ram, 0x2_0000 * index as u64, RING);
    front.set_vring_num(index, RING).unwrap();
    let addresses = VringConfigData {
        queue_max_size: RING,
        queue_size: RING,
        flags: 0,
        desc_table_addr: UVA + memory.at[0],
        used_ring_addr: UVA + memory.at[2],
        avail_ring_addr: UVA + memory.at[1],
        log_addr: None,
    };
    front.set_vring_addr(index, &addresses).unwrap();
    let (kick, call) = (eventfd(), eventfd());
    front.set_vring_kick(index, &kick).unwrap();
    front.set_vring_call(index, &call).unwrap();
    let mut driver = D::new(&memory, false);
    driver.set_calls(Calls::Off);
    front.set_vring_enable(index, true).unwrap();
    Queue {
        driver,
        kick,
        in_flight: HashMap::new(),
    }
}
