//! DPDK's testpmd as the front-end of a port that sends every frame back (`link=echo`).
//!
//! Each of the ten ring paths that a DPDK driver has (VIRTIO 1.3 §2.7, §2.8, §5.1.6) moves frames
//! of 64 and 1518 bytes and of chained buffers, loses none, and brings back the bytes it sent; and
//! moves frames on eight queues. Then rings of odd size, and memory in 4 KiB pages. At the end DPDK
//! is the back-end, under the load of `vringd bench net`. Needs root, 2 MiB hugepages and two
//! cores: the front-end is on core 0, the back-end on core 1; run with one test thread.

mod support;

#[cfg(test)]
mod on_echo {
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::pcap::{Random, read_pcap, write_pcap};
    use super::support::testpmd::{RingPath, Testpmd, TestpmdConfig};
    use super::support::tmp::TempDir;
    use std::time::Duration;

    /// For what the daemon does by itself; what testpmd is asked has its own time limit.
    const TIMEOUT: Duration = Duration::from_secs(20);

    /// Counter of frames that no receive buffer of the same port can hold.
    const COUNTER_TOO_BIG: &str = "tx_drop_rx_too_small";

    /// A frame of 8000 bytes in a chain of four buffers.
    const CHAIN: &str = "2000,2000,2000,2000";

    /// With the option that lets testpmd send a frame of several buffers (TX_OFFLOAD_MULTI_SEGS).
    const MULTI_SEGMENT: &str = "--tx-offloads=0x8000";

    /// A daemon with one echo port, and the path of its socket.
    struct Echo {
        daemon: Daemon,
        dir: TempDir,
    }

    impl Echo {
        fn start(name: &str, queues: u16) -> Self {
            let echo = Self::start_with(name, &format!("queues={queues}"));
            wait_until("the socket is there", TIMEOUT, || {
                echo.dir.path("net0.sock").exists().then_some(())
            });
            echo
        }

        fn start_with(name: &str, keys: &str) -> Self {
            let dir = TempDir::new(name);
            let socket = dir.path("net0.sock");
            let net = format!("name=net0,socket={},link=echo,{keys}", socket.display());
            let daemon =
                Daemon::start(&["run", "--core", "1", "--idle", "adaptive", "--net", &net]);
            Self { daemon, dir }
        }

        /// Attaches a front-end, and checks on both sides that the path is the one meant.
        fn attach(&self, path: &RingPath, config: &TestpmdConfig) -> Testpmd {
            let testpmd = Testpmd::start(config);
            self.daemon.wait_log("negotiated", TIMEOUT);
            let log = self.daemon.log();
            let negotiated = log.lines().rfind(|line| line.contains("negotiated"));
            let negotiated = negotiated.expect("just waited for");
            for (feature, wanted) in [("RING_PACKED", path.packed), ("MRG_RXBUF", path.mergeable)] {
                let is = negotiated.contains(feature);
                assert_eq!(is, wanted, "{feature} on path {}: {negotiated}", path.name);
            }
            // virtio-user drops a bit that is not offered without a word. So IN_ORDER is taken as
            // it comes (never unasked), and the driver's own word for its code must agree.
            let in_order = negotiated.contains("IN_ORDER");
            assert!(path.in_order || !in_order, "{}: {negotiated}", path.name);
            let code = path.receives_with(in_order);
            let transcript = testpmd.transcript();
            assert!(transcript.contains(code), "no {code:?} in:\n{transcript}");
            testpmd
        }

