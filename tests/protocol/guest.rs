//! A network driver of our own at a daemon that is really there: virtqueues that come and go, and
//! frames out and back, every byte of them compared.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vringd::memory::GuestRam;
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Calls, Driver, RingMemory, read_guest, write_guest};

use super::front_end::{Peer, eventfd};
use super::message::{self as m, Region};
use crate::support::deadline::wait_until;

pub const PATIENCE: Duration = Duration::from_secs(10);
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const IN_ORDER: u64 = 1 << 35;
const RAM: u64 = 16 << 20;
/// Where the rings are, one after another, never twice; the buffers, and their tables.
const RINGS: u64 = 0x1000;
const BUFFERS: u64 = 8 << 20;
const TABLES: u64 = 12 << 20;
const BUFFER: u64 = 2048;
const PLACES: u64 = 64;
pub const HEADER: usize = 12;

/// A virtqueue as its driver has it.
pub struct Queue<D> {
    pub driver: D,
    pub size: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

/// A driver with queue pairs at a port that sends every frame back.
pub struct Guest<D> {
    pub ram: Arc<GuestRam>,
    pub peer: Peer,
    /// Beside those that all of them take.
    features: u64,
    pub queues: Vec<Queue<D>>,
    next_ring: u64,
    /// Frames that came back.
    pub sent: u64,
}

impl<D: Driver> Guest<D> {
    /// With rings of 64 for `pairs` queue pairs.
    pub fn connect(socket: &Path, features: u64, pairs: u32) -> Guest<D> {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let peer = Peer::new(UnixStream::connect(socket).unwrap());
        let packed = if D::Format::PACKED {
            m::F_RING_PACKED
        } else {
            0
        };
        let always = m::F_VERSION_1 | m::F_PROTOCOL_FEATURES;
        peer.negotiate(always | packed | features, m::P_ALL);
        let file = Arc::clone(&ram.specs()[0].file);
        peer.ok(&m::mem_table(&[Region {
            gpa: 0,
            size: RAM,
            offset: 0,
            file: &file,
        }]));
        let mut guest = Guest {
            ram,
            peer,
            features,
            queues: Vec::new(),
            next_ring: RINGS,
            sent: 0,
        };
        for index in 0..2 * pairs {
            let queue = guest.start(index, 64);
            guest.queues.push(queue);
        }
        guest
    }

    /// Describes and starts vring `index`, fresh, with `size` descriptors. Of a pair, the first
    /// receives and the second transmits (VIRTIO 1.3 §5.1.2).
    pub fn start(&mut self, index: u32, size: u16) -> Queue<D> {
        let ring = RingMemory::new::<D::Format>(&self.ram, self.next_ring, size);
        self.next_ring = ring.end::<D::Format>().next_multiple_of(4096);
        assert!(self.next_ring <= BUFFERS);
        self.start_at(index, &ring)
    }

    /// The same, in memory that nothing of a ring is left in.
    pub fn start_at(&mut self, index: u32, ring: &RingMemory) -> Queue<D> {
        let (size, kick, call) = (ring.size, eventfd(), eventfd());
        let [desc, driver, device] = ring.at.map(|gpa| m::UVA + gpa);
        let peer = &self.peer;
        peer.ok(&m::state(m::SET_VRING_NUM, index, size.into()));
        let base = if D::Format::PACKED { 0x8000_8000 } else { 0 };
        peer.ok(&m::state(m::SET_VRING_BASE, index, base));
        let words = [index.into(), desc, device, driver, 0];
        peer.ok(&m::words(m::SET_VRING_ADDR, &words));
        peer.ok(&m::vring_fd(m::SET_VRING_CALL, index, Some(&call)));
        peer.ok(&m::vring_fd(m::SET_VRING_KICK, index, Some(&kick)));
        peer.ok(&m::enable(index, true));
        let mut driver = D::new(ring, self.features & EVENT_IDX != 0);
        driver.set_in_order(self.features & IN_ORDER != 0);
        driver.set_calls(Calls::On);
        Queue {
            driver,
            size,
            kick,
            call,
        }
    }

    pub fn buffer(index: usize, place: u64) -> u64 {
        BUFFERS + (index as u64 * PLACES + place) * BUFFER
    }

    /// Makes a buffer available, every other one of its place in a table where there may be
    /// some.
    pub fn add(&mut self, index: usize, place: u64, buf: Buf) {
        let queue = &mut self.queues[index];
        let table = TABLES + (index as u64 * PLACES + place) * 16;
        let added = if self.features & INDIRECT != 0 && place.is_multiple_of(2) {
            queue.driver.add_indirect(&[buf], table)
        } else {
            queue.driver.add(&[buf])
        };
        added.unwrap();
        if queue.driver.publish() {
            queue.kick.write(1).unwrap();
        }
    }

    /// Sends the next frame out of queue pair `pair`, with a buffer for it to come back to or
    /// without. Returns that buffer and the frame.
    pub fn send(&mut self, pair: usize, with_buffer: bool) -> (u64, Vec<u8>) {
        self.sent += 1;
        let place = self.sent % PLACES;
        let len = 60 + self.sent % 1400;
        let frame: Vec<u8> = (0..len)
            .map(|at| (at * 31 + self.sent * 7).to_le_bytes()[0])
            .collect();
        let (rx, tx) = (2 * pair, 2 * pair + 1);
        let [to, from] = [rx, tx].map(|index| Self::buffer(index, place));
        if with_buffer {
            let buf = Buf::writable(to, u32::try_from(BUFFER).unwrap());
            self.add(rx, place, buf);
        }
        write_guest(&self.ram, from, &[0; HEADER]);
        write_guest(&self.ram, from + HEADER as u64, &frame);
        let bytes = u32::try_from(HEADER as u64 + len).unwrap();
        self.add(tx, place, Buf::readable(from, bytes));
        (to, frame)
    }

    /// Waits until vring `index` has used its next buffer, for so many bytes.
    pub fn reap(&mut self, index: usize, written: usize) {
        let driver = &mut self.queues[index].driver;
        let (_, used) = wait_until("the buffer is used", PATIENCE, || driver.used());
        assert_eq!(used as usize, written, "vring {index}");
    }

    pub fn compare(&self, (to, frame): &(u64, Vec<u8>)) {
        let got = read_guest(&self.ram, to + HEADER as u64, frame.len());
        assert!(got == *frame, "a frame of {} of them", self.sent);
    }

    /// One frame out of queue pair `pair` and back, every byte compared.
    pub fn echo(&mut self, pair: usize) {
        let sent = self.send(pair, true);
        self.reap(2 * pair + 1, 0);
        self.reap(2 * pair, HEADER + sent.1.len());
        self.compare(&sent);
    }
}
