//! VIRTIO_F_RING_RESET with the real daemon: a front-end of our own takes single virtqueues out of
//! use and back, with another size, while the queue pair beside them is under traffic; with what
//! changes how chains are laid out and used, and some of them not taken back, or not used yet.
//!
//! vhost-user has no message for a reset: GET_VRING_BASE stops the vring, and it is described and
//! started again at base 0 (VIRTIO 1.3 §2.6.1).

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the tests beside them")]
#[allow(dead_code, reason = "not all of them are needed here")]
#[path = "protocol"]
mod protocol {
    pub mod fake;
    pub mod front_end;
    pub mod message;
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::Duration;

    use vmm_sys_util::eventfd::EventFd;
    use vringd::memory::GuestRam;
    use vringd::ring::RingFormat;
    use vringd::testing::driver::{
        Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
    };

    use super::protocol::front_end::{Peer, eventfd};
    use super::protocol::message::{self as m, Region};
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::tmp::TempDir;

    const PATIENCE: Duration = Duration::from_secs(10);
    const RING_RESET: u64 = 1 << 40;
    const MRG_RXBUF: u64 = 1 << 15;
    const INDIRECT: u64 = 1 << 28;
    const EVENT_IDX: u64 = 1 << 29;
    const IN_ORDER: u64 = 1 << 35;
    const RAM: u64 = 16 << 20;
    /// Where the rings are, one after another, never twice; the buffers, and their tables.
    const RINGS: u64 = 0x1000;
    const BUFFERS: u64 = 8 << 20;
    const TABLES: u64 = 12 << 20;
    const BUFFER: u64 = 2048;
    const PLACES: u64 = 64;
    const HEADER: usize = 12;

    /// A virtqueue as its driver has it.
    struct Queue<D> {
        driver: D,
        size: u16,
        kick: EventFd,
    }

    struct Guest<D> {
        ram: Arc<GuestRam>,
        peer: Peer,
        /// Some of EVENT_IDX, IN_ORDER and INDIRECT.
        features: u64,
        queues: Vec<Queue<D>>,
        next_ring: u64,
        /// Frames that came back.
        sent: u64,
    }

    impl<D: Driver> Guest<D> {
        fn connect(socket: &std::path::Path, features: u64) -> Guest<D> {
            let ram = GuestRam::for_test(&[(0, RAM)]);
            let peer = Peer::new(UnixStream::connect(socket).unwrap());
            let packed = if D::Format::PACKED {
                m::F_RING_PACKED
            } else {
                0
            };
            let always = m::F_VERSION_1 | m::F_PROTOCOL_FEATURES | RING_RESET | MRG_RXBUF;
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
            for index in 0..4 {
                let queue = guest.start(index, 64);
                guest.queues.push(queue);
            }
            guest
        }

        /// Describes and starts vring `index`, fresh, with `size` descriptors. Of a pair, the first
        /// receives and the second transmits (VIRTIO 1.3 §5.1.2).
        fn start(&mut self, index: u32, size: u16) -> Queue<D> {
            let ring = RingMemory::new::<D::Format>(&self.ram, self.next_ring, size);
            self.next_ring = ring.end::<D::Format>().next_multiple_of(4096);
            assert!(self.next_ring <= BUFFERS);
            let kick = eventfd();
            let [desc, driver, device] = ring.at.map(|gpa| m::UVA + gpa);
            let peer = &self.peer;
            peer.ok(&m::state(m::SET_VRING_NUM, index, size.into()));
            let base = if D::Format::PACKED { 0x8000_8000 } else { 0 };
            peer.ok(&m::state(m::SET_VRING_BASE, index, base));
            let words = [index.into(), desc, device, driver, 0];
            peer.ok(&m::words(m::SET_VRING_ADDR, &words));
            peer.ok(&m::vring_fd(m::SET_VRING_CALL, index, Some(&eventfd())));
            peer.ok(&m::vring_fd(m::SET_VRING_KICK, index, Some(&kick)));
            peer.ok(&m::enable(index, true));
            let mut driver = D::new(&ring, self.features & EVENT_IDX != 0);
            driver.set_in_order(self.features & IN_ORDER != 0);
            Queue { driver, size, kick }
        }

        fn buffer(index: usize, place: u64) -> u64 {
            BUFFERS + (index as u64 * PLACES + place) * BUFFER
        }

