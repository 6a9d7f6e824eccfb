//! Ports on an interface (`link=xdp:IFACE`): the real daemon between a front-end of ours and a
//! cable.
//!
//! The interface is one end of a pair of veth interfaces in a namespace of the test's own; a packet
//! socket on the other end sees what the guest sends and sends what the guest must receive. Needs
//! root.

#[cfg(test)]
#[path = "protocol/message.rs"]
#[expect(dead_code, unreachable_pub, reason = "the protocol tests use the rest")]
mod message;
mod support;

#[cfg(test)]
#[path = "xdp/front_end.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared by several tests")]
mod front_end;

#[cfg(test)]
#[path = "xdp/csum.rs"]
mod csum;

#[cfg(test)]
#[path = "xdp/passed.rs"]
mod passed;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use vringd::sys::testnet::{ETHERTYPE, PacketSocket, VNET_HEADER};
    use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

    use super::front_end::{self, FrontEnd, PATIENCE};
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::netns::Netns;
    use super::support::tmp::TempDir;

    /// A namespace with a cable between `xa` and `xb`.
    pub(super) fn cable(queues: u16, mtu: u16) -> Netns {
        let netns = Netns::new();
        let ends = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
        netns.ok(&format!(
            "sysctl -qw net.ipv6.conf.default.disable_ipv6=1 && \
             ip link add xa {ends} type veth peer name xb {ends} && \
             ip link set xa up && ip link set xb up"
        ));
        netns
    }

    pub(super) fn peer(netns: &Netns) -> PacketSocket {
        netns.spawn(|| PacketSocket::bind("xb")).join().unwrap()
    }

    fn daemon(netns: &Netns, socket: &Path, options: &str, idle: &str) -> Daemon {
        // Two queue pairs on two workers, one on one.
        let cores = if options.contains("queues=2") {
            "0,1"
        } else {
            "1"
        };
        let net = format!("name=net0,socket={},link=xdp:xa{options}", socket.display());
        Daemon::start_in(
            netns,
            &["run", "--core", cores, "--idle", idle, "--net", &net],
        )
    }

    pub(super) fn has_program(netns: &Netns) -> bool {
        netns.ok("ip -d link show xa").contains("prog/xdp")
    }

    /// An Ethernet frame of `len` bytes.
    pub(super) fn frame(len: usize, seed: usize) -> Vec<u8> {
        let seed = seed.to_le_bytes();
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, seed[1], seed[0]]);
        frame.extend(ETHERTYPE);
        frame.extend((14..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ seed[0]));
        frame
    }

    pub(super) const PLAIN: [u8; VNET_HEADER] = [0; VNET_HEADER];

    pub(super) fn exchange<D: Driver>(
        front_end: &mut FrontEnd<D>,
        peer: &PacketSocket,
        sizes: &[usize],
    ) {
        for (number, &len) in sizes.iter().enumerate() {
            let frame = frame(len, number);
            front_end.transmit(0, &frame);
            assert!(peer.receive().1 == frame, "out: {len} bytes differ");
            peer.send(&PLAIN, &frame);
            assert!(front_end.receive(0) == frame, "in: {len} bytes differ");
        }
    }

    fn both_ways<D: Driver>(idle: &str) {
        let (netns, dir) = (cable(1, 1500), TempDir::new("xdp"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, "", idle);
        assert!(has_program(&netns));
        let log = daemon.log();
        assert!(log.contains("xdp xa: native XDP, copy mode"), "{log}");
        let peer = peer(&netns);
        // Nobody is there: lost, and not kept for who comes.
        peer.send(&PLAIN, &frame(100, 1));
        let mut front_end = FrontEnd::<D>::connect(&socket, 1);
        let sizes: Vec<_> = (0..300).map(|i| 60 + i * 337 % 1455).collect();
        exchange(&mut front_end, &peer, &sizes);
        // Larger than the interface takes: nobody may see it.
        front_end.transmit(0, &frame(1523, 1));
        exchange(&mut front_end, &peer, &[60]);
        let sum: usize = sizes.iter().sum::<usize>() + 60;
        for (counter, value) in [
            ("tx_frames", 301),
            ("rx_frames", 301),
            ("tx_bytes", sum as u64),
            ("rx_bytes", sum as u64),
            ("tx_drop_too_big", 1),
            ("tx_drop_host_full", 0),
            ("tx_drop_host_error", 0),
            ("xdp_rx_dropped", 0),
            ("xdp_rx_ring_full", 0),
            ("xdp_tx_invalid", 0),
        ] {
            assert_eq!(daemon.counter("net0", counter), value, "{counter}");
        }
        drop(front_end);
        // The next guest, with the same socket of the interface.
        let mut front_end = FrontEnd::<D>::connect(&socket, 1);
        exchange(&mut front_end, &peer, &[1514, 60]);
        daemon.signal(libc::SIGKILL);
        wait_until("the program is gone", PATIENCE, || {
            (!has_program(&netns)).then_some(())
        });
        let line = netns.ok("ip -d link show xa");
        assert!(line.contains("promiscuity 0"), "{line}");
    }

    #[test]
    fn frames_go_both_ways_and_nothing_outlives_the_daemon_with_split_rings() {
        both_ways::<SplitDriver>("adaptive");
    }

    #[test]
    fn frames_go_both_ways_and_nothing_outlives_the_daemon_with_packed_rings() {
        both_ways::<PackedDriver>("interrupt");
    }

    #[test]
    fn frames_of_9000_bytes_go_both_ways() {
        let (netns, dir) = (cable(1, 9000), TempDir::new("xdp9000"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, ",mtu=9000", "adaptive");
        let peer = peer(&netns);
        let mut front_end = FrontEnd::<PackedDriver>::connect(&socket, 1);
        let sizes = [9014, 60, 4096 - 12, 4097 - 12, 8999, 1792, 1793, 2048, 2049];
        exchange(&mut front_end, &peer, &sizes);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        assert!(!has_program(&netns));
    }

    #[test]
    fn an_idle_port_sleeps_and_a_removed_interface_takes_nothing() {
        let (netns, dir) = (cable(1, 1500), TempDir::new("xdpidle"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, "", "adaptive");
        let peer = peer(&netns);
        let mut front_end = FrontEnd::<SplitDriver>::connect(&socket, 1);
        exchange(&mut front_end, &peer, &[60, 1514]);
        let span = Duration::from_secs(1);
        let used = daemon.cpu_share(span);
        assert!(used < 0.05, "{:.1} % of a core", used * 100.0);
        netns.ok("ip link del xa");
        // The first may be taken before it is noticed that nobody sends it.
        for _ in 0..3 {
            front_end.transmit(0, &frame(60, 1));
        }
        let dropped = daemon.counter("net0", "tx_drop_host_error");
        assert!(dropped >= 2, "{dropped} of 3 dropped");
        let used = daemon.cpu_share(span);
        assert!(used < 0.05, "without its interface {:.1} %", used * 100.0);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// Frames that wait at an interface when its guest goes are counted, and no guest gets them;
    /// nor those that come while there is none, which its program drops and counts.
    fn what_waits_when_a_guest_goes_is_counted<D: Driver>() {
        const LOST: usize = 20;
        let (netns, dir) = (cable(1, 1500), TempDir::new("xdpwait"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, "", "adaptive");
        let peer = peer(&netns);
        let counted = || ["rx_frames", "rx_drop_peer_down"].map(|n| daemon.counter("net0", n));
        let mut guest = FrontEnd::<D>::connect(&socket, 1);
        // It has buffers for the first frames alone.
        let full = usize::from(front_end::SIZE);
        for number in 0..full + LOST {
            peer.send(&PLAIN, &frame(100, number));
        }
        wait_until("all are at the interface", PATIENCE, || {
            let all = netns.ok("ethtool -S xa");
            let line = format!("rx_queue_0_xdp_packets: {}\n", full + LOST);
            all.contains(&line).then_some(())
        });
        wait_until("all buffers are filled", PATIENCE, || {
            (counted() == [full as u64, 0]).then_some(())
        });
        for number in 0..full {
            assert!(guest.take(0) == Some(frame(100, number)), "{number}");
        }
        drop(guest);
        wait_until("those that waited are counted", PATIENCE, || {
            (counted() == [full as u64, LOST as u64]).then_some(())
        });
        assert_eq!(daemon.counter("net0", "xdp_rx_unserved"), 0);
        (0..LOST).for_each(|number| peer.send(&PLAIN, &frame(100, number)));
        wait_until("those that came to nobody are counted", PATIENCE, || {
            (daemon.counter("net0", "xdp_rx_unserved") == LOST as u64).then_some(())
        });
        let mut guest = FrontEnd::<D>::connect(&socket, 1);
        peer.send(&PLAIN, &frame(200, 7));
        assert!(guest.receive(0) == frame(200, 7));
        assert_eq!(counted(), [full as u64 + 1, LOST as u64]);
        assert_eq!(daemon.counter("net0", "xdp_rx_unserved"), LOST as u64);
    }

    /// Frames wait at `interface` for buffers that the guest does not have: that is no work.
    fn frames_wait_asleep(netns: &Netns, link: &str, interface: &'static str) {
        let dir = TempDir::new("waits");
        let socket = dir.path("net0.sock");
        let net = format!("name=net0,socket={},link={link}", socket.display());
        let args = ["run", "--core", "1", "--idle", "adaptive", "--net", &net];
        let daemon = Daemon::start_in(netns, &args);
        netns.ok("ip link show vt0 >/dev/null 2>&1 && ip link set vt0 up || true");
        let to = netns
            .spawn(move || PacketSocket::bind(interface))
            .join()
            .unwrap();
        let _guest = FrontEnd::<SplitDriver>::connect(&socket, 1);
        let full = front_end::SIZE;
        (0..full + 3).for_each(|number| to.send(&PLAIN, &frame(100, number.into())));
        wait_until("all buffers are filled", PATIENCE, || {
            (daemon.counter("net0", "rx_frames") == u64::from(full)).then_some(())
        });
        let used = daemon.cpu_share(Duration::from_secs(1));
        assert!(used < 0.05, "{link}: {:.1} % of a core", used * 100.0);
    }

    #[test]
    fn a_worker_sleeps_while_frames_wait_for_buffers() {
        frames_wait_asleep(&cable(1, 1500), "xdp:xa", "xb");
        let netns = Netns::new();
        netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        frames_wait_asleep(&netns, "tap:vt0", "vt0");
    }

    /// A guest that has some buffers, too few for a long frame, and posts no more: it must not wait
    /// for us while we wait for it.
    fn a_frame_that_finds_too_few_buffers_is_dropped<D: Driver>(idle: &str) {
        let (netns, dir) = (cable(1, 9000), TempDir::new("xdpfew"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, ",mtu=9000", idle);
        let peer = peer(&netns);
        let mut guest = FrontEnd::<D>::connect(&socket, 1);
        let few = usize::from(front_end::SIZE) - 2;
        for number in 0..few {
            peer.send(&PLAIN, &frame(100, number));
            let got = wait_until("a frame", PATIENCE, || guest.take(0));
            assert!(got == frame(100, number), "{number}");
        }
        // It takes three of two buffers.
        peer.send(&PLAIN, &frame(9000, 1));
        peer.send(&PLAIN, &frame(200, 2));
        assert!(guest.receive(0) == frame(200, 2));
        let dropped = daemon.counter("net0", "rx_drop_rx_ring_too_small");
        assert_eq!(
            (dropped, daemon.counter("net0", "rx_frames")),
            (1, few as u64 + 1)
        );
    }

    #[test]
    fn a_frame_that_finds_too_few_buffers_is_dropped_split() {
        a_frame_that_finds_too_few_buffers_is_dropped::<SplitDriver>("interrupt");
    }

    #[test]
    fn a_frame_that_finds_too_few_buffers_is_dropped_packed() {
        a_frame_that_finds_too_few_buffers_is_dropped::<PackedDriver>("spin");
    }

    #[test]
    fn what_waits_when_a_guest_goes_is_counted_split() {
        what_waits_when_a_guest_goes_is_counted::<SplitDriver>();
    }

    #[test]
    fn what_waits_when_a_guest_goes_is_counted_packed() {
        what_waits_when_a_guest_goes_is_counted::<PackedDriver>();
    }

    /// A UDP datagram from port `from`, so that queues are chosen by it; padded to `len` bytes.
    fn datagram(from: u16, len: usize) -> Vec<u8> {
        let mut frame = frame(len, from.into());
        frame[12..14].copy_from_slice(&[8, 0]);
        let [high, low] = from.to_be_bytes();
        frame[14..38].copy_from_slice(&[
            0x45, 0, 0, 60, 0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2, high, low, 0, 9,
        ]);
        frame
    }

    /// 64 frames each way, on both queue pairs.
    pub(super) fn exchange_on_two<D: Driver>(front_end: &mut FrontEnd<D>, peer: &PacketSocket) {
        let mut received = [0; 2];
        for number in 0..64 {
            let len = 74 + number * 337 % 1441;
            let out = frame(len, number);
            front_end.transmit(number % 2, &out);
            assert!(peer.receive().1 == out, "{number}: {len} bytes differ");
            let back = datagram(u16::try_from(1000 + number).unwrap(), len);
            peer.send(&PLAIN, &back);
            let (pair, got) = wait_until("a frame", PATIENCE, || {
                (0..2).find_map(|pair| front_end.poll(pair).map(|frame| (pair, frame)))
            });
            assert!(got == back, "{number}: {} bytes", got.len());
            received[pair] += 1;
        }
        assert!(received.iter().all(|&count| count > 0), "{received:?}");
    }

    #[test]
    fn each_queue_pair_has_a_queue_of_the_interface() {
        let (netns, dir) = (cable(2, 1500), TempDir::new("xdpq"));
        let socket = dir.path("net0.sock");
        let daemon = daemon(&netns, &socket, ",queues=2", "adaptive");
        let mut front_end = FrontEnd::<SplitDriver>::connect(&socket, 2);
        exchange_on_two(&mut front_end, &peer(&netns));
        assert_eq!(daemon.counter("net0", "rx_frames"), 64);
        assert_eq!(daemon.counter("net0", "tx_frames"), 64);
    }

    #[test]
    fn what_can_not_be_used_ends_the_daemon_with_its_name() {
        let (netns, dir) = (cable(2, 1500), TempDir::new("xdpno"));
        let start = "vringd: net net0: link = \"xdp:";
        for (link, message) in [
            ("none0", "none0\": xdp `none0`: there is no such interface"),
            (
                "xa,queues=3",
                "xa\": xdp `xa`: 3 queues asked for, the interface has 2",
            ),
            (
                "xa,mtu=9000",
                "xa\": xdp `xa`: mtu 9000 asked for, the interface has 1500",
            ),
        ] {
            let net = format!("socket={},link=xdp:{link}", dir.path("n").display());
            let mut command = netns.command(env!("CARGO_BIN_EXE_vringd"));
            let output = command.args(["run", "--net", &net]).output().unwrap();
            assert!(!output.status.success());
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains(&format!("{start}{message}")), "{text}");
        }
        assert!(!has_program(&netns));
    }
}