        /// The newest value of a counter of the port; none while it is not in the log.
        fn counter(&self, key: &str) -> Option<u64> {
            self.daemon.signal(libc::SIGUSR1);
            let log = self.daemon.log();
            let line = log
                .lines()
                .rfind(|l| l.contains("counters") && l.contains("device=net0"))?;
            let value = line
                .split_whitespace()
                .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))?;
            Some(value.parse().expect("a count"))
        }

        fn stop(self) {
            let (status, log) = self.daemon.stop();
            assert!(status.success(), "{status}:\n{log}");
        }
    }

    fn echoes_both_sizes(number: u8) {
        let path = RingPath::number(number).unwrap();
        let echo = Echo::start("testpmd-sizes", 1);
        let mut testpmd = echo.attach(&path, &path.front_end(&echo.dir.path("net0.sock")));
        testpmd.forwards("64", path.bursts(), 100_000);
        testpmd.forwards("1518", path.bursts(), 50_000);
        testpmd.quit();
        echo.stop();
    }

    fn echoes_chains(number: u8) {
        let path = RingPath::number(number).unwrap();
        let echo = Echo::start("testpmd-chains", 1);
        let mut config = path.front_end(&echo.dir.path("net0.sock"));
        let mut testpmd = echo.attach(&path, config.app(MULTI_SEGMENT));
        // 128 frames of four buffers each: within both rings, so none may be lost.
        testpmd.forwards(CHAIN, 4, 20_000);
        testpmd.forwards("64", path.bursts(), 100_000);
        testpmd.quit();
        echo.stop();
    }

    fn drops_and_counts_chains(number: u8) {
        let path = RingPath::number(number).unwrap();
        let echo = Echo::start("testpmd-drops", 1);
        let mut config = path.front_end(&echo.dir.path("net0.sock"));
        // Path 6 has an option of this kind already; the later one counts.
        let mut testpmd = echo.attach(&path, config.app(MULTI_SEGMENT));
        // Each round takes 512 descriptors and more: after two of them the ring is full unless the
        // descriptors of dropped frames come back.
        for round in 1..=5 {
            testpmd.start_traffic(CHAIN, 4);
            let sent = testpmd.wait_stats("frames leave", 0, |s| s.tx_packets == round * 128);
            wait_until("every frame is counted as dropped", TIMEOUT, || {
                echo.counter(COUNTER_TOO_BIG)
                    .filter(|&dropped| dropped == sent.tx_packets)
            });
            assert_eq!(testpmd.stop(), 0, "testpmd had no room to send");
            assert_eq!(testpmd.stats(0).rx_packets, 0, "a frame came back");
        }
        testpmd.forwards("64", path.bursts(), 100_000);
        assert_eq!(echo.counter(COUNTER_TOO_BIG), Some(5 * 128));
        testpmd.quit();
        echo.stop();
    }

    /// Sends frames from one capture file through the echo port into another, and compares.
    fn brings_back(path: &RingPath, frames: &[Vec<u8>]) {
        let echo = Echo::start("testpmd-bytes", 1);
        let config = path.front_end(&echo.dir.path("net0.sock"));
        brings_back_from(echo, path, config, frames);
    }

    /// The same, to and from a front-end that is made otherwise.
    fn brings_back_from(
        echo: Echo,
        path: &RingPath,
        mut config: TestpmdConfig,
        frames: &[Vec<u8>],
    ) {
        let (sent, received) = (echo.dir.path("sent.pcap"), echo.dir.path("received.pcap"));
        write_pcap(&sent, frames);
        // Who waits for room to send must not be who makes it by receiving.
        config.threads = 2;
        config.first_vdev(format!(
            "net_pcap0,rx_pcap={},tx_pcap={}",
            sent.display(),
            received.display()
        ));
        // Else testpmd throws away what a port holds when forwarding starts: the whole file.
        config.app("--no-flush-rx");
        let mut testpmd = echo.attach(path, &config);
        // A frame that finds no room is tried again: the ring may be shorter than the file.
        testpmd.cmd("set fwd io retry");
        testpmd.cmd("set burst tx delay 10 retry 100000");
        testpmd.cmd("start");
        let all = u64::try_from(frames.len()).unwrap();
        testpmd.wait_stats("all frames are captured", 0, |s| s.tx_packets >= all);
        assert_eq!(testpmd.stop(), 0, "testpmd dropped frames itself");
        testpmd.quit();
        let back = read_pcap(&received);
        assert_eq!(back.len(), frames.len(), "frames on path {}", path.name);
        for (number, (back, frame)) in back.iter().zip(frames).enumerate() {
            assert!(
                back == frame,
                "frame {number} of {} bytes differs on path {}: {back:02x?} for {frame:02x?}",
                frame.len(),
                path.name
            );
        }
        echo.stop();
    }

    fn brings_back_every_byte(number: u8) {
        let path = RingPath::number(number).unwrap();
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(number));
        // A multiple of four: SIMD code leaves up to three frames in the ring.
        let mut frames: Vec<_> = (0..998).map(|_| random.frame(60, 1514)).collect();
        frames.push(random.frame(60, 60));
        frames.push(random.frame(1514, 1514));
        brings_back(&path, &frames);
    }

    fn brings_back_every_byte_of_chains(number: u8) {
        let path = RingPath::number(number).unwrap();
        let mut random = Random(0x2545_f491_4f6c_dd1d ^ u64::from(number));
        let frames: Vec<_> = (0..200).map(|_| random.frame(60, 8000)).collect();
        brings_back(&path, &frames);
    }

    macro_rules! ring_path {
        ($name:ident, $number:literal, mergeable) => {
            ring_path!(
                $name,
                $number,
                echoes_chains_of_8000_bytes: echoes_chains,
                brings_back_every_byte_of_chains: brings_back_every_byte_of_chains,
            );
        };
        ($name:ident, $number:literal, non_mergeable) => {
            ring_path!(
                $name,
                $number,
                drops_and_counts_chains_and_goes_on: drops_and_counts_chains,
            );
        };
        ($name:ident, $number:literal, $($test:ident: $body:ident,)+) => {
            mod $name {
                #[test]
                fn echoes_64_and_1518_bytes_and_loses_none() {
                    super::echoes_both_sizes($number);
                }

                #[test]
                fn brings_back_every_byte_in_order() {
                    super::brings_back_every_byte($number);
                }

                #[test]
                fn every_one_of_eight_queues_moves_frames() {
                    super::moves_frames_on_eight_queues($number);
                }

                $(
                    #[test]
                    fn $test() {
                        super::$body($number);
                    }
                )+
            }
        };
    }

    ring_path!(path_01_packed_mergeable, 1, mergeable);
    ring_path!(path_02_packed, 2, non_mergeable);
    ring_path!(path_03_packed_in_order_mergeable, 3, mergeable);
    ring_path!(path_04_packed_in_order, 4, non_mergeable);
    ring_path!(path_05_split_mergeable, 5, mergeable);
    ring_path!(path_06_split, 6, non_mergeable);
    ring_path!(path_07_split_vector_rx, 7, non_mergeable);
    ring_path!(path_08_split_in_order_mergeable, 8, mergeable);
    ring_path!(path_09_split_in_order, 9, non_mergeable);
    ring_path!(path_10_packed_vectorized, 10, non_mergeable);

    /// What DPDK's driver counts for a queue and a port, we count under the same name, and the same
    /// number.
    fn counts_as_the_driver_does(number: u8) {
        let path = RingPath::number(number).unwrap();
        let echo = Echo::start("testpmd-xstats", 2);
        let socket = echo.dir.path("net0.sock");
        let mut testpmd = echo.attach(&path, &path.front_end_with(&socket, 256, 2));
        for (frame, to) in [
            ("60", "00:01:02:03:04:06"),
            ("64", "01:00:5e:00:00:01"),
            ("127", "00:01:02:03:04:06"),
            ("128", "ff:ff:ff:ff:ff:ff"),
            ("300", "33:33:00:00:00:01"),
            ("1023", "ff:ff:ff:ff:ff:fe"),
            ("1518", "00:01:02:03:04:06"),
        ] {
            let before = testpmd.stats(0).rx_packets;
            testpmd.cmd(&format!("set eth-peer 0 {to}"));
            testpmd.start_traffic(frame, 2);
            testpmd.wait_stats("frames keep coming", 0, |stats| {
                stats.rx_packets > before + 5000
            });
            assert_eq!(testpmd.stop(), 0, "testpmd had no room for frames it got");
            testpmd.drain(0);
        }
        let theirs = testpmd.xstats(0);
        let position = echo.daemon.log().len();
        echo.daemon.signal(libc::SIGUSR1);
        echo.daemon
            .wait_log_after(position, "counters device=net0 ", Duration::from_secs(20));
        let log = echo.daemon.log();
        let ours = |name: &str| {
            let words = log[position..].split_whitespace();
            let mut value = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.next_back().map(|value| value.parse::<u64>().unwrap())
        };
        let (mut compared, mut of_port) = (0, 0);
        for (name, value) in theirs {
            let kinds = [
                "_size_",
                "_undersize_",
                "_good_",
                "_multicast_",
                "_broadcast_",
            ];
            if name.contains("_q") && kinds.iter().any(|kind| name.contains(kind)) {
                assert_eq!(ours(&name), Some(value), "{name}");
                compared += u32::from(value > 0);
            }
            // Of the whole port.
            if ["rx_good_", "tx_good_"]
                .iter()
                .any(|start| name.starts_with(start))
            {
                assert_eq!(ours(&name), Some(value), "{name}");
                assert!(value > 0, "{name}");
                of_port += 1;
            }
        }
        assert_eq!(of_port, 4, "frames and bytes, both ways");
        // Frames, bytes, groups, all, and seven of the eight bins, for two directions of two
        // queues; a queue may have missed a size.
        assert!(compared >= 4 * 10, "{compared}: {log}");
        testpmd.quit();
        echo.stop();
    }

    #[test]
    fn packed_queues_are_counted_as_the_driver_does() {
        counts_as_the_driver_does(1);
    }

    #[test]
    fn split_queues_are_counted_as_the_driver_does() {
        counts_as_the_driver_does(5);
    }

    fn moves_frames_on_eight_queues(number: u8) {
        let path = RingPath::number(number).unwrap();
        let echo = Echo::start("testpmd-queues", 8);
        let config = path.front_end_with(&echo.dir.path("net0.sock"), 1024, 8);
        let mut testpmd = echo.attach(&path, &config);
        testpmd.forwards("64", 8, 400_000);
        for (queue, (rx, tx)) in testpmd.queue_packets(0, 8).into_iter().enumerate() {
            // More than the 256 frames that each queue was given came round.
            assert!(rx > 256, "queue {queue} forwarded nothing: {rx} frames");
            assert_eq!(rx, tx, "queue {queue} got frames of another");
        }
        testpmd.quit();
        echo.stop();
    }

    #[test]
    fn packed_rings_of_odd_size_lose_no_frame() {
        for (number, size, bursts) in [(1, 1025, 32), (1, 255, 7), (4, 255, 7)] {
            let path = RingPath::number(number).unwrap();
            let echo = Echo::start("testpmd-odd", 1);
            let config = path.front_end_with(&echo.dir.path("net0.sock"), size, 1);
            let mut testpmd = echo.attach(&path, &config);
            // Many times round the ring, so that the wrap counters are used on every slot.
            testpmd.forwards("64", bursts, 200_000);
            testpmd.quit();
            echo.stop();
        }
    }

    /// Several times round the ring, in chains where the path takes them, to and from a front-end
    /// that listens.
    #[test]
    fn packed_rings_of_odd_size_bring_back_every_byte() {
        for (number, size) in [(1, 1025), (1, 255), (3, 255), (4, 255)] {
            let path = RingPath::number(number).unwrap();
            let mut random = Random(0x6a09_e667_f3bc_c908 ^ u64::from(number));
            let longest = if path.mergeable { 8000 } else { 1514 };
            let frames: Vec<_> = (0..2000).map(|_| random.frame(60, longest)).collect();
            let echo = Echo::start_with("testpmd-odd-bytes", "mode=client");
            let mut config = path.front_end_with(&echo.dir.path("net0.sock"), size, 1);
            config.vdevs[0] += ",server=1";
            brings_back_from(echo, &path, config, &frames);
        }
    }

    #[test]
    fn guest_memory_in_4_kib_pages_works_as_well() {
        for number in [1, 5] {
            let path = RingPath::number(number).unwrap();
            let echo = Echo::start("testpmd-pages", 1);
            let mut config = path.front_end(&echo.dir.path("net0.sock"));
            config.small_pages = true;
            let mut testpmd = echo.attach(&path, &config);
            testpmd.forwards("1518", 32, 50_000);
            testpmd.quit();
            echo.stop();
        }
    }

    /// The front-end listens (QEMU's and testpmd's word for it is "server"): the daemon comes to
    /// it, and comes again to the next one, and a daemon started anew comes to one that is there.
    #[test]
    fn as_a_client_the_daemon_connects_and_connects_again() {
        let path = RingPath::number(5).unwrap();
        let dir = TempDir::new("testpmd-client");
        let socket = dir.path("net0.sock");
        let net = format!(
            "name=net0,socket={},mode=client,link=echo",
            socket.display()
        );
        let arguments = ["run", "--core", "1", "--net", &net];
        let mut daemon = Daemon::start(&arguments);
        let front_end = || {
            let mut config = path.front_end(&socket);
            let vdev = config.vdevs[0].clone() + ",server=1";
            config.vdevs = vec![vdev];
            Testpmd::start(&config)
        };
        for _ in 0..2 {
            let mut testpmd = front_end();
            testpmd.forwards("64", 32, 20_000);
            testpmd.quit();
        }
        let waits = daemon
            .log()
            .matches("waiting for a front-end to listen")
            .count();
        assert!(waits > 0, "{}", daemon.log());
        let mut testpmd = front_end();
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        daemon = Daemon::start(&arguments);
        daemon.wait_log("negotiated", TIMEOUT);
        testpmd.forwards("64", 32, 20_000);
        testpmd.quit();
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }
}

