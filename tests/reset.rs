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
    pub mod guest;
    pub mod message;
}

#[cfg(test)]
mod tests {
    use vringd::ring::RingFormat;
    use vringd::testing::driver::{Buf, Calls, Driver, PackedDriver, SplitDriver, write_guest};

    use super::protocol::guest::{EVENT_IDX, Guest, HEADER, IN_ORDER, INDIRECT, PATIENCE};
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::tmp::TempDir;

    const MRG_RXBUF: u64 = 1 << 15;
    const NOTIFICATION_DATA: u64 = 1 << 38;
    const RING_RESET: u64 = 1 << 40;

    impl<D: Driver> Guest<D> {
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

        /// The same with a ring in the place of the one before it, of which all is set back.
        fn reset_in_place(&mut self, index: usize) {
            let vring = u32::try_from(index).unwrap();
            self.peer.get_base(vring);
            let ring = self.queues[index].driver.memory().clone();
            let bytes = usize::try_from(ring.end::<D::Format>() - ring.at[0]).unwrap();
            write_guest(&self.ram, ring.at[0], &vec![0; bytes]);
            self.queues[index] = self.start_at(vring, &ring);
        }

        /// Both queues of pair 0 call for what comes from now on.
        fn expect_calls(&mut self) {
            for queue in &mut self.queues[..2] {
                queue.driver.set_calls(Calls::Off);
            }
            // A call for what was used before may still be on its way; once the same worker has
            // used another burst it is there.
            self.echo(0);
            self.echo(0);
            for queue in &mut self.queues[..2] {
                let _ = queue.call.read();
                queue.driver.set_calls(Calls::On);
            }
            self.echo(0);
            for index in [0, 1] {
                let call = &self.queues[index].call;
                wait_until("a call", PATIENCE, || call.read().ok());
            }
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
        for features in sets() {
            let before = daemon.log().len();
            let mut guest = Guest::<D>::connect(&socket, features | RING_RESET, 2);
            let line = daemon.wait_log_after(before, "negotiated device=n0", PATIENCE);
            assert!(line.contains("VIRTIO_F_RING_RESET"), "{line}");
            for (bit, name) in NAMES {
                assert_eq!(line.contains(name), features & bit != 0, "{line}");
            }
            laps(&mut guest);
            sent += guest.sent;
        }
        let frames = daemon.counter("n0", "rx_frames");
        assert_eq!(frames, sent);
        let faults = daemon.counter("n0", "ring_faults");
        assert_eq!(faults, 0);
    }

    /// What may be taken besides.
    const NAMES: [(u64, &str); 5] = [
        (EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
        (IN_ORDER, "VIRTIO_F_IN_ORDER"),
        (INDIRECT, "VIRTIO_F_INDIRECT_DESC"),
        (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
        (NOTIFICATION_DATA, "VIRTIO_F_NOTIFICATION_DATA"),
    ];

    /// Every set of the first four, on which the layout and the use of chains depend; half of them
    /// with the fifth, which changes nothing at a ring.
    fn sets() -> impl Iterator<Item = u64> {
        (0..16_u32).map(|number| {
            let bits = NAMES[..4].iter().enumerate();
            let taken = bits.filter(|(at, _)| number & (1 << at) != 0);
            let odd = u64::from(number.count_ones() % 2);
            taken.map(|(_, (bit, _))| bit).sum::<u64>() | (odd * NOTIFICATION_DATA)
        })
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
                (0..4).for_each(|_| guest.echo(0));
                guest.reset_in_place(index);
            }
            guest.expect_calls();
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
