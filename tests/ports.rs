//! What is chosen about the ports of a switch, through a running daemon: who may send, who reaches
//! whom, how much goes to all, who is where for good, and how long a packet may be. Each refusal is
//! one drop under its reason, and nothing of it reaches anybody.

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
    use vringd::testing::driver::{PackedDriver, SplitDriver};

    use super::front_end::FrontEnd;
    use super::support::daemon::Daemon;
    use super::support::tmp::TempDir;

    const CSUM: u64 = 1 << 0;
    const HOST_TSO4: u64 = 1 << 11;
    const ALL: [u8; 6] = [0xff; 6];
    const LOCAL: [u8; 2] = [0x88, 0xb5];

    /// Ports by their place in `PORTS`, which is the last byte of their address.
    const WATCH: usize = 0;
    const MAC: usize = 1;
    const IP: usize = 2;
    const APART: [usize; 2] = [3, 4];
    const QUIET: usize = 5;
    const FIXED: usize = 6;
    const NARROW: usize = 7;

    const PORTS: [(&str, &str); 8] = [
        ("watch", "vlan=trunk:10+20+30+40,flood_limit=1000000"),
        ("mac", "vlan=10,allow_mac=02:00:00:00:00:01"),
        ("ip", "vlan=trunk:10,allow_ip=10.0.0.7+fd00::7"),
        ("apart1", "vlan=20,isolated=on"),
        ("apart2", "vlan=20,isolated=on"),
        ("quiet", "vlan=30,flood_limit=0"),
        ("fixed", "vlan=30,stations=02:00:00:00:00:06"),
        ("narrow", "vlan=40,mtu=1500"),
    ];

    fn mac(port: usize) -> [u8; 6] {
        [2, 0, 0, 0, 0, u8::try_from(port).unwrap()]
    }

    /// A frame with a tag or without; what follows the type is `packet`.
    fn frame(to: [u8; 6], from: usize, vlan: Option<u8>, kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
        let tag = vlan.map_or(vec![], |vlan| vec![0x81, 0, 0, vlan]);
        let mut frame = [&to[..], &mac(from), &tag, &kind, packet].concat();
        frame.resize(frame.len().max(64), 0);
        frame
    }

    fn with(mut packet: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        packet
    }

    struct Lan {
        daemon: Daemon,
        /// Split rings all, but for the one that watches.
        watch: FrontEnd<PackedDriver>,
        guests: Vec<FrontEnd<SplitDriver>>,
        _dir: TempDir,
    }

    impl Lan {
        fn new() -> Lan {
            let dir = TempDir::new("ports");
            let socket = |name: &str| dir.path(&format!("{name}.sock"));
            let mut arguments = vec!["run".to_owned(), "--core".to_owned(), "1".to_owned()];
            for (name, keys) in PORTS {
                let socket = socket(name);
                let net = format!(
                    "--net=name={name},socket={},queues=1,link=switch:lan,{keys}",
                    socket.display()
                );
                arguments.push(net);
            }
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let daemon = Daemon::start(&arguments);
            let wanted = CSUM | HOST_TSO4;
            let watch = FrontEnd::connect_with(&socket("watch"), 1, wanted);
            let guests = PORTS[1..].iter();
            let guests = guests
                .map(|(name, _)| FrontEnd::connect_with(&socket(name), 1, wanted))
                .collect();
            Lan {
                daemon,
                watch,
                guests,
                _dir: dir,
            }
        }

        fn send(&mut self, port: usize, frame: &[u8]) {
            match port {
                WATCH => self.watch.transmit(0, frame),
                _ => self.guests[port - 1].transmit(0, frame),
            }
        }

        /// The next frame for a port. What was refused before would come first.
        fn receives(&mut self, port: usize, frame: &[u8]) {
            let got = match port {
                WATCH => self.watch.receive(0),
                _ => self.guests[port - 1].receive(0),
            };
            assert!(
                got == frame,
                "{}: {got:02x?}, not {frame:02x?}",
                PORTS[port].0
            );
        }

        /// Nothing waits for anybody: whatever was sent is decided when its buffer is back.
        fn nothing_more(&mut self) {
            assert_eq!(self.watch.poll(0), None);
            for (guest, (name, _)) in self.guests.iter_mut().zip(&PORTS[1..]) {
                assert_eq!(guest.poll(0), None, "{name}");
            }
        }

        /// So much was dropped of what `port` sent, for this reason and for no other.
        fn dropped(&self, port: usize, reason: &str, count: u64) {
            let name = PORTS[port].0;
            let counted = self.daemon.counter(name, &format!("tx_drop_{reason}"));
            assert_eq!(counted, count, "{name}: {reason}");
            let errors = self.daemon.one_queue_counter(name, "tx_q0_errors");
            assert_eq!(errors, count, "{name}: in all");
        }
    }

    fn only_own_ethernet_addresses(lan: &mut Lan) {
        let hello = |from, vlan| frame(ALL, from, vlan, LOCAL, &[7; 80]);
        lan.send(MAC, &hello(QUIET, None));
        lan.send(MAC, &hello(MAC, None));
        lan.receives(WATCH, &hello(MAC, Some(10)));
        lan.receives(IP, &hello(MAC, Some(10)));
        lan.dropped(MAC, "spoofed", 1);
        lan.nothing_more();
    }

    /// All of it in frames with a tag.
    fn only_own_ip_addresses(lan: &mut Lan) {
        let ipv4 = with(vec![0x45; 60], 12, &[10, 0, 0, 7]);
        let ipv6 = [&[0x60; 8][..], &[0xfd, 0], &[0; 13], &[7], &[9; 40]].concat();
        let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac(IP), &[10, 0, 0, 7]].concat();
        let arp = [&arp[..], &[0; 6], &[10, 0, 0, 9]].concat();
        let neighbour = [&ipv6[..40], &[136, 0, 0, 0, 0x60, 0, 0, 0], &ipv6[8..24]].concat();
        let neighbour = [&neighbour[..], &[2, 1], &mac(IP)].concat();
        let neighbour = with(neighbour, 4, &[0, 32, 58, 255]);
        let options = [58, 0, 1, 4, 0, 0, 0, 0];
        let hidden = [&neighbour[..40], &options, &neighbour[40..]].concat();
        let (v4, v6, resolve) = ([0x08, 0x00], [0x86, 0xdd], [0x08, 0x06]);
        let mut refused = 0;
        for (kind, good, wrong) in [
            (
                v4,
                &ipv4,
                vec![
                    with(ipv4.clone(), 15, &[8]),
                    // From no address, and not to get one.
                    with(ipv4.clone(), 12, &[0; 4]),
                ],
            ),
            (v6, &ipv6, vec![with(ipv6.clone(), 23, &[8])]),
            (
                resolve,
                &arp,
                vec![
                    with(arp.clone(), 17, &[8]),
                    // Another's Ethernet address.
                    with(arp.clone(), 13, &[9]),
                ],
            ),
            (
                v6,
                &neighbour,
                vec![
                    // Another's IP address; another's Ethernet address.
                    with(neighbour.clone(), 63, &[8]),
                    with(neighbour.clone(), 71, &[9]),
                    // From a router.
                    with(neighbour.clone(), 40, &[134]),
                    with(neighbour.clone(), 40, &[137]),
                    // Behind another header.
                    with(hidden, 4, &[0, 40, 0, 255]),
                ],
            ),
        ] {
            for packet in &wrong {
                lan.send(IP, &frame(ALL, IP, Some(10), kind, packet));
                refused += 1;
            }
            lan.send(IP, &frame(ALL, IP, Some(10), kind, good));
            lan.receives(WATCH, &frame(ALL, IP, Some(10), kind, good));
            let mut untagged = frame(ALL, IP, Some(10), kind, good);
            untagged.drain(12..16);
            lan.receives(MAC, &untagged);
        }
        // Neither IP nor ARP; and IP behind a second tag is not looked at.
        lan.send(IP, &frame(ALL, IP, Some(10), LOCAL, &ipv4));
        let twice = [&[0, 10][..], &v4, &ipv4].concat();
        lan.send(IP, &frame(ALL, IP, Some(10), [0x81, 0], &twice));
        lan.dropped(IP, "spoofed", refused + 2);
        lan.nothing_more();
    }

    fn isolated_ports_reach_the_others_only(lan: &mut Lan) {
        let [one, two] = APART;
        for from in APART {
            lan.send(from, &frame(ALL, from, None, LOCAL, &[3; 90]));
            lan.receives(WATCH, &frame(ALL, from, Some(20), LOCAL, &[3; 90]));
        }
        lan.nothing_more();
        // To a station that is known.
        lan.send(one, &frame(mac(two), one, None, LOCAL, &[4; 90]));
        lan.dropped(one, "isolated", 1);
        lan.send(WATCH, &frame(mac(two), WATCH, Some(20), LOCAL, &[5; 90]));
        lan.receives(two, &frame(mac(two), WATCH, None, LOCAL, &[5; 90]));
        lan.nothing_more();
    }

    fn floods_are_capped_and_stations_stay(lan: &mut Lan) {
        for to in [ALL, [1, 0, 0x5e, 0, 0, 1], mac(0x77)] {
            lan.send(QUIET, &frame(to, QUIET, None, LOCAL, &[6; 70]));
        }
        lan.dropped(QUIET, "storm", 3);
        lan.nothing_more();
        // It has not said a word, and whoever says that it is he is not believed.
        let claim = frame(mac(QUIET), FIXED, Some(30), LOCAL, &[8; 70]);
        lan.send(WATCH, &claim);
        let [mut to_quiet, letter] = [claim, frame(mac(FIXED), QUIET, None, LOCAL, &[9; 70])];
        to_quiet.drain(12..16);
        lan.receives(QUIET, &to_quiet);
        lan.send(QUIET, &letter);
        lan.receives(FIXED, &letter);
        // The cap is that of its port alone.
        let hello = frame(ALL, FIXED, None, LOCAL, &[1; 70]);
        lan.send(FIXED, &hello);
        lan.receives(QUIET, &hello);
        lan.receives(WATCH, &frame(ALL, FIXED, Some(30), LOCAL, &[1; 70]));
        lan.nothing_more();
        lan.dropped(QUIET, "storm", 3);
    }

    /// A TCP segment of 4000 bytes to the narrow port, to be cut into pieces of `mss`.
    fn segment(mss: u16) -> ([u8; 12], Vec<u8>) {
        let mut packet = vec![0x45, 0, 0x0f, 0xc8, 0, 9, 0x40, 0, 64, 6, 0, 0];
        packet.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        packet.extend([
            0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
        ]);
        packet.extend((0..4000u32).map(|at| (at * 7).to_le_bytes()[0]));
        // NEEDS_CSUM, GSO_TCPV4, hdr_len, gso_size, csum_start, csum_offset.
        let [low, high] = mss.to_le_bytes();
        let header = [1, 1, 58, 0, low, high, 38, 0, 16, 0, 0, 0];
        let to = mac(NARROW);
        (header, frame(to, WATCH, Some(40), [8, 0], &packet))
    }

    fn nothing_is_longer_than_the_mtu(lan: &mut Lan) {
        lan.send(NARROW, &frame(ALL, NARROW, None, LOCAL, &[2; 70]));
        lan.receives(WATCH, &frame(ALL, NARROW, Some(40), LOCAL, &[2; 70]));
        let long = |bytes| frame(mac(NARROW), WATCH, Some(40), LOCAL, &vec![5; bytes]);
        lan.send(WATCH, &long(1501));
        lan.send(WATCH, &long(1500));
        let mut untagged = long(1500);
        untagged.drain(12..16);
        lan.receives(NARROW, &untagged);
        let (header, bytes) = segment(1461);
        lan.watch.transmit_with(0, &header, &bytes);
        lan.dropped(WATCH, "mtu", 2);
        let (header, bytes) = segment(1460);
        lan.watch.transmit_with(0, &header, &bytes);
        for part in bytes[58..].chunks(1460) {
            let got = lan.guests[NARROW - 1].receive(0);
            assert_eq!(got[..12], bytes[..12]);
            assert!(got[54..] == *part, "{} bytes of {}", got.len(), part.len());
        }
        lan.dropped(WATCH, "mtu", 2);
        lan.nothing_more();
    }

    /// Who leaves a checksum undone says where it goes, and with its payload what it is. Nobody
    /// here acknowledged such frames: they are completed for him.
    fn no_checksum_changes_what_was_looked_at(lan: &mut Lan) {
        let undone = |start: u8, offset: u8| [1, 0, 0, 0, 0, 0, start, 0, offset, 0, 0, 0];
        let v4 = [0x08, 0x00];
        let mut packet = with(vec![0x45; 60], 12, &[10, 0, 0, 7]);
        packet[9] = 17;
        let bad = |lan: &Lan| {
            let counted = [WATCH, MAC, IP].map(|port| PORTS[port].0);
            counted.map(|name| lan.daemon.counter(name, "tx_drop_bad_vnet_header"))
        };
        // Addresses, the type that a tag would have, the tag, and an address of IP; each as far as
        // its sender may look like somebody else.
        let at_mac = frame(ALL, MAC, None, v4, &packet);
        for (start, offset) in [(0, 0), (0, 10), (6, 0), (0, 12), (12, 0), (13, 20)] {
            lan.guests[MAC - 1].transmit_with(0, &undone(start, offset), &at_mac);
        }
        let at_trunk = frame(mac(APART[0]), WATCH, Some(10), v4, &packet);
        for (start, offset) in [(0, 14), (14, 0), (16, 0), (17, 30)] {
            lan.watch
                .transmit_with(0, &undone(start, offset), &at_trunk);
        }
        let at_ip = frame(ALL, IP, Some(10), v4, &packet);
        for (start, offset) in [(18, 12), (30, 0), (32, 0), (18, 0), (37, 0), (0, 40)] {
            lan.guests[IP - 1].transmit_with(0, &undone(start, offset), &at_ip);
        }
        lan.nothing_more();
        assert_eq!(bad(lan), [4, 6, 6]);
        // What is behind may be completed: with 20 bytes of IP, the datagram's own.
        lan.guests[IP - 1].transmit_with(0, &undone(38, 6), &at_ip);
        let got = lan.watch.receive(0);
        let sum = got[44..46].to_vec();
        assert_ne!(sum, at_ip[44..46]);
        assert_eq!(got, with(at_ip.clone(), 44, &sum));
        let mut untagged = got;
        untagged.drain(12..16);
        lan.receives(MAC, &untagged);
        assert_eq!(bad(lan), [4, 6, 6]);
        lan.nothing_more();
    }

    #[test]
    fn every_port_has_what_was_chosen_for_it() {
        let mut lan = Lan::new();
        only_own_ethernet_addresses(&mut lan);
        only_own_ip_addresses(&mut lan);
        isolated_ports_reach_the_others_only(&mut lan);
        floods_are_capped_and_stations_stay(&mut lan);
        nothing_is_longer_than_the_mtu(&mut lan);
        no_checksum_changes_what_was_looked_at(&mut lan);
        let (status, log) = lan.daemon.stop();
        assert!(status.success(), "{log}");
    }
}