/// The other way round: DPDK's own back-end under the load of `vringd bench net`, which works with
/// any that speaks the protocol.
#[cfg(test)]
mod under_load {
    use std::process::Command;
    use std::time::Duration;

    use super::support::deadline::wait_until;
    use super::support::testpmd::{Testpmd, TestpmdConfig};
    use super::support::tmp::TempDir;

    #[test]
    fn vhost_sends_every_frame_back() {
        let dir = TempDir::new("testpmd-load");
        let socket = dir.path("vhost0.sock");
        let testpmd = Testpmd::start(&TestpmdConfig::vhost_echo(1, &socket, 1));
        wait_until("the socket is there", Duration::from_secs(20), || {
            socket.exists().then_some(())
        });
        let pid = testpmd.pid().to_string();
        for load in [
            "--format split --size mix --mergeable",
            "--format packed --size 64",
            "--format split --size mix --chains indirect",
            "--format packed --size 1518 --chains indirect --ring-size 1000",
        ] {
            let output = Command::new("timeout")
                .args(["30", env!("CARGO_BIN_EXE_vringd"), "bench", "net"])
                .args(load.split_whitespace())
                .args(["--core", "0", "--in-flight", "256", "--duration", "1s"])
                .args(["--json", "--pid", &pid, "--socket"])
                .arg(&socket)
                .output()
                .expect("timeout (coreutils) can be run");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{load}: {said}");
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{report}"));
            assert!(count("frames") > 256, "{load}: {report}");
            assert_eq!(count("sent"), count("received"), "{load}: {report}");
            assert_eq!([count("lost"), count("mismatched")], [0, 0], "{report}");
            assert!(count("backend_cpu_ns") > 0, "{load}: {report}");
        }
        testpmd.quit();
    }
}
