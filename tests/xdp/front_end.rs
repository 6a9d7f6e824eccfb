//! A front-end of ours for a port of the real daemon: messages by hand, rings by the test driver.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vringd::memory::{GuestRam, RegionSpec, memfd};
use vringd::ring::{RingFormat, VringBase};
use vringd::testing::driver::{Buf, Driver, RingMemory, read_guest, write_guest};

use crate::message::{self as m, Message, Region};
use crate::support::deadline::wait_until;

pub const PATIENCE: Duration = Duration::from_secs(10);
const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;
/// CSUM, GUEST_CSUM, GUEST_TSO4/6, GUEST_ECN, HOST_TSO4/6, HOST_ECN.
const OFFLOADS: u64 = 0b11 | 0b111 << 7 | 0b111 << 11;
const HEADER: usize = 12;
/// Descriptors of each ring, and memory for each.
pub const SIZE: u16 = 64;
const STRIDE: u64 = 0x20_0000;
/// Where the buffers of a ring begin, and how far they are from each other.
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x4000;
/// Bytes of a receive buffer: a frame of 9000 bytes takes three.
const RX_BYTES: u32 = 4096;

/// One virtqueue, driver side.
pub struct Queue<D> {
    driver: D,
    at: u64,
    kick: EventFd,
    /// Buffer of each chain, by its id.
    buffers: Vec<u64>,
    sent: u64,
}

/// A guest with `D`'s rings.
pub struct FrontEnd<D> {
    socket: UnixStream,
    pub ram: Arc<GuestRam>,
    /// Receive and transmit queue of each pair.
    queues: Vec<Queue<D>>,
}

impl<D: Driver> FrontEnd<D> {
    pub fn connect(socket: &Path, pairs: u64) -> FrontEnd<D> {
        FrontEnd::connect_with(socket, pairs, 0)
    }

    /// With more features.
    pub fn connect_with(socket: &Path, pairs: u64, more: u64) -> FrontEnd<D> {
        let bytes = STRIDE * pairs * 2;
        let file = Arc::new(memfd(bytes).unwrap());
        let region = RegionSpec {
            gpa: 0,
            size: bytes,
            uva: vringd::testing::driver::UVA,
            mmap_offset: 0,
            file: Arc::clone(&file),
        };
        let ram = Arc::new(GuestRam::map(vec![region], None).unwrap());
        let socket = wait_until("the socket", PATIENCE, || UnixStream::connect(socket).ok());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut front_end = FrontEnd {
            socket,
            ram,
            queues: Vec::new(),
        };
        front_end.negotiate(more | if pairs > 1 { MQ } else { 0 });
        front_end.share(&file, bytes);
        for index in 0..u32::try_from(pairs * 2).unwrap() {
            let queue = front_end.start(index);
            front_end.queues.push(queue);
        }
        front_end
    }

    fn negotiate(&self, more: u64) {
        let offered = self.get(m::GET_FEATURES);
        assert_eq!(offered & OFFLOADS, OFFLOADS, "{offered:#x}");
        let packed = if D::Format::PACKED {
            m::F_RING_PACKED
        } else {
            0
        };
        let features = m::F_PROTOCOL_FEATURES | m::F_VERSION_1 | MRG_RXBUF | packed | more;
        assert_eq!(features & !offered, 0, "{offered:#x}");
        // MQ and REPLY_ACK.
        let protocol = m::P_REPLY_ACK | 1;
        assert_eq!(protocol & !self.get(m::GET_PROTOCOL_FEATURES), 0);
        self.send(
            &m::u64_message(m::SET_PROTOCOL_FEATURES, protocol),
            m::VERSION,
        );
        self.ok(&Message::new(m::SET_OWNER, &[]));
        self.ok(&m::u64_message(m::SET_FEATURES, features));
    }

    fn share(&self, file: &File, size: u64) {
        let region = Region {
            gpa: 0,
            size,
            offset: 0,
            file,
        };
        self.ok(&m::mem_table(&[region]));
    }

    fn start(&self, index: u32) -> Queue<D> {
        let at = u64::from(index) * STRIDE;
        let memory = RingMemory::new::<D::Format>(&self.ram, at, SIZE);
        let [desc, driver, device] = memory.at.map(|gpa| gpa + m::UVA);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue = Queue {
            driver: D::new(&memory, false),
            at: at + BUFFERS,
            kick,
            buffers: vec![0; usize::from(SIZE)],
            sent: 0,
        };
        if index.is_multiple_of(2) {
            (0..SIZE).for_each(|number| queue.post(u64::from(number)));
            queue.driver.publish();
        }
        let base = VringBase::fresh(D::Format::PACKED).to_u32(D::Format::PACKED);
        self.ok(&m::state(m::SET_VRING_NUM, index, SIZE.into()));
        self.ok(&m::state(m::SET_VRING_BASE, index, base));
        let words = [u64::from(index), desc, device, driver, 0];
        self.ok(&m::words(m::SET_VRING_ADDR, &words));
        self.ok(&m::vring_fd(m::SET_VRING_KICK, index, Some(&queue.kick)));
        self.ok(&m::enable(index, true));
        queue
    }

