//! VIRTIO_F_RING_RESET with the real daemon: a front-end of our own takes single virtqueues out of
//! use and back, with another size, while the queue pair beside them is under traffic.
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
    const RAM: u64 = 16 << 20;
    /// Where the rings are, one after another, never twice; and the buffers.
    const RINGS: u64 = 0x1000;
    const BUFFERS: u64 = 8 << 20;
    const BUFFER: u64 = 2048;
    const PLACES: u64 = 64;
    const HEADER: usize = 12;

    /// A virtqueue as its driver has it.
    struct Queue<D> {
        driver: D,
        kick: EventFd,
    }

    struct Guest<D> {
        ram: Arc<GuestRam>,
        peer: Peer,
        queues: Vec<Queue<D>>,
        next_ring: u64,
        sent: u64,
    }

    impl<D: Driver> Guest<D> {
        fn connect(socket: &std::path::Path) -> Guest<D> {
            let ram = GuestRam::for_test(&[(0, RAM)]);
            let peer = Peer::new(UnixStream::connect(socket).unwrap());
            let packed = if D::Format::PACKED {
                m::F_RING_PACKED
            } else {
                0
            };
            let features =
                m::F_VERSION_1 | m::F_PROTOCOL_FEATURES | RING_RESET | MRG_RXBUF | packed;
            peer.negotiate(features, m::P_ALL);
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
            Queue {
                driver: D::new(&ring, false),
                kick,
            }
        }

        fn buffer(index: usize, place: u64) -> u64 {
            BUFFERS + (index as u64 * PLACES + place) * BUFFER
        }

        fn add(&mut self, index: usize, buf: Buf) {
            let queue = &mut self.queues[index];
            queue.driver.add(&[buf]).unwrap();
            if queue.driver.publish() {
                queue.kick.write(1).unwrap();
            }
        }

        /// One frame out of queue pair `pair` and back, every byte compared.
        fn echo(&mut self, pair: usize) {
            self.sent += 1;
            let place = self.sent % PLACES;
            let len = 60 + self.sent % 1400;
            let frame: Vec<u8> = (0..len)
                .map(|at| (at * 31 + self.sent * 7).to_le_bytes()[0])
                .collect();
            let (rx, tx) = (2 * pair, 2 * pair + 1);
            let [to, from] = [rx, tx].map(|index| Self::buffer(index, place));
            self.add(rx, Buf::writable(to, u32::try_from(BUFFER).unwrap()));
            write_guest(&self.ram, from, &[0; HEADER]);
            write_guest(&self.ram, from + HEADER as u64, &frame);
            let bytes = u32::try_from(HEADER as u64 + len).unwrap();
            self.add(tx, Buf::readable(from, bytes));
            for (index, written) in [(tx, 0), (rx, bytes)] {
                let driver = &mut self.queues[index].driver;
                let (_, used) = wait_until("the buffer is used", PATIENCE, || driver.used());
                assert_eq!(used, written, "vring {index}");
            }
            let got = read_guest(&self.ram, to + HEADER as u64, frame.len());
            assert!(got == frame, "frame {} through pair {pair}", self.sent);
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
        let mut guest = Guest::<D>::connect(&socket);
        let line = daemon.wait_log("negotiated device=n0", PATIENCE);
        assert!(line.contains("VIRTIO_F_RING_RESET"), "{line}");
        for (lap, size) in [64u16, 256, 2, 1024, 128, 16].into_iter().enumerate() {
            for index in [1, 0] {
                for _ in 0..10 {
                    guest.echo(0);
                    guest.echo(1);
                }
                if lap % 2 == 1 && index == 0 {
                    // Buffers of the receive queue that nothing has come for.
                    let place = Guest::<D>::buffer(0, 0);
                    guest.add(0, Buf::writable(place, 2048));
                }
                guest.reset(index, size);
            }
            if lap % 3 == 2 {
                // A frame that nobody has room for goes when the receive queue is back.
                guest.reset(0, size);
            }
        }
        for _ in 0..200 {
            guest.echo(0);
            guest.echo(1);
        }
        let frames = daemon.counter("n0", "rx_frames");
        assert_eq!(frames, guest.sent);
        let faults = daemon.counter("n0", "ring_faults");
        assert_eq!(faults, 0);
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
