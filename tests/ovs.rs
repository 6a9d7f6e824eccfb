//! Open vSwitch with DPDK as the front-end of both ends: two bridges, each with stations in
//! network namespaces, and the daemon between them as a wire and as a switch. Then OVS at one end
//! and a QEMU guest at the other.
//!
//! OVS holds DPDK's `net_virtio_user` ports; its polling threads may sleep, so that two cores are
//! enough. Needs root, 256 2 MiB hugepages, the packages openvswitch-switch-dpdk, iperf3,
//! iputils-ping, ethtool, iproute2, and what tests/guest.rs and tests/testpmd.rs need; run with one
//! test thread.

#[cfg(test)]
#[path = "ovs/rates.rs"]
mod rates;
mod support;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::guest::{Guest, GuestConfig, Nic};
    use super::support::netns::Netns;
    use super::support::ovs::{Ovs, OvsConfig, PortConfig, Station};
    use super::support::testpmd::{RingPath, Testpmd};
    use super::support::tmp::{TempDir, random_bytes, sha256_of};

    const PATIENCE: Duration = Duration::from_secs(30);

    /// How the ports `a` and `b` of the daemon are joined.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Between {
        Wire,
        Switch,
    }

    const SPLIT: PortConfig = PortConfig {
        packed: false,
        queues: 1,
        listens: false,
        mtu: 1500,
    };
    const PACKED: PortConfig = PortConfig {
        packed: true,
        ..SPLIT
    };

    fn start_daemon(ovs: &Ovs, between: Between, port: &PortConfig) -> Daemon {
        let links = match between {
            Between::Wire => ["link=wire:b", "hold_us=100"],
            Between::Switch => ["link=switch:lan", "link=switch:lan"],
        };
        let mode = if port.listens { "client" } else { "server" };
        let net = |name: &str, link: &str| {
            let (socket, queues) = (ovs.socket(name), port.queues);
            let socket = socket.display();
            format!("--net=name={name},socket={socket},mode={mode},queues={queues},{link}")
        };
        let (a, b) = (net("a", links[0]), net("b", links[1]));
        Daemon::start(&["run", "--core", "1", "--log-level", "debug", &a, &b])
    }

    /// The bridge `br-NAME` with a station, and a port on the daemon's port of that name.
    fn add_side(ovs: &Ovs, name: &str, address: &str, port: &PortConfig) -> Station {
        let bridge = format!("br-{name}");
        ovs.add_bridge(&bridge);
        ovs.add_front_end(&bridge, name, port);
        ovs.add_station(&bridge, address, None)
    }

    /// What was negotiated is what was asked for, by the daemon's own word.
    fn check_negotiated(daemon: &Daemon, port: &PortConfig) {
        let last = 2 * port.queues - 1;
        for name in ["a", "b"] {
            let line = daemon.wait_log(&format!("negotiated device={name}"), PATIENCE);
            let rings = if port.packed { "packed" } else { "split" };
            assert!(line.contains(&format!("rings={rings} ")), "{line}");
            assert_eq!(line.contains("RING_PACKED"), port.packed, "{line}");
            assert_eq!(line.contains("NET_F_MQ"), port.queues > 1, "{line}");
        }
        // That of the last vring is the end of a start.
        let end = format!("SET_VRING_ENABLE vring={last} enable=true");
        let log = wait_until("both front-ends start all their vrings", PATIENCE, || {
            Some(daemon.log()).filter(|log| log.matches(&end).count() >= 2)
        });
        for (message, detail) in [("KICK", "fd=true"), ("ENABLE", "enable=true")] {
            for vring in 0..=last + 1 {
                let line = format!("SET_VRING_{message} vring={vring} {detail}");
                let times = log.matches(&line).count();
                // At both ports, and again when OVS sets a port's MTU.
                let right = if vring > last { times == 0 } else { times >= 2 };
                assert!(right, "{line}: {times} times in\n{log}");
            }
        }
    }

    /// Nothing was dropped for a reason that there was not, and the daemon ends well.
    fn stop(daemon: Daemon) {
        for name in ["a", "b"] {
            for reason in ["no_offload", "bad_vnet_header", "bad_chain", "bad_frame"] {
                let counter = format!("tx_drop_{reason}");
                assert_eq!(daemon.counter(name, &counter), 0, "{name} {counter}");
            }
            assert_eq!(daemon.counter(name, "ring_faults"), 0, "{name}");
        }
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    fn stations_talk(between: Between, packed: bool, queues: u16) {
        let ovs = Ovs::start(OvsConfig {
            two_cores: queues > 1,
            ..OvsConfig::default()
        });
        let port = PortConfig {
            packed,
            queues,
            ..SPLIT
        };
        let daemon = start_daemon(&ovs, between, &port);
        let left = add_side(&ovs, "a", "10.1.0.1", &port);
        let right = add_side(&ovs, "b", "10.1.0.2", &port);
        check_negotiated(&daemon, &port);
        left.pings(&right, "-s 1400");
        right.pings(&left, "-s 9000");
        left.connect(&right).exchange(1 << 20);
        let before = daemon.counter("a", "tx_bytes");
        left.iperf(&right, 32, 4);
        right.iperf(&left, 32, 4);
        let carried = daemon.counter("a", "tx_bytes") - before;
        assert!(carried > 32 << 20, "{carried} bytes");
        if queues > 1 {
            // Sixteen connections and more, spread by a hash: each pair got many of them.
            let received = ovs.received_by_core();
            assert_eq!(received.len(), 2, "{received:?}");
            assert!(received.iter().all(|&n| n > 200), "{received:?}");
        }
        stop(daemon);
    }

    macro_rules! stations_talk {
        ($($name:ident: $between:expr, $packed:literal, $queues:literal;)+) => {
            $(
                #[test]
                fn $name() {
                    stations_talk($between, $packed, $queues);
                }
            )+
        };
    }

    stations_talk! {
        over_a_wire_split: Between::Wire, false, 1;
        over_a_wire_split_two_pairs: Between::Wire, false, 2;
        over_a_wire_packed: Between::Wire, true, 1;
        over_a_wire_packed_two_pairs: Between::Wire, true, 2;
        through_a_switch_split: Between::Switch, false, 1;
        through_a_switch_split_two_pairs: Between::Switch, false, 2;
        through_a_switch_packed: Between::Switch, true, 1;
        through_a_switch_packed_two_pairs: Between::Switch, true, 2;
    }

    /// Stations of two VLANs at each end, their frames tagged between OVS and the daemon.
    #[test]
    fn a_trunk_carries_its_vlans_and_no_other() {
        let ovs = Ovs::start(OvsConfig::default());
        let net = |name: &str, vlan: &str| {
            let socket = ovs.socket(name);
            let socket = socket.display();
            format!("--net=name={name},socket={socket},link=switch:lan,vlan={vlan}")
        };
        let (a, b) = (net("a", "trunk:10+20-29"), net("b", "trunk:10+25"));
        let daemon = Daemon::start(&["run", "--core", "1", &a, &b, &net("c", "25")]);
        let mut stations = Vec::new();
        // Port c is an access port: its frames have no tag, whatever its VLAN.
        for (name, vlans) in [
            ("a", &[Some(10), Some(25), Some(30)][..]),
            ("b", &[Some(10), Some(25), Some(30)]),
            ("c", &[None]),
        ] {
            let bridge = format!("br-{name}");
            ovs.add_bridge(&bridge);
            ovs.add_front_end(&bridge, name, &SPLIT);
            for &vlan in vlans {
                let address = format!("10.1.0.{}", stations.len() + 1);
                stations.push(ovs.add_station(&bridge, &address, vlan));
            }
        }
        let [a10, a25, a30, b10, b25, b30, c25] = &stations[..] else {
            panic!("{} stations", stations.len());
        };
        for (one, other) in [(a10, b10), (a25, b25), (a25, c25), (b25, c25)] {
            one.pings(other, "-s 1400");
            other.pings(one, "-s 4000");
        }
        a25.iperf(b25, 16, 1);
        a25.connect(c25).exchange(1 << 20);
        let before = daemon.counter("a", "tx_drop_vlan");
        assert!(!a30.is_answered(b30), "VLAN 30 is on neither trunk");
        let after = daemon.counter("a", "tx_drop_vlan");
        assert!(after > before, "{before} to {after} drops");
        for (one, other) in [(a10, b25), (a10, c25), (b10, a25), (c25, b10)] {
            assert!(!one.is_answered(other), "from one VLAN to another");
        }
        // It was not that nothing passed.
        a10.pings(b10, "");
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// Waits for both front-ends, which listen, to have the new daemon. Two threads of DPDK (22.11)
    /// may look at a link that went down at once: one takes the end of the last connection for
    /// that of the new one, and the front-end is of no use any more. Then it is made anew.
    fn come_back(ovs: &Ovs, daemon: &Daemon, port: &PortConfig, ovs_said: usize) {
        for name in ["a", "b"] {
            let lost = format!(
                "({}) Reconnect callback call failed",
                ovs.socket(name).display()
            );
            let is_lost = wait_until("a front-end has the new daemon", PATIENCE, || {
                let has_it = daemon.log().contains(&format!("negotiated device={name}"));
                let is_lost = || ovs.log()[ovs_said..].contains(&lost).then_some(true);
                has_it.then_some(false).or_else(is_lost)
            });
            if is_lost {
                eprintln!("OVS lost {name} by itself: it is made anew");
                ovs.del_front_end(name);
                ovs.add_front_end(&format!("br-{name}"), name, port);
            }
        }
    }

    /// A connection between two stations that lives through the end of either program.
    fn traffic_outlives_restarts(packed: bool) {
        let port = PortConfig {
            packed,
            queues: 2,
            listens: true,
            ..SPLIT
        };
        let mut ovs = Ovs::start(OvsConfig::default());
        // The daemon comes first: a DPDK that listens stops its program until someone comes.
        let mut daemon = start_daemon(&ovs, Between::Wire, &port);
        let left = add_side(&ovs, "a", "10.1.0.1", &port);
        let right = add_side(&ovs, "b", "10.1.0.2", &port);
        check_negotiated(&daemon, &port);
        left.reaches(&right);
        let mut connection = left.connect(&right);
        connection.exchange(1 << 20);
        // Killed as by a crash, and ended as by an update.
        for kill in [true, false] {
            let ovs_said = ovs.log().len();
            if kill {
                drop(daemon);
            } else {
                stop(daemon);
            }
            assert!(!left.is_answered(&right), "nobody is there to pass it on");
            daemon = start_daemon(&ovs, Between::Wire, &port);
            come_back(&ovs, &daemon, &port, ovs_said);
            check_negotiated(&daemon, &port);
            connection.exchange(1 << 20);
        }
        let position = daemon.log().len();
        ovs.crash_and_restart(&["a", "b"]);
        daemon.wait_log_after(position, "negotiated device=a", PATIENCE);
        daemon.wait_log_after(position, "negotiated device=b", PATIENCE);
        left.reaches(&right);
        connection.exchange(1 << 20);
        left.iperf(&right, 16, 4);
        stop(daemon);
    }

    #[test]
    fn traffic_outlives_restarts_of_either_side_split() {
        traffic_outlives_restarts(false);
    }

    #[test]
    fn traffic_outlives_restarts_of_either_side_packed() {
        traffic_outlives_restarts(true);
    }

    /// The daemon listens: OVS comes again by itself after its own crash, and gets a new port when
    /// the daemon is a new one (DPDK's front-end does not connect twice).
    #[test]
    fn a_daemon_that_listens_gets_its_front_ends_back() {
        let mut ovs = Ovs::start(OvsConfig::default());
        let mut daemon = start_daemon(&ovs, Between::Switch, &PACKED);
        let left = add_side(&ovs, "a", "10.1.0.1", &PACKED);
        let right = add_side(&ovs, "b", "10.1.0.2", &PACKED);
        left.reaches(&right);
        let mut connection = left.connect(&right);
        connection.exchange(1 << 18);
        ovs.crash_and_restart(&[]);
        left.reaches(&right);
        connection.exchange(1 << 18);
        stop(daemon);
        daemon = start_daemon(&ovs, Between::Switch, &PACKED);
        for name in ["a", "b"] {
            ovs.del_front_end(name);
            ovs.add_front_end(&format!("br-{name}"), name, &PACKED);
        }
        check_negotiated(&daemon, &PACKED);
        left.reaches(&right);
        connection.exchange(1 << 18);
        stop(daemon);
    }

    // What OVS's own tests/system-dpdk.at does with vhost-user ports, with the roles swapped.

    /// Ports come and go, and each works.
    fn ports_come_and_go(listens: bool) {
        let ovs = Ovs::start(OvsConfig::default());
        let port = PortConfig { listens, ..PACKED };
        let daemon = start_daemon(&ovs, Between::Switch, &port);
        let left = add_side(&ovs, "a", "10.1.0.1", &port);
        let right = add_side(&ovs, "b", "10.1.0.2", &port);
        for round in 0..6 {
            left.pings(&right, "");
            let position = daemon.log().len();
            ovs.del_front_end("a");
            daemon.wait_log_after(position, "net a: session ended", PATIENCE);
            // The next one has the other ring format.
            let packed = round % 2 == 1;
            ovs.add_front_end("br-a", "a", &PortConfig { packed, ..port });
            let line = daemon.wait_log_after(position, "negotiated device=a", PATIENCE);
            assert_eq!(line.contains("rings=packed"), packed, "{line}");
        }
        right.pings(&left, "");
        stop(daemon);
    }

    #[test]
    fn ports_that_connect_come_and_go() {
        ports_come_and_go(false);
    }

    #[test]
    fn ports_that_listen_come_and_go() {
        ports_come_and_go(true);
    }

    /// A port is removed in the middle of traffic in both directions, and the traffic ends well.
    fn port_goes_under_traffic(packed: bool) {
        let ovs = Ovs::start(OvsConfig::default());
        let port = PortConfig { packed, ..SPLIT };
        let daemon = start_daemon(&ovs, Between::Wire, &port);
        let left = add_side(&ovs, "a", "10.1.0.1", &port);
        let right = add_side(&ovs, "b", "10.1.0.2", &port);
        left.reaches(&right);
        let mut connection = left.connect(&right);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let talk = scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    connection.exchange(1 << 18);
                }
            });
            for name in ["a", "b", "a"] {
                let moved = daemon.counter("b", "tx_frames");
                wait_until("traffic in full flow", PATIENCE, || {
                    let now = daemon.counter("b", "tx_frames");
                    (now > moved + 200 || talk.is_finished()).then_some(())
                });
                let position = daemon.log().len();
                ovs.del_front_end(name);
                daemon.wait_log_after(position, "session ended", PATIENCE);
                ovs.add_front_end(&format!("br-{name}"), name, &port);
            }
            ended.store(true, Ordering::Relaxed);
        });
        connection.exchange(1 << 20);
        stop(daemon);
    }

    #[test]
    fn a_port_goes_under_traffic_and_comes_back_split() {
        port_goes_under_traffic(false);
    }

    #[test]
    fn a_port_goes_under_traffic_and_comes_back_packed() {
        port_goes_under_traffic(true);
    }

    /// The MTU of the front-ends goes up, and packets of that size pass; it goes down again, and
    /// they don't.
    fn mtu_up_and_down(packed: bool) {
        let ovs = Ovs::start(OvsConfig::default());
        let port = PortConfig { packed, ..SPLIT };
        let daemon = start_daemon(&ovs, Between::Wire, &port);
        let left = add_side(&ovs, "a", "10.1.0.1", &port);
        let right = add_side(&ovs, "b", "10.1.0.2", &port);
        left.pings(&right, "-M do -s 1472");
        for station in [&left, &right] {
            ovs.set_station_mtu(station, 4000);
        }
        let long = format!("ping -q -c 1 -W 0.5 -M do -s 3972 {}", right.address);
        assert!(!left.netns.run(&long).status.success(), "1500 is the limit");
        for mtu in [4000, 1500] {
            // On new ports: DPDK's driver leaves buffers of the old size in the rings of others.
            for name in ["a", "b"] {
                ovs.del_front_end(name);
                let port = PortConfig { mtu, ..port };
                ovs.add_front_end(&format!("br-{name}"), name, &port);
                assert_eq!(ovs.interface(name, "mtu"), mtu.to_string());
            }
            left.pings(&right, "-M do -s 1472");
            if mtu == 4000 {
                left.pings(&right, "-M do -s 3972");
                right.pings(&left, "-M do -s 3000");
                left.connect(&right).exchange(1 << 20);
            } else {
                assert!(!left.netns.run(&long).status.success(), "1500 again");
            }
        }
        stop(daemon);
    }

    #[test]
    fn the_mtu_goes_up_and_down_split() {
        mtu_up_and_down(false);
    }

    #[test]
    fn the_mtu_goes_up_and_down_packed() {
        mtu_up_and_down(true);
    }

    /// testpmd between a tap and a virtio-user port stands for a guest, one at each end.
    fn guests_of_taps(listens: bool, queues: u16) {
        let ends = [Netns::new(), Netns::new()];
        for number in [1, 5] {
            let path = RingPath::number(number).unwrap();
            let dir = TempDir::new("ovs-taps");
            let socket = |name: &str| dir.path(&format!("{name}.sock"));
            let mode = if listens { "client" } else { "server" };
            let net = |name: &str| {
                let socket = socket(name);
                let socket = socket.display();
                format!("--net=name={name},socket={socket},mode={mode},queues={queues}")
            };
            let (a, b) = (format!("{},link=wire:b", net("a")), net("b"));
            let daemon = Daemon::start(&["run", "--core", "1", "--log-level", "debug", &a, &b]);
            let mut config = path.front_end_with(&socket("a"), 1024, queues);
            if listens {
                config.vdevs[0] += ",server=1";
            }
            let other = config.vdevs[0]
                .replace("virtio_user0", "virtio_user1")
                .replace("a.sock", "b.sock");
            config.vdevs.push(other);
            // Ports in pairs forward to each other, and so do their queues of one number.
            config.vdevs.insert(1, "net_tap0,iface=vt-dpdk0".to_owned());
            config.vdevs.push("net_tap1,iface=vt-dpdk1".to_owned());
            let mut testpmd = Testpmd::start(&config);
            check_negotiated(
                &daemon,
                &PortConfig {
                    packed: path.packed,
                    queues,
                    listens,
                    ..SPLIT
                },
            );
            for (last, netns) in ends.iter().enumerate() {
                must_run(&format!("ip link set vt-dpdk{last} netns {}", netns.name()));
                netns.ok(&format!("ip addr add 10.2.0.{last}/31 dev vt-dpdk{last}"));
                netns.ok(&format!("ip link set vt-dpdk{last} up"));
            }
            testpmd.cmd("start");
            for (last, netns) in ends.iter().enumerate() {
                let address = format!("10.2.0.{}", 1 - last);
                let once = format!("ping -q -c 1 -W 0.3 {address}");
                wait_until("an answer", PATIENCE, || {
                    netns.run(&once).status.success().then_some(())
                });
                netns.ok(&format!("ping -q -c 5 -i 0.02 -s 1400 -W 2 {address}"));
            }
            datagrams_arrive(&ends);
            testpmd.quit();
            queues_add_up(&daemon, queues);
            stop(daemon);
        }
    }

    /// Datagrams of many senders, which are spread over the queues, from each end to the other.
    fn datagrams_arrive(ends: &[Netns; 2]) {
        let bound = |last: usize| {
            let socket = ends[last].spawn(move || UdpSocket::bind(format!("10.2.0.{last}:0")));
            let socket = socket.join().expect("no panic").expect("a socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a limit");
            socket
        };
        for from in [0, 1] {
            let receiver = bound(1 - from);
            let address = receiver.local_addr().expect("bound");
            for seed in 1..=32 {
                let (sender, mut buffer) = (bound(from), [0; 2048]);
                let sent = random_bytes(seed, 40 * usize::try_from(seed).unwrap());
                sender.send_to(&sent, address).expect("room");
                let (length, source) = receiver.recv_from(&mut buffer).expect("it arrives");
                assert_eq!(source, sender.local_addr().expect("bound"));
                assert!(buffer[..length] == sent, "datagram {seed} from {from}");
            }
        }
    }

    /// Every queue of either port had frames both ways, and together they are what the port had.
    fn queues_add_up(daemon: &Daemon, queues: u16) {
        for (name, way) in [("a", "tx"), ("a", "rx"), ("b", "tx"), ("b", "rx")] {
            for unit in ["packets", "bytes"] {
                let count = |key: String| daemon.one_queue_counter(name, &key);
                let each = (0..queues).map(|queue| count(format!("{way}_q{queue}_good_{unit}")));
                let each: Vec<_> = each.collect();
                assert!(each.iter().all(|&n| n > 0), "{name} {way} {unit}: {each:?}");
                let port = count(format!("{way}_good_{unit}"));
                assert_eq!(each.iter().sum::<u64>(), port, "{name} {way} {unit}");
            }
        }
    }

    #[test]
    fn guests_made_of_testpmd_and_taps_ping_each_other() {
        guests_of_taps(false, 1);
    }

    #[test]
    fn guests_that_listen_with_two_pairs_ping_each_other() {
        guests_of_taps(true, 2);
    }

    fn must_run(line: &str) {
        let output = Command::new("sh").args(["-c", line]).output();
        let output = output.expect("sh runs");
        assert!(output.status.success(), "{line}: {output:?}");
    }

    /// Packets of 9000 bytes, each in one frame, from the station and from the guest.
    fn jumbo_frames_pass(daemon: &Daemon, guest: &mut Guest, station: &Station) {
        let large =
            || ["tx", "rx"].map(|way| daemon.queue_counter("a", way, "size_1519_max_packets"));
        let before = large();
        let netns = &station.netns;
        netns.ok("ping -q -c 5 -i 0.05 -W 2 -M do -s 8972 10.1.0.1");
        guest.ok("ping -c 3 -i 0.2 -s 8972 10.1.0.2");
        assert_eq!(large(), before.map(|count| count + 8), "{before:?}");
    }

    /// One byte more than a switch's ports are given, both ways: dropped, and counted at the port
    /// that sent it.
    fn a_byte_more_is_dropped(daemon: &Daemon, guest: &mut Guest, station: &Station) {
        guest.ok("ip link set eth0 mtu 9001");
        let drops = || ["b", "a"].map(|port| daemon.counter(port, "tx_drop_mtu"));
        let before = drops();
        let ping = "ping -q -c 1 -W 0.3 -M do -s 8973 10.1.0.1";
        assert!(!station.netns.run(ping).status.success(), "9001 pass");
        assert_eq!(drops(), [before[0] + 1, before[1]], "to the guest");
        let (status, said) = guest.run("ping -c 1 -W 1 -s 8973 10.1.0.2");
        assert_ne!(status, 0, "9001 pass: {said}");
        assert_eq!(drops(), before.map(|count| count + 1), "to the station");
        guest.ok("ip link set eth0 mtu 9000");
    }

    /// A QEMU guest with the address 10.1.0.1 at port `a`, and a station behind OVS at port `b`.
    fn guest_talks_to_ovs(links: [&str; 2], packed: bool, vlan: Option<u16>) {
        let ovs = Ovs::start(OvsConfig::default());
        let port = PortConfig {
            // The two ends never have the same ring format.
            packed: !packed,
            mtu: 9100,
            ..SPLIT
        };
        let net = |name: &str, link: &str| {
            let socket = ovs.socket(name);
            let socket = socket.display();
            format!("--net=name={name},socket={socket},queues=2,{link}")
        };
        let (a, b) = (net("a", links[0]), net("b", links[1]));
        let daemon = Daemon::start(&["run", "--core", "1", &a, &b]);
        ovs.add_bridge("br-b");
        ovs.add_front_end("br-b", "b", &port);
        let station = ovs.add_station("br-b", "10.1.0.2", vlan);
        // For a byte more than the others take.
        ovs.set_station_mtu(&station, 9001);
        let mut guest = Guest::boot(&GuestConfig {
            nics: vec![Nic {
                socket: ovs.socket("a"),
                queues: 2,
                packed,
                mac: "52:54:00:12:34:01",
                extra: "",
            }],
            ..GuestConfig::default()
        });
        let bits = guest.features("/sys/class/net/eth0/device");
        assert_eq!(bits & 1 << 34 != 0, packed, "{bits:#x}");
        guest.ok("ip link set eth0 mtu 9000");
        guest.ok("ip addr add 10.1.0.1/24 dev eth0");
        guest.ok("ip link set eth0 up");
        wait_until("the guest is reached", PATIENCE, || {
            let once = station.netns.run("ping -q -c 1 -W 0.3 10.1.0.1");
            once.status.success().then_some(())
        });
        jumbo_frames_pass(&daemon, &mut guest, &station);
        if vlan.is_some() {
            a_byte_more_is_dropped(&daemon, &mut guest, &station);
        }
        guest.ok("ping -c 3 -i 0.2 -s 12000 10.1.0.2");
        for queues in [1, 2] {
            guest.ok(&format!("ethtool -L eth0 combined {queues}"));
            // The guest is the client, so that nothing runs in it when the next command comes: its
            // serial line loses what is typed under load.
            // Of the 4 MiB that it sends the server need not read what is in buffers at the end.
            for (options, way) in [("-R -t 1", "rx_bytes"), ("-n 4M", "tx_bytes")] {
                let before = daemon.counter("a", way);
                let (mut server, _said) = station.serve_iperf();
                guest.ok(&format!("iperf3 -c 10.1.0.2 {options} -P 2"));
                server.wait();
                let carried = daemon.counter("a", way) - before;
                assert!(carried > 1 << 20, "{carried} {way}");
            }
        }
        every_byte_arrives_whatever_is_left_undone(&daemon, &mut guest, &station);
        drop(guest);
        stop(daemon);
    }

    /// Guest to station. OVS takes no frame whose checksum is still to be made, nor one to be cut.
    fn every_byte_arrives_whatever_is_left_undone(
        daemon: &Daemon,
        guest: &mut Guest,
        station: &Station,
    ) {
        let sum =
            guest.ok("dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null; sha256sum /tmp/x");
        let done = || ["rx_software_csum", "rx_software_segments"].map(|n| daemon.counter("b", n));
        for (toggle, undone) in [
            ("tx on tso on", [true, true]),
            ("tso off gso off", [true, false]),
            ("tx off", [false, false]),
            ("tx on tso on gso on", [true, true]),
        ] {
            guest.ok(&format!("ethtool -K eth0 {toggle}"));
            let before = done();
            let heard = station.receive_once(5000);
            guest.run_within("nc 10.1.0.2 5000 </tmp/x", PATIENCE);
            let heard = heard.join().expect("no panic");
            assert_eq!(heard.len(), 4 << 20, "{toggle}");
            assert_eq!(
                sha256_of(&heard),
                sum.split(' ').next().unwrap(),
                "{toggle}"
            );
            let rose = [0, 1].map(|at| done()[at] > before[at]);
            assert_eq!(rose, undone, "{toggle}: checksums, segments");
        }
    }

    #[test]
    fn a_guest_on_packed_rings_and_ovs_are_on_one_wire() {
        guest_talks_to_ovs(["link=wire:b", "hold_us=100"], true, None);
    }

    #[test]
    fn a_guest_at_an_access_port_reaches_a_vlan_of_ovs() {
        let links = [
            "link=switch:lan,mtu=9000,vlan=10",
            "link=switch:lan,mtu=9000,vlan=trunk:10+20",
        ];
        guest_talks_to_ovs(links, false, Some(10));
    }
}