    /// SET_VRING_ENABLE.
    pub fn enable(&self, index: u32, on: bool) {
        self.ok(&m::enable(index, on));
    }

    /// GET_VRING_BASE.
    pub fn stop(&self, index: u32) {
        self.send(&m::state(m::GET_VRING_BASE, index, 0), m::VERSION);
        self.answer();
    }

    fn send(&self, message: &Message, flags: u32) {
        let fds: Vec<_> = message.fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let bytes = message.bytes(flags);
        let sent = self.socket.send_with_fds(&[&bytes[..]], &fds).unwrap();
        assert_eq!(sent, bytes.len());
    }

    fn answer(&self) -> u64 {
        let mut answer = [0; 20];
        (&self.socket).read_exact(&mut answer).unwrap();
        u64::from_ne_bytes(answer[12..].try_into().unwrap())
    }

    fn get(&self, request: u32) -> u64 {
        self.send(&Message::new(request, &[]), m::VERSION);
        self.answer()
    }

    fn ok(&self, message: &Message) {
        self.send(message, m::VERSION | m::NEED_REPLY);
        assert_eq!(self.answer(), 0, "request {} refused", message.request);
    }

    /// Sends a frame on `pair`, and waits until its buffer is back.
    pub fn transmit(&mut self, pair: usize, frame: &[u8]) {
        self.transmit_with(pair, &[0; HEADER], frame);
    }

    /// The same with a virtio-net header.
    pub fn transmit_with(&mut self, pair: usize, header: &[u8; HEADER], frame: &[u8]) {
        self.transmit_all(pair, header, &[frame]);
    }

    /// Sends frames at once, at most as many as the ring has room for, and waits until their
    /// buffers are back.
    pub fn transmit_all(&mut self, pair: usize, header: &[u8; HEADER], frames: &[&[u8]]) {
        let ram = Arc::clone(&self.ram);
        let queue = &mut self.queues[2 * pair + 1];
        for frame in frames {
            let at = queue.at + queue.sent % u64::from(SIZE) * BUFFER;
            queue.sent += 1;
            write_guest(&ram, at, &[&header[..], frame].concat());
            // In two pieces, the header apart from most of the frame.
            let (first, bytes) = (HEADER + 14, HEADER + frame.len());
            let length = |bytes: usize| u32::try_from(bytes).unwrap();
            let pieces = [
                Buf::readable(at, length(first)),
                Buf::readable(at + first as u64, length(bytes - first)),
            ];
            queue.driver.add(&pieces).unwrap();
        }
        queue.show();
        for _ in frames {
            wait_until("the buffer", PATIENCE, || queue.driver.used());
        }
    }

    /// The next frame that `pair` receives, if there is one.
    pub fn poll(&mut self, pair: usize) -> Option<Vec<u8>> {
        self.next(pair, true)
    }

    /// The same, and its buffers are not given to the device again.
    pub fn take(&mut self, pair: usize) -> Option<Vec<u8>> {
        self.next(pair, false)
    }

    fn next(&mut self, pair: usize, again: bool) -> Option<Vec<u8>> {
        let (header, frame) = self.next_with(pair, again)?;
        assert_eq!(header, [0; HEADER - 2], "nothing is left to be done");
        Some(frame)
    }

    /// With what its header leaves to be done.
    fn next_with(&mut self, pair: usize, again: bool) -> Option<([u8; HEADER - 2], Vec<u8>)> {
        let ram = Arc::clone(&self.ram);
        let queue = &mut self.queues[2 * pair];
        let (mut bytes, mut left, mut header) = (Vec::new(), 1, [0; HEADER - 2]);
        while left > 0 {
            let used = match bytes.len() {
                0 => queue.driver.used()?,
                _ => wait_until("all buffers", PATIENCE, || queue.driver.used()),
            };
            let at = queue.buffers[usize::from(used.0)];
            let piece = read_guest(&ram, at, used.1 as usize);
            if bytes.is_empty() {
                left = u16::from_le_bytes([piece[10], piece[11]]);
                header.copy_from_slice(&piece[..10]);
                bytes.extend(&piece[HEADER..]);
            } else {
                bytes.extend(piece);
            }
            left -= 1;
            if again {
                queue.post((at - queue.at) / BUFFER);
            }
        }
        queue.show();
        Some((header, bytes))
    }

    pub fn receive(&mut self, pair: usize) -> Vec<u8> {
        wait_until("a frame", PATIENCE, || self.poll(pair))
    }

    /// The next frame that `pair` receives and `wanted` says yes to, with what its header leaves to
    /// be done.
    pub fn receive_if(
        &mut self,
        pair: usize,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> ([u8; HEADER - 2], Vec<u8>) {
        wait_until("a frame of ours", PATIENCE, || {
            self.next_with(pair, true).filter(|got| wanted(&got.1))
        })
    }
}

impl<D: Driver> Queue<D> {
    /// Adds receive buffer `number`.
    fn post(&mut self, number: u64) {
        let at = self.at + number * BUFFER;
        let id = self.driver.add(&[Buf::writable(at, RX_BYTES)]).unwrap();
        self.buffers[usize::from(id)] = at;
    }

    fn show(&mut self) {
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }
}
