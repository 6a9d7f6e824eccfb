//! Taps of the daemon: in another namespace, passed by descriptor, and macvtaps with frames through
//! them, and which queue pair answers come to. What else goes through them is tested with guests
//! (tests/guest.rs) and at the queue (src/host/tap).

#[cfg(test)]
#[path = "xdp/front_end.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared by several tests")]
mod front_end;
#[cfg(test)]
#[path = "protocol/message.rs"]
#[expect(dead_code, unreachable_pub, reason = "the protocol tests use the rest")]
mod message;
#[cfg(test)]
#[path = "taps/offloads.rs"]
mod offloads;
mod support;

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::sync::atomic::{AtomicU32, Ordering};

    use vringd::sys::testnet::{ETHERTYPE, PacketSocket, VNET_HEADER};
    use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

    use crate::front_end::{self, FrontEnd, PATIENCE};
    use crate::support::daemon::Daemon;
    use crate::support::deadline::wait_until;
    use crate::support::netns::Netns;
    use crate::support::pcap::Random;
    use crate::support::tmp::TempDir;
    use crate::support::tun::{tap_queues, with_files};

    const VRINGD: &str = env!("CARGO_BIN_EXE_vringd");

    /// A macvtap with its device in /dev, whose number is that of no other interface here.
    fn macvtap(netns: &Netns) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(2);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let index = number * 1_000_000 + std::process::id() % 1_000_000;
        netns.ok("ip link add v0 type veth peer name v1");
        netns.ok(&format!(
            "ip link add link v0 name mv0 index {index} type macvtap mode bridge"
        ));
        format!("/dev/tap{index}")
    }

    #[test]
    fn a_daemon_outside_makes_and_removes_a_tap_in_a_namespace() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=2,mtu=1400,netns={}",
            socket.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let text = netns.ok("ip -d link show vt0");
        for word in ["mtu 1400", ",UP", "multi_queue"] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        assert!(
            !netns.run("ip link show vt0").status.success(),
            "it is gone"
        );
    }

    #[test]
    fn a_macvtap_is_opened_by_name_or_by_the_shell() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        let device = macvtap(&netns);
        let socket = dir.path("n.sock").display().to_string();
        let by_name = format!("socket={socket},link=macvtap:mv0,netns={}", netns.name());
        let daemon = Daemon::start(&["run", "--net", &by_name]);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        // The daemon knows neither the namespace nor the name.
        let mut shell = Command::new("sh");
        let line = format!("exec \"$0\" \"$@\" 7<>{device}");
        shell.args(["-c", &line, VRINGD]);
        let passed = format!("socket={socket},link=tap:fd=7");
        let daemon = Daemon::spawn(shell, &["run", "--net", &passed]);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_tap_that_cannot_be_had_ends_the_daemon_with_a_line_that_names_it() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("ip tuntap add dev one0 mode tap");
        let name = netns.name();
        let socket = dir.path("n.sock").display().to_string();
        for (link, wanted) in [
            (
                "link=tap:fd=9".to_owned(),
                "link = \"tap:fd=9\": tap: the file descriptor 9 is not open",
            ),
            (
                "link=tap:t0,netns=no-such".to_owned(),
                "there is no network namespace \"/run/netns/no-such\"",
            ),
            (
                format!("link=tap:one0,queues=2,netns={name}"),
                "tap `one0`: 2 queues asked for, but the interface exists as a tap with a single \
                 queue",
            ),
            (
                format!("link=macvtap:lo,netns={name}"),
                "macvtap `lo`: it has no device /dev/tap1",
            ),
        ] {
            let net = format!("socket={socket},{link}");
            let output = Command::new(VRINGD)
                .args(["run", "--net", &net])
                .output()
                .unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success(), "{link}");
            assert!(error.contains(wanted), "{link}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    /// Frames of all sizes, between a guest at a macvtap and the far end of the cable below it.
    fn frames_cross_a_macvtap<D: Driver>() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        macvtap(&netns);
        netns.ok("ip link set mv0 address 02:00:00:00:00:01");
        netns.ok("for i in v0 v1 mv0; do ip link set $i up; done");
        let socket = dir.path("n.sock");
        let at = format!("socket={},netns={}", socket.display(), netns.name());
        let net = format!("name=n,{at},link=macvtap:mv0,queues=1");
        let daemon = Daemon::start(&["run", "--net", &net]);
        let mut guest = FrontEnd::<D>::connect(&socket, 1);
        let far = netns.spawn(|| PacketSocket::bind("v1")).join().unwrap();
        let mut random = Random(0x6d61_6376_7461_7031);
        let mut frame = |to: &[u8; 6], from: &[u8; 6], length: u64| {
            let mut frame = random.frame(length, length);
            frame[..12].copy_from_slice(&[&to[..], from].concat());
            frame
        };
        let sizes = [60, 61, 64, 127, 128, 777, 1513, 1514];
        for length in sizes {
            let sent = frame(&HOST, &GUEST, length);
            guest.transmit(0, &sent);
            let (header, got) = far.receive();
            assert!(got == sent, "{length} bytes from the guest: {got:02x?}");
            assert_eq!(header, [0; VNET_HEADER], "nothing is left to be done");
            // What is for another station comes to nobody here, the rest in its order.
            let stranger = frame(&[2, 0, 0, 0, 0, 3], &HOST, length);
            far.send(&[0; VNET_HEADER], &stranger);
            for to in [&GUEST, &[0xff; 6]] {
                let sent = frame(to, &HOST, length);
                far.send(&[0; VNET_HEADER], &sent);
                let got = wait_until("a frame of ours", PATIENCE, || {
                    guest.poll(0).filter(|got| got[12..14] == ETHERTYPE)
                });
                assert!(got == sent, "{length} bytes to {to:02x?}: {got:02x?}");
            }
        }
        assert_eq!(daemon.counter("n", "tx_frames"), sizes.len() as u64);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn frames_cross_a_macvtap_split() {
        frames_cross_a_macvtap::<SplitDriver>();
    }

    #[test]
    fn frames_cross_a_macvtap_packed() {
        frames_cross_a_macvtap::<PackedDriver>();
    }

    /// Queues of a tap that the daemon was passed: frames of all sizes and of many flows, both
    /// ways, and answers on the queue that they were asked for on. The tap is gone with the daemon,
    /// who has the only ones.
    fn frames_cross_a_tap_that_was_passed<D: Driver>(pairs: usize) {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        let queues = tap_queues(&netns, "ft0", pairs);
        netns.ok("ip link set ft0 up");
        let numbers: Vec<_> = queues.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let socket = dir.path("n.sock");
        let link = format!("link=tap:fd={}", numbers.join("+"));
        let net = format!("name=n,socket={},{link}", socket.display());
        let daemon = Daemon::spawn(with_files(VRINGD, &queues), &["run", "--net", &net]);
        drop(queues);
        let mut guest = FrontEnd::<D>::connect(&socket, pairs as u64);
        let host = netns.spawn(|| PacketSocket::bind("ft0")).join().unwrap();
        let mut random = Random(0x7461_7066_6431_3233);
        let mut frame = |to: &[u8; 6], from: &[u8; 6], length: u64| {
            let mut frame = random.frame(length, length);
            frame[..12].copy_from_slice(&[&to[..], from].concat());
            frame
        };
        for length in [60, 61, 127, 128, 777, 1513, 1514] {
            for pair in 0..pairs {
                let sent = frame(&HOST, &GUEST, length);
                guest.transmit(pair, &sent);
                let (header, got) = host.receive_if(|got| got[6..12] == GUEST);
                assert!(got == sent, "{length} bytes on {pair}: {got:02x?}");
                assert_eq!(header, [0; VNET_HEADER], "nothing is left to be done");
                let sent = frame(&GUEST, &HOST, length);
                host.send(&[0; VNET_HEADER], &sent);
                let got = wait_until("a frame", PATIENCE, || {
                    (0..pairs).find_map(|pair| guest.poll(pair))
                });
                assert!(got == sent, "{length} bytes: {got:02x?}");
            }
        }
        for flow in 0..FLOWS {
            let pair = usize::from(flow) % pairs;
            let sent = datagram(true, flow, 1);
            guest.transmit(pair, &sent);
            host.receive_if(|got| got == sent);
            let answer = datagram(false, flow, 1);
            host.send(&[0; VNET_HEADER], &answer);
            let came = wait_until("the answer", PATIENCE, || {
                (0..pairs).find_map(|pair| Some((pair, guest.poll(pair)?)))
            });
            assert!(came == (pair, answer), "flow {flow}: {came:02x?}");
        }
        let each = 7 * pairs as u64 + u64::from(FLOWS);
        assert_eq!(daemon.counter("n", "tx_frames"), each);
        assert_eq!(daemon.counter("n", "rx_frames"), each);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        assert!(
            !netns.run("ip link show ft0").status.success(),
            "it is gone"
        );
    }

    #[test]
    fn frames_cross_a_tap_of_one_descriptor_split() {
        frames_cross_a_tap_that_was_passed::<SplitDriver>(1);
    }

    #[test]
    fn frames_cross_a_tap_of_one_descriptor_packed() {
        frames_cross_a_tap_that_was_passed::<PackedDriver>(1);
    }

    #[test]
    fn frames_cross_a_tap_of_two_descriptors_split() {
        frames_cross_a_tap_that_was_passed::<SplitDriver>(2);
    }

    #[test]
    fn frames_cross_a_tap_of_two_descriptors_packed() {
        frames_cross_a_tap_that_was_passed::<PackedDriver>(2);
    }

    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const HOST: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const PAIRS: usize = 4;
    /// So many that no other way to spread them brings each to its pair.
    const FLOWS: u16 = 32;

    /// A datagram of a flow, from the guest or from the host.
    fn datagram(from_guest: bool, flow: u16, lap: u8) -> Vec<u8> {
        let way = |guest: &[u8], host: &[u8]| match from_guest {
            true => [guest, host].concat(),
            false => [host, guest].concat(),
        };
        // The receiver comes first here, the sender in all that follows.
        let mut frame = way(&HOST, &GUEST);
        frame.extend([8, 0, 0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend(way(&[192, 0, 2, 1], &[192, 0, 2, 2]));
        let port = (1000 + flow).to_be_bytes();
        frame.extend(way(&port, &[0, 9]));
        frame.extend([0, 40, 0, 0]);
        frame.extend((0..32).map(|at| at ^ lap ^ flow.to_le_bytes()[0]));
        frame
    }

    /// A daemon with a tap in a namespace whose stack says nothing by itself, a guest with all of
    /// its queue pairs, and a socket on the tap.
    fn tap<D: Driver>(idle: &str) -> (Daemon, FrontEnd<D>, PacketSocket, Netns, TempDir) {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues={PAIRS},netns={}",
            socket.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--idle", idle, "--net", &net]);
        let guest = FrontEnd::connect(&socket, PAIRS as u64);
        let host = netns.spawn(|| PacketSocket::bind("vt0")).join().unwrap();
        (daemon, guest, host, netns, dir)
    }

    /// Sends a datagram of each flow to the guest, who has sent none of them, and waits until all
    /// are there, byte for byte. Returns how many came to each pair.
    fn receive_flows<D: Driver>(
        guest: &mut FrontEnd<D>,
        host: &PacketSocket,
        lap: u8,
    ) -> [usize; PAIRS] {
        let mut missing: Vec<_> = (0..FLOWS).map(|flow| datagram(false, flow, lap)).collect();
        for sent in &missing {
            host.send(&[0; VNET_HEADER], sent);
        }
        let mut came = [0; PAIRS];
        while !missing.is_empty() {
            let (pair, got) = wait_until("a datagram of each flow", PATIENCE, || {
                (0..PAIRS).find_map(|pair| Some((pair, guest.poll(pair)?)))
            });
            let known = missing.iter().position(|sent| *sent == got);
            missing.remove(known.unwrap_or_else(|| panic!("pair {pair}: {got:02x?}")));
            came[pair] += 1;
        }
        came
    }

    /// Queue pairs that the guest has disabled (`ethtool -L`) get nothing, and the others all of
    /// it.
    fn flows_come_to_the_pairs_that_are_enabled<D: Driver>(idle: &str) {
        let (daemon, mut guest, host, _netns, _dir) = tap::<D>(idle);
        let spread = |came: [usize; PAIRS]| came.iter().filter(|&&count| count > 0).count();
        let vrings = 2..2 * u32::try_from(PAIRS).unwrap();
        for lap in 0..3 {
            let came = receive_flows(&mut guest, &host, 2 * lap);
            assert!(spread(came) > 1, "all pairs, lap {lap}: {came:?}");
            vrings.clone().for_each(|index| guest.enable(index, false));
            let came = receive_flows(&mut guest, &host, 2 * lap + 1);
            assert_eq!(came[0], usize::from(FLOWS), "one pair, lap {lap}: {came:?}");
            vrings.clone().for_each(|index| guest.enable(index, true));
        }
        assert_eq!(daemon.queue_counter("n", "rx", "drop_peer_down"), 0);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn flows_come_to_the_pairs_that_are_enabled_split() {
        flows_come_to_the_pairs_that_are_enabled::<SplitDriver>("interrupt");
    }

    #[test]
    fn flows_come_to_the_pairs_that_are_enabled_packed() {
        flows_come_to_the_pairs_that_are_enabled::<PackedDriver>("adaptive");
    }

    /// What the guest has not taken when it disables or stops a queue pair is lost, but counted.
    #[test]
    fn what_waits_for_a_pair_that_is_left_is_counted() {
        const SENT: u64 = 100;
        for stops in [false, true] {
            let (daemon, mut guest, host, _netns, _dir) = tap::<SplitDriver>("adaptive");
            let flow = datagram(true, 7, 0);
            guest.transmit(1, &flow);
            host.receive_if(|got| got == flow);
            let answer = datagram(false, 7, 0);
            (0..SENT).for_each(|_| host.send(&[0; VNET_HEADER], &answer));
            // More than it has buffers for.
            let mut taken = 0;
            wait_until("all buffers", PATIENCE, || {
                taken += u64::from(guest.take(1).is_some());
                (taken == 64).then_some(())
            });
            match stops {
                true => guest.stop(2),
                false => guest.enable(2, false),
            }
            let lost = daemon.one_queue_counter("n", "rx_q1_drop_peer_down");
            assert_eq!(lost, SENT - taken, "stops: {stops}");
            let (status, log) = daemon.stop();
            assert!(status.success(), "{log}");
        }
    }

    /// While the guest gives no buffers the tap is not read; what its queue has no room for then,
    /// the kernel drops, and the daemon tells how much of it.
    #[test]
    fn what_the_kernel_drops_for_want_of_buffers_is_counted() {
        const SENT: u64 = 300;
        let (daemon, mut guest, host, netns, _dir) = tap::<SplitDriver>("adaptive");
        netns.ok("ip link set vt0 txqueuelen 20");
        let frame = datagram(false, 1, 0);
        (0..SENT).for_each(|_| host.send(&[0; VNET_HEADER], &frame));
        let dropped = daemon.counter("n", "tap_rx_dropped");
        // The guest and the queue have room for so many; one more may be on its way.
        assert!((SENT - 64 - 20 - 1..SENT).contains(&dropped), "{dropped}");
        for _ in dropped..SENT {
            let got = wait_until("what was not dropped", PATIENCE, || {
                (0..PAIRS).find_map(|pair| guest.poll(pair))
            });
            assert!(got == frame);
        }
        assert_eq!(daemon.counter("n", "tap_rx_dropped"), dropped);
        assert!((0..PAIRS).all(|pair| guest.poll(pair).is_none()));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// What a flow is answered comes to the pair that it was sent from last.
    fn answers_come_to_the_senders_pair<D: Driver>() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues={PAIRS},netns={}",
            socket.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let mut guest = FrontEnd::<D>::connect(&socket, PAIRS as u64);
        let host = netns.spawn(|| PacketSocket::bind("vt0")).join().unwrap();
        for lap in 0..3 {
            for flow in 0..FLOWS {
                let pair = (usize::from(flow) + usize::from(lap)) % PAIRS;
                let sent = datagram(true, flow, lap);
                guest.transmit(pair, &sent);
                host.receive_if(|got| got == sent);
            }
            for flow in 0..FLOWS {
                let pair = (usize::from(flow) + usize::from(lap)) % PAIRS;
                let answer = datagram(false, flow, lap);
                host.send(&[0; VNET_HEADER], &answer);
                let (came_to, got) = wait_until("the answer", PATIENCE, || {
                    (0..PAIRS).find_map(|pair| {
                        let got = guest.poll(pair)?;
                        // The host's stack has things to say, too.
                        (got.get(..12) == answer.get(..12)).then_some((pair, got))
                    })
                });
                assert!(got == answer, "flow {flow}, lap {lap}: {got:02x?}");
                assert_eq!(came_to, pair, "flow {flow}, lap {lap}");
            }
        }
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// Frames that wait in a tap when its guest goes, or come while there is none: no guest gets
    /// them, and each is counted.
    fn what_waits_when_a_guest_goes_is_counted<D: Driver>() {
        const LOST: u16 = 20;
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=2,netns={}",
            socket.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let host = netns.spawn(|| PacketSocket::bind("vt0")).join().unwrap();
        let send = |flow, lap| host.send(&[0; VNET_HEADER], &datagram(false, flow, lap));
        let counted = || ["rx_frames", "rx_drop_peer_down"].map(|name| daemon.counter("n", name));
        // Before the first guest.
        (0..LOST).for_each(|_| send(0, 0));
        let mut guest = FrontEnd::<D>::connect(&socket, 2);
        assert_eq!(counted(), [0, LOST.into()]);
        // A guest with buffers for 64 frames on each pair takes so many, and none of the others.
        let full = u64::from(front_end::SIZE);
        let all = front_end::SIZE + LOST;
        for pair in 0..2 {
            let flow = u16::try_from(pair).unwrap();
            let sent = datagram(true, flow, 1);
            guest.transmit(pair, &sent);
            host.receive_if(|got| got == sent);
            (0..all).for_each(|_| send(flow, 1));
            let taken = (pair as u64 + 1) * full;
            wait_until("all buffers are filled", PATIENCE, || {
                (counted() == [taken, LOST.into()]).then_some(())
            });
        }
        for pair in 0..2 {
            let sent = datagram(false, u16::try_from(pair).unwrap(), 1);
            (0..full).for_each(|_| assert!(guest.take(pair).as_ref() == Some(&sent)));
            assert_eq!(guest.take(pair), None);
        }
        drop(guest);
        let mut guest = FrontEnd::<D>::connect(&socket, 2);
        assert_eq!(counted(), [2 * full, 3 * u64::from(LOST)]);
        assert_eq!((guest.poll(0), guest.poll(1)), (None, None));
        send(0, 2);
        assert!(guest.receive(0) == datagram(false, 0, 2));
        let errors =
            ["rx_q0_errors", "rx_q1_errors"].map(|name| daemon.one_queue_counter("n", name));
        assert_eq!(errors, [2 * u64::from(LOST), LOST.into()]);
    }

    #[test]
    fn what_waits_when_a_guest_goes_is_counted_split() {
        what_waits_when_a_guest_goes_is_counted::<SplitDriver>();
    }

    #[test]
    fn what_waits_when_a_guest_goes_is_counted_packed() {
        what_waits_when_a_guest_goes_is_counted::<PackedDriver>();
    }

    #[test]
    fn answers_come_to_the_senders_pair_split() {
        answers_come_to_the_senders_pair::<SplitDriver>();
    }

    #[test]
    fn answers_come_to_the_senders_pair_packed() {
        answers_come_to_the_senders_pair::<PackedDriver>();
    }
}