        /// Makes a buffer available, every other one of its place in a table where there may be
        /// some.
        fn add(&mut self, index: usize, place: u64, buf: Buf) {
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
        fn send(&mut self, pair: usize, with_buffer: bool) -> (u64, Vec<u8>) {
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
        fn reap(&mut self, index: usize, written: usize) {
            let driver = &mut self.queues[index].driver;
            let (_, used) = wait_until("the buffer is used", PATIENCE, || driver.used());
            assert_eq!(used as usize, written, "vring {index}");
        }

        fn compare(&self, (to, frame): &(u64, Vec<u8>)) {
            let got = read_guest(&self.ram, to + HEADER as u64, frame.len());
            assert!(got == *frame, "a frame of {} of them", self.sent);
        }

        /// One frame out of queue pair `pair` and back, every byte compared.
        fn echo(&mut self, pair: usize) {
            let sent = self.send(pair, true);
            self.reap(2 * pair + 1, 0);
            self.reap(2 * pair, HEADER + sent.1.len());
            self.compare(&sent);
        }

        /// Frames of pair 0 that come back and whose own buffers are not taken back, and behind
        /// them some that nothing has room for.
        fn leave_in_flight(&mut self) {
            let room = self.queues[0].size.min(self.queues[1].size);
            let count = room.min(5);
            let sent: Vec<_> = (0..count).map(|_| self.send(0, true)).collect();
            for frame in &sent {
                self.reap(0, HEADER + frame.1.len());
                self.compare(frame);
            }
            for _ in 0..(self.queues[1].size - count).min(3) {
                self.send(0, false);
                // It never comes.
                self.sent -= 1;
            }
        }

        /// Takes vring `index` out of use and back, with another size. Buffers that it held are
        /// forgotten: the driver has reset it.
        fn reset(&mut self, index: usize, size: u16) {
            let vring = u32::try_from(index).unwrap();
            self.peer.get_base(vring);
            // While it is gone, the other pair goes on.
            (0..3).for_each(|_| self.echo(1));
            self.queues[index] = self.start(vring, size);
        }
    }

    fn resets<D: Driver>() {
        let directory = TempDir::new("reset");
        let socket = directory.path("s");
        let net = format!(
            "name=n0,socket={},link=echo,queues=2,ring_reset=on",
            socket.display()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let mut sent = 0;
        for number in 0..8 {
            let bits = [EVENT_IDX, IN_ORDER, INDIRECT].into_iter().enumerate();
            let bits = bits.filter(|(at, _)| number & (1 << at) != 0);
            let mut guest = Guest::<D>::connect(&socket, bits.map(|(_, bit)| bit).sum());
            let line = daemon.wait_log("negotiated device=n0", PATIENCE);
            assert!(line.contains("VIRTIO_F_RING_RESET"), "{line}");
            laps(&mut guest);
            sent += guest.sent;
        }
        let frames = daemon.counter("n0", "rx_frames");
        assert_eq!(frames, sent);
        let faults = daemon.counter("n0", "ring_faults");
        assert_eq!(faults, 0);
    }

    fn laps<D: Driver>(guest: &mut Guest<D>) {
        let odd = if D::Format::PACKED { 33 } else { 128 };
        for (lap, size) in [64u16, 256, 2, 1024, odd, 16].into_iter().enumerate() {
            for index in [1, 0] {
                for _ in 0..4 {
                    guest.echo(0);
                    guest.echo(1);
                }
                if index == 1 {
                    guest.leave_in_flight();
                }
                if lap % 2 == 1 && index == 0 {
                    // Buffers of the receive queue that nothing has come for.
                    let place = Guest::<D>::buffer(0, 0);
                    guest.add(0, 0, Buf::writable(place, 2048));
                }
                guest.reset(index, size);
            }
            if lap % 3 == 2 {
                // A frame that nobody has room for goes when the receive queue is back.
                guest.reset(0, size);
            }
        }
        for _ in 0..50 {
            guest.echo(0);
            guest.echo(1);
        }
    }

    #[test]
    fn a_virtqueue_is_reset_under_traffic_split() {
        resets::<SplitDriver>();
    }

    #[test]
    fn a_virtqueue_is_reset_under_traffic_packed() {
        resets::<PackedDriver>();
    }
}
