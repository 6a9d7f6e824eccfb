//! Uplinks: a switch with a guest, a tap and an interface, in a namespace of the test's own.
//!
//! A packet socket on the tap is the host's stack, one on the other end of a pair of veth
//! interfaces is whoever is on that cable. Needs root.

#[cfg(test)]
#[path = "xdp/front_end.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared by several tests")]
mod front_end;
#[cfg(test)]
#[path = "protocol/message.rs"]
#[expect(dead_code, unreachable_pub, reason = "the protocol tests use the rest")]
mod message;
mod support;

#[cfg(test)]
mod tests {
    use vringd::device::net::feature;
    use vringd::sys::testnet::{ETHERTYPE, PacketSocket, VNET_HEADER};
    use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};
    use vringd::testing::packets::Packet;

    use super::front_end::{FrontEnd, PATIENCE};
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::netns::Netns;
    use super::support::tmp::TempDir;
    use super::support::{linux, missing};

    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const HOST: [u8; 6] = [2, 0, 0, 0, 0, 3];
    const CABLE: [u8; 6] = [2, 0, 0, 0, 0, 4];
    const ALL: [u8; 6] = [0xff; 6];
    const CSUM: u64 = 1 << 0;
    const HOST_TSO4: u64 = 1 << 11;
    const PLAIN: [u8; VNET_HEADER] = [0; VNET_HEADER];

    fn frame(to: [u8; 6], from: [u8; 6], len: usize) -> Vec<u8> {
        let mut frame = [&to[..], &from, &ETHERTYPE].concat();
        frame.extend((14..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ from[5]));
        frame
    }

    struct Lan<D> {
        netns: Netns,
        daemon: Daemon,
        guests: [FrontEnd<D>; 2],
        host: PacketSocket,
        cable: PacketSocket,
        _dir: TempDir,
    }

    impl<D: Driver> Lan<D> {
        fn new(idle: &str, keys: &str) -> Lan<D> {
            Lan::with_keys(idle, ["", "", keys, ""])
        }

        /// With more keys for the guests, the tap and the interface.
        fn with_keys(idle: &str, keys: [&str; 4]) -> Lan<D> {
            Lan::with_features(idle, keys, [CSUM | HOST_TSO4; 2])
        }

        /// With other features of the guests, too.
        fn with_features(idle: &str, keys: [&str; 4], features: [u64; 2]) -> Lan<D> {
            let (netns, dir) = (Netns::new(), TempDir::new("uplink"));
            netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1 && \
                 ip link add xa type veth peer name xb && ip link set xa up && ip link set xb up");
            let socket = |name: &str| dir.path(&format!("{name}.sock"));
            let guest = |name: &str, keys: &str| {
                format!(
                    "name={name},socket={},link=switch:lan{keys}",
                    socket(name).display()
                )
            };
            let (one, two) = (guest("one", keys[0]), guest("two", keys[1]));
            let tap = format!("name=up,link=switch:lan,host=tap:up0{}", keys[2]);
            let xdp = format!("name=cable,link=switch:lan,host=xdp:xa{}", keys[3]);
            let arguments = [
                "run", "--core", "1", "--idle", idle, "--net", &one, "--net", &two,
            ];
            let uplinks = ["--net", &tap, "--net", &xdp];
            let daemon = Daemon::start_in(&netns, &[&arguments[..], &uplinks].concat());
            netns.ok("ip link set up0 up");
            let connect = |(name, features)| FrontEnd::connect_with(&socket(name), 1, features);
            let guests = [("one", features[0]), ("two", features[1])].map(connect);
            let socket = |name: &'static str| {
                netns
                    .spawn(move || PacketSocket::bind(name))
                    .join()
                    .unwrap()
            };
            Lan {
                host: socket("up0"),
                cable: socket("xb"),
                netns,
                daemon,
                guests,
                _dir: dir,
            }
        }

        /// What a port has counted: what it may send or is given, what it is refused for the
        /// reason, and what it is refused in all.
        fn counted(&self, port: &str, direction: &str, reason: &str) -> [u64; 3] {
            let names = ["frames", &format!("drop_{reason}")];
            let [frames, refused] =
                names.map(|name| self.daemon.counter(port, &format!("{direction}_{name}")));
            [
                frames,
                refused,
                self.daemon.queue_counter(port, direction, "errors"),
            ]
        }

        /// Nothing has come to a guest: what is sent next comes first.
        fn nothing_for(&mut self, guest: usize) {
            assert_eq!(self.guests[guest].poll(0), None);
        }
    }

    /// A packet socket on a tap sees what it sends, too.
    fn sees(socket: &PacketSocket, frame: &[u8]) {
        let got = socket.receive_if(|got| got.get(6..14) == frame.get(6..14));
        assert!(got.1 == frame, "{} bytes of {}", got.1.len(), frame.len());
    }

    fn frames_find_their_port<D: Driver>(idle: &str) {
        let mut lan = Lan::<D>::new(idle, "");
        // To all: the other guest, the host and the cable.
        let hello = frame(ALL, GUEST, 100);
        lan.guests[0].transmit(0, &hello);
        assert_eq!(lan.guests[1].receive(0), hello);
        sees(&lan.host, &hello);
        sees(&lan.cable, &hello);
        let hello = frame(ALL, OTHER, 200);
        lan.guests[1].transmit(0, &hello);
        assert_eq!(lan.guests[0].receive(0), hello);
        sees(&lan.host, &hello);
        sees(&lan.cable, &hello);
        // From the host to all, and from the cable.
        let hello = frame(ALL, HOST, 300);
        lan.host.send(&PLAIN, &hello);
        for guest in &mut lan.guests {
            assert_eq!(guest.receive(0), hello);
        }
        sees(&lan.cable, &hello);
        let hello = frame(ALL, CABLE, 400);
        lan.cable.send(&PLAIN, &hello);
        for guest in &mut lan.guests {
            assert_eq!(guest.receive(0), hello);
        }
        sees(&lan.host, &hello);
        // Everybody is known now: one receiver each, every size.
        for len in (60..1514).step_by(31) {
            let there = frame(HOST, GUEST, len);
            lan.guests[0].transmit(0, &there);
            sees(&lan.host, &there);
            let back = frame(GUEST, HOST, len);
            lan.host.send(&PLAIN, &back);
            assert_eq!(lan.guests[0].receive(0), back);
            let there = frame(CABLE, OTHER, len);
            lan.guests[1].transmit(0, &there);
            sees(&lan.cable, &there);
            let back = frame(OTHER, CABLE, len);
            lan.cable.send(&PLAIN, &back);
            assert_eq!(lan.guests[1].receive(0), back);
            let through = frame(CABLE, HOST, len);
            lan.host.send(&PLAIN, &through);
            sees(&lan.cable, &through);
            let through = frame(HOST, CABLE, len);
            lan.cable.send(&PLAIN, &through);
            sees(&lan.host, &through);
        }
        (0..2).for_each(|guest| lan.nothing_for(guest));
        assert_eq!(lan.daemon.counter("one", "rx_drop_peer_full"), 0);
        let sent = lan.daemon.counter("up", "tx_frames");
        assert_eq!(sent, 1 + 2 * 47, "what the host sent");
        assert_eq!(lan.daemon.counter("cable", "rx_drop_host_full"), 0);
    }

    #[test]
    fn frames_find_their_port_split() {
        frames_find_their_port::<SplitDriver>("adaptive");
    }

    #[test]
    fn frames_find_their_port_packed() {
        frames_find_their_port::<PackedDriver>("interrupt");
    }

    /// A segment that its sender left undone reaches a cable as frames that are complete.
    #[test]
    fn what_a_guest_leaves_undone_is_done_for_a_cable() {
        const MSS: usize = 1000;
        let mut lan = Lan::<PackedDriver>::new("adaptive", "");
        let payload: Vec<u8> = (0..3500usize).map(|i| (i * 13).to_le_bytes()[0]).collect();
        let mut sent = [&CABLE[..], &GUEST, &[8, 0]].concat();
        let total = u16::try_from(40 + payload.len()).unwrap().to_be_bytes();
        sent.extend([0x45, 0, total[0], total[1], 0, 9, 0x40, 0, 64, 6, 0, 0]);
        sent.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        // Ports, sequence, acknowledgment, PSH and ACK, window; the pseudo header's sum.
        sent.extend([0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
        let pseudo = 192u32 * 256 + 2 * 256 + 1 + 192 * 256 + 2 + 6 + 20 + 3500;
        let pseudo = (pseudo & 0xffff) + (pseudo >> 16);
        sent.extend(u16::try_from(pseudo).unwrap().to_be_bytes());
        sent.extend([0, 0]);
        sent.extend(&payload);
        // NEEDS_CSUM, GSO_TCPV4, hdr_len, gso_size, csum_start, csum_offset.
        let mut header = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        header[4..6].copy_from_slice(&u16::try_from(MSS).unwrap().to_le_bytes());
        lan.guests[0].transmit_with(0, &header, &sent);
        for (number, part) in payload.chunks(MSS).enumerate() {
            let (_, got) = lan.cable.receive_if(|got| got.get(12..14) == Some(&[8, 0]));
            assert_eq!(&got[54..], part, "segment {number}");
            assert_eq!(sum(&got[14..34]), 0xffff, "IPv4 header of segment {number}");
            let mut pseudo = got[26..34].to_vec();
            pseudo.extend([0, 6]);
            pseudo.extend(u16::try_from(got.len() - 34).unwrap().to_be_bytes());
            pseudo.extend(&got[34..]);
            assert_eq!(sum(&pseudo), 0xffff, "TCP of segment {number}");
        }
        let counted = |name| lan.daemon.counter("cable", &format!("xdp_tx_{name}"));
        assert_eq!(counted("software_segments"), 4);
        assert_eq!(
            (counted("software_csum"), counted("offloaded_csum")),
            (0, 0)
        );
    }

    /// The host sends `packet`, to be cut after every `size` bytes (0: not): it reaches the guests
    /// that have its receiver, or all, each as it takes it. Returns how many checksums were made
    /// and frames cut for the first.
    fn reaches_all_or_one<D: Driver>(
        lan: &mut Lan<D>,
        receiver: Option<usize>,
        packet: &Packet,
        size: u16,
    ) -> [u64; 2] {
        let vnet = packet.vnet(size, false)[..VNET_HEADER].try_into().unwrap();
        let undone = packet.unfinished();
        lan.host.send(&vnet, &undone);
        let done = match size {
            0 => vec![packet.whole()],
            _ => packet.cut(size.into()),
        };
        let what = format!("to {receiver:?}, {size}, {} bytes", undone.len());
        let mut made = [0; 2];
        if receiver != Some(1) {
            for wanted in &done {
                assert!(lan.guests[0].receive(0) == *wanted, "{what}");
            }
            made[usize::from(size > 0)] = done.len() as u64;
        }
        if receiver != Some(0) {
            let (header, got) = lan.guests[1].receive_if(0, |_| true);
            assert!(got == undone, "{what}: {} bytes", got.len());
            assert_eq!(header, vnet, "{what}");
        }
        for wanted in done.iter().filter(|_| receiver.is_none()) {
            let got = lan.cable.receive_if(|got| got[..12] == wanted[..12]);
            assert!(got.1 == *wanted, "{what}");
        }
        made
    }

    /// What the host leaves undone, the kernel hands to the tap of an uplink as it is: it reaches a
    /// guest that takes no such thing, and a cable, as frames that are complete, and a guest that
    /// takes it as it was sent.
    fn what_the_host_leaves_undone_is_done_for_who_wants_it<D: Driver>(idle: &str) {
        const TAKES: u64 = feature::GUEST_CSUM
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_USO4
            | feature::GUEST_USO6;
        let mut lan = Lan::<D>::with_features(idle, [""; 4], [0, TAKES]);
        let uso = linux() >= (6, 2);
        if !uso {
            missing::<()>("no tap takes datagrams to be cut before Linux 6.2");
        }
        let mut made = [0; 2];
        // Nobody knows the model's receiver at first; then one guest has it, then the other.
        for receiver in [None, Some(0), Some(1)] {
            if let Some(guest) = receiver {
                let hello = frame(HOST, OTHER, 60);
                lan.guests[guest].transmit(0, &hello);
                assert_eq!(lan.guests[1 - guest].receive(0), hello);
                sees(&lan.host, &hello);
                sees(&lan.cable, &hello);
            }
            for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
                for (size, bytes) in [(0, 777), (1000, 9300)] {
                    if size > 0 && udp && !uso {
                        continue;
                    }
                    let packet = Packet::new(v6, udp, bytes);
                    let more = reaches_all_or_one(&mut lan, receiver, &packet, size);
                    made = [made[0] + more[0], made[1] + more[1]];
                }
            }
        }
        (0..2).for_each(|guest| lan.nothing_for(guest));
        for (port, made) in [("one", made), ("two", [0; 2])] {
            let counted = ["csum", "segments"]
                .map(|what| lan.daemon.counter(port, &format!("rx_software_{what}")));
            assert_eq!(counted, made, "{port}");
        }
    }

    #[test]
    fn what_the_host_leaves_undone_is_done_for_who_wants_it_split() {
        what_the_host_leaves_undone_is_done_for_who_wants_it::<SplitDriver>("adaptive");
    }

    #[test]
    fn what_the_host_leaves_undone_is_done_for_who_wants_it_packed() {
        what_the_host_leaves_undone_is_done_for_who_wants_it::<PackedDriver>("interrupt");
    }

    /// What the kernel drops at an interface because nobody takes it, it counts, and the daemon
    /// shows it: every frame that came is found.
    #[test]
    fn what_the_kernel_drops_at_an_uplink_is_shown() {
        const FRAMES: u32 = 20_000;
        let lan = Lan::<SplitDriver>::new("adaptive", "");
        lan.daemon.signal(libc::SIGSTOP);
        let hello = frame(ALL, CABLE, 60);
        (0..FRAMES).for_each(|_| lan.cable.send(&PLAIN, &hello));
        lan.daemon.signal(libc::SIGCONT);
        let all = lan.netns.ok("ethtool -S xa");
        let came = all
            .lines()
            .find_map(|line| line.trim().strip_prefix("rx_queue_0_xdp_packets: "));
        let came: u64 = came.and_then(|count| count.parse().ok()).expect(&all);
        let counted = |name| lan.daemon.counter("cable", name);
        let dropped = wait_until("every frame is counted", PATIENCE, || {
            let dropped = counted("xdp_rx_dropped") + counted("xdp_rx_ring_full");
            (dropped + counted("tx_frames") == came).then_some(dropped)
        });
        assert!(
            dropped > 0 && counted("xdp_fill_ring_empty") > 0,
            "{came} frames came"
        );
        assert_eq!(counted("xdp_tx_invalid"), 0);
    }

    fn sum(bytes: &[u8]) -> u32 {
        let words = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    /// VLANs and rates hold for uplinks as for guests.
    #[test]
    fn an_uplink_has_a_vlan_and_a_rate() {
        let keys = ",vlan=trunk:1+7,egress_frames=1,rate_burst=1ms";
        let mut lan = Lan::<SplitDriver>::new("adaptive", keys);
        let hello = frame(ALL, GUEST, 100);
        lan.guests[0].transmit(0, &hello);
        let tagged = [&hello[..12], &[0x81, 0, 0, 1], &hello[12..]].concat();
        let (_, got) = lan.host.receive_if(|got| got.get(6..12) == Some(&GUEST));
        assert!(got == tagged, "{got:x?}");
        for _ in 0..20 {
            lan.guests[0].transmit(0, &hello);
        }
        wait_until("frames are policed", PATIENCE, || {
            (lan.daemon.counter("up", "rx_drop_policed") >= 10).then_some(())
        });
        // Of VLAN 7 there is nobody else.
        let [high, low] = [0x81, 0];
        let foreign = [&ALL[..], &HOST, &[high, low, 0, 7], &hello[12..]].concat();
        lan.host.send(&PLAIN, &foreign);
        wait_until("it is taken", PATIENCE, || {
            (lan.daemon.counter("up", "tx_drop_no_port") >= 1).then_some(())
        });
        for _ in 0..21 {
            assert_eq!(lan.guests[1].receive(0), hello);
        }
        (0..2).for_each(|guest| lan.nothing_for(guest));
        lan.netns.ok("ip link set up0 down");
        lan.guests[0].transmit(0, &hello);
        assert_eq!(lan.guests[1].receive(0), hello);
    }

    /// To all, to a group, and to a station that nobody knows.
    const FLOODS: [[u8; 6]; 3] = [ALL, [1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 77]];

    /// Frames for all reach the ports that may have them; an uplink that may not counts each one.
    fn floods_that_an_uplink_is_not_given<D: Driver>(idle: &str) {
        const EACH: usize = 12;
        let keys = [",isolated=on", "", ",isolated=on", ",mtu=1000"];
        let mut lan = Lan::<D>::with_keys(idle, keys);
        let (mut short, mut all) = (0, 0);
        for to in FLOODS {
            for number in 0..EACH {
                // Some are as long as the interface takes, and some have one byte more.
                let len = [100, 14 + 1000, 14 + 1001][number % 3];
                short += u64::from(len <= 14 + 1000);
                all += 1;
                let sent = frame(to, GUEST, len);
                lan.guests[0].transmit(0, &sent);
                assert!(lan.guests[1].receive(0) == sent, "{number} to {to:x?}");
                if len <= 14 + 1000 {
                    let got = lan.cable.receive_if(|got| got.get(6..12) == Some(&GUEST));
                    assert!(got.1 == sent, "{number} to {to:x?}");
                }
            }
        }
        assert_eq!(lan.counted("up", "rx", "isolated"), [0, all, all]);
        assert_eq!(
            lan.counted("cable", "rx", "mtu"),
            [short, all - short, all - short]
        );
        assert_eq!(lan.counted("two", "rx", "isolated"), [all, 0, 0]);
        // What reached somebody is no loss of its sender's.
        assert_eq!(lan.counted("one", "tx", "isolated"), [all, 0, 0]);
        // The other way: the host may send to all but the guest that is isolated, too.
        let hello = frame(ALL, HOST, 90);
        for _ in 0..EACH {
            lan.host.send(&PLAIN, &hello);
            assert!(lan.guests[1].receive(0) == hello);
            sees(&lan.cable, &hello);
        }
        let each = EACH as u64;
        assert_eq!(lan.counted("one", "rx", "isolated"), [0, each, each]);
        assert_eq!(lan.counted("up", "tx", "isolated"), [each, 0, 0]);
        // To a station that is known: lost to its sender.
        (0..EACH).for_each(|_| lan.guests[0].transmit(0, &frame(HOST, GUEST, 90)));
        assert_eq!(lan.counted("one", "tx", "isolated"), [all, each, each]);
        assert_eq!(lan.counted("up", "rx", "isolated"), [0, all, all]);
        (0..2).for_each(|guest| lan.nothing_for(guest));
    }

    #[test]
    fn floods_that_an_uplink_is_not_given_are_counted_there_split() {
        floods_that_an_uplink_is_not_given::<SplitDriver>("interrupt");
    }

    #[test]
    fn floods_that_an_uplink_is_not_given_are_counted_there_packed() {
        floods_that_an_uplink_is_not_given::<PackedDriver>("adaptive");
    }

    /// What an uplink may not send to all is counted there; what it sends to one port passes.
    #[test]
    fn floods_of_an_uplink_are_capped() {
        const EACH: u64 = 10;
        let keys = ["", "", ",flood_limit=0", ",flood_limit=4"];
        let mut lan = Lan::<PackedDriver>::with_keys("adaptive", keys);
        let hello = frame(ALL, GUEST, 100);
        lan.guests[0].transmit(0, &hello);
        assert!(lan.guests[1].receive(0) == hello);
        for to in FLOODS {
            (0..EACH).for_each(|_| lan.host.send(&PLAIN, &frame(to, HOST, 100)));
        }
        let letter = frame(GUEST, HOST, 200);
        lan.host.send(&PLAIN, &letter);
        assert!(lan.guests[0].receive(0) == letter, "it comes first");
        let refused = 3 * EACH;
        assert_eq!(lan.counted("up", "tx", "storm"), [1, refused, refused]);
        // So many in a second and no more: those that pass come everywhere, the others nowhere.
        for number in 0..EACH {
            lan.cable.send(
                &PLAIN,
                &frame(ALL, CABLE, 100 + usize::try_from(number).unwrap()),
            );
        }
        lan.cable.send(&PLAIN, &frame(GUEST, CABLE, 200));
        let mut passed = 0;
        while lan.guests[0].receive(0).len() != 200 {
            passed += 1;
        }
        assert!((4..=EACH).contains(&passed), "{passed} frames for all");
        let refused = EACH - passed;
        assert_eq!(
            lan.counted("cable", "tx", "storm"),
            [passed + 1, refused, refused]
        );
        assert_eq!(lan.counted("one", "rx", "storm"), [1 + passed + 1, 0, 0]);
        assert_eq!(lan.counted("two", "rx", "storm"), [1 + passed, 0, 0]);
        assert_eq!(lan.counted("up", "rx", "storm"), [1 + passed, 0, 0]);
    }

    /// Frames for all and for one that come from an uplink while a guest is not there, and frames
    /// for an uplink that is down.
    #[test]
    fn what_nobody_takes_is_counted_where_it_is_lost() {
        const EACH: u64 = 10;
        let Lan::<SplitDriver> {
            netns,
            daemon,
            guests: [mut one, mut two],
            host,
            cable,
            _dir,
        } = Lan::new("adaptive", "");
        let hello = frame(ALL, GUEST, 100);
        one.transmit(0, &hello);
        assert!(two.receive(0) == hello);
        drop(one);
        wait_until("the first guest is gone", PATIENCE, || {
            cable.send(&PLAIN, &frame(GUEST, CABLE, 80));
            (daemon.counter("cable", "tx_drop_peer_down") > 0).then_some(())
        });
        // Known no more: for all, and lost at the port where nobody is. All before this is done:
        let marker = frame(OTHER, CABLE, 300);
        cable.send(&PLAIN, &marker);
        while two.receive(0) != marker {}
        let lost = daemon.counter("one", "rx_drop_peer_down");
        let taken = ["one", "two"].map(|port| daemon.counter(port, "rx_frames"));
        for to in [ALL, GUEST] {
            for _ in 0..EACH {
                host.send(&PLAIN, &frame(to, HOST, 100));
                assert!(two.receive(0) == frame(to, HOST, 100));
            }
        }
        let now = daemon.counter("one", "rx_drop_peer_down");
        assert_eq!(now - lost, 2 * EACH);
        let given = ["one", "two"].map(|port| daemon.counter(port, "rx_frames"));
        assert_eq!(given, [taken[0], taken[1] + 2 * EACH]);
        assert_eq!(daemon.counter("cable", "tx_drop_peer_down"), 1);
        assert_eq!(daemon.counter("up", "tx_drop_peer_down"), 0);
        netns.ok("ip link set up0 down");
        (0..EACH).for_each(|_| two.transmit(0, &frame(ALL, OTHER, 100)));
        assert_eq!(daemon.counter("up", "rx_drop_host_error"), EACH);
        assert_eq!(daemon.counter("two", "tx_frames"), EACH);
    }
}
