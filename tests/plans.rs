//! DPDK's test plans for vhost that need no network card and no guest, with the daemon as back-end:
//! port restart and reconnects on each of the ten ring paths (loopback_multi_paths_port_restart,
//! loopback_virtio_user_server_mode), frames from one front-end to another compared by capture
//! files and by counters of size and kind of address (vm2vm_virtio_user, vhost_pmd_xstats), frames
//! queued before the back-end starts, for their sender and for the other.
//!
//! Sizes, queues, chains and 4 KiB pages are in tests/testpmd.rs, and what it needs is needed here.

mod support;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::pcap::{Random, read_pcap, write_pcap};
    use super::support::testpmd::{RingPath, Testpmd, TestpmdConfig};
    use super::support::tmp::TempDir;

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// All vrings of so many front-ends run.
    fn wait_started(daemon: &Daemon, front_ends: usize, queues: u16) {
        let enabled = format!("SET_VRING_ENABLE vring={} enable=true", 2 * queues - 1);
        wait_until("every vring is enabled", TIMEOUT, || {
            (daemon.log().matches(&enabled).count() >= front_ends).then_some(())
        });
    }

    fn start_daemon(nets: &[String]) -> Daemon {
        let mut arguments = vec!["run", "--core", "1", "--log-level", "debug"];
        arguments.extend(nets.iter().flat_map(|net| ["--net", net]));
        Daemon::start(&arguments)
    }

    fn stop(daemon: Daemon) {
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        let broken: Vec<_> = log
            .lines()
            .filter(|l| l.contains("broken by its driver"))
            .collect();
        assert!(broken.is_empty(), "{broken:?}");
    }

    /// A daemon that comes to a front-end that listens, and sends its frames back.
    fn start_echo(socket: &Path, queues: u16) -> Daemon {
        let net = format!("name=net0,socket={},mode=client", socket.display());
        start_daemon(&[format!("{net},link=echo,queues={queues}")])
    }

    fn listening(path: &RingPath, socket: &Path, queues: u16) -> TestpmdConfig {
        let mut config = path.front_end_with(socket, 1024, queues);
        config.vdevs[0] += ",server=1";
        config.app("--mask-event=intr_lsc");
        config
    }

    /// Starts it, and keeps what its driver says of a session's end and start, at any time, out of
    /// the middle of its answers.
    fn start_quiet(config: &TestpmdConfig) -> Testpmd {
        let mut testpmd = Testpmd::start(config);
        for part in ["init", "driver"] {
            testpmd.cmd(&format!("set log pmd.net.virtio.{part} 3"));
        }
        testpmd
    }

    fn shows_link(testpmd: &mut Testpmd, state: &str) {
        wait_until(&format!("the link is {state}"), TIMEOUT, || {
            let info = testpmd.cmd("show port info 0");
            info.contains(&format!("Link status: {state}"))
                .then_some(())
        });
    }

    /// Queues of the front-end that is started anew, and of the daemon.
    const QUEUES: u16 = 2;

    /// Each queue forwards, and gets what it sent and nothing else.
    fn every_queue_forwards(testpmd: &mut Testpmd, path: &RingPath, frame: &str) {
        testpmd.forwards(frame, path.bursts(), 20_000);
        let queues = testpmd.queue_packets(0, QUEUES);
        for (queue, (rx, tx)) in queues.into_iter().enumerate() {
            // More than it was given to begin with.
            assert!(rx > u64::from(32 * path.bursts()), "queue {queue}: {rx}");
            assert_eq!(rx, tx, "queue {queue} lost frames, or got another's");
        }
    }

    /// Frames in flow on every queue, with nothing said of those before.
    fn full_flow(testpmd: &mut Testpmd, bursts: u32) {
        testpmd.cmd("clear port stats all");
        testpmd.start_traffic("64", bursts);
        wait_until("full flow on every queue", TIMEOUT, || {
            let queues = testpmd.queue_packets(0, QUEUES);
            queues.iter().all(|(rx, _)| *rx > 10_000).then_some(())
        });
    }

    /// The front-end's port is stopped and started, the front-end itself is another one, the daemon
    /// is ended with rings at rest and killed with frames in full flow.
    fn survives_restarts(number: u8) {
        let path = RingPath::number(number).unwrap();
        let dir = TempDir::new("plans-restart");
        let socket = dir.path("net0.sock");
        let mut daemon = start_echo(&socket, QUEUES);
        let mut testpmd = start_quiet(&listening(&path, &socket, QUEUES));
        every_queue_forwards(&mut testpmd, &path, "64");
        testpmd.cmd("port stop all");
        testpmd.cmd("port start all");
        every_queue_forwards(&mut testpmd, &path, "1518");
        testpmd.quit();
        let mut testpmd = start_quiet(&listening(&path, &socket, QUEUES));
        wait_started(&daemon, 2, QUEUES);
        every_queue_forwards(&mut testpmd, &path, "64");
        stop(daemon);
        shows_link(&mut testpmd, "down");
        daemon = start_echo(&socket, QUEUES);
        wait_started(&daemon, 1, QUEUES);
        shows_link(&mut testpmd, "up");
        every_queue_forwards(&mut testpmd, &path, "64");
        // What is in the ring of a killed daemon may be lost, so testpmd has to send anew.
        full_flow(&mut testpmd, path.bursts());
        drop(daemon);
        daemon = start_echo(&socket, QUEUES);
        wait_started(&daemon, 1, QUEUES);
        testpmd.stop();
        full_flow(&mut testpmd, path.bursts() / 4);
        testpmd.stop();
        testpmd.quit();
        assert_eq!(daemon.counter("net0", "ring_faults"), 0);
        stop(daemon);
    }

    /// Frames that the front-end queues while there is no back-end leave when there is one, each
    /// once and in order. On split rings only: DPDK empties packed ones when it connects again.
    fn frames_queued_before_the_start_come_through(number: u8) {
        let path = RingPath::number(number).unwrap();
        let dir = TempDir::new("plans-queued");
        let [socket, sent, received] = ["net0.sock", "sent.pcap", "got.pcap"].map(|f| dir.path(f));
        let mut random = Random(0x5851_f42d_4c95_7f2d ^ u64::from(number));
        let frames: Vec<_> = (0..288).map(|_| random.frame(60, 1514)).collect();
        write_pcap(&sent, &frames);
        let daemon = start_echo(&socket, 1);
        let mut config = listening(&path, &socket, 1);
        config.first_vdev(pcap_port(0, &sent, &received));
        config.app("--no-flush-rx");
        let mut testpmd = start_quiet(&config);
        wait_started(&daemon, 1, 1);
        drop(daemon);
        testpmd.cmd("start");
        testpmd.wait_stats("all are queued", 1, |stats| stats.tx_packets == 288);
        assert_eq!(testpmd.stats(0).tx_packets, 0, "nobody is there");
        let daemon = start_echo(&socket, 1);
        testpmd.wait_stats("all come back", 0, |stats| stats.tx_packets >= 288);
        assert_eq!(testpmd.stop(), 0, "testpmd dropped frames itself");
        testpmd.quit();
        assert_eq!(daemon.counter("net0", "tx_frames"), 288);
        stop(daemon);
        compare(&read_pcap(&received), &frames);
    }

    fn pcap_port(number: u8, from: &Path, to: &Path) -> String {
        let (from, to) = (from.display(), to.display());
        format!("net_pcap{number},rx_pcap={from},tx_pcap={to}")
    }

    fn compare(got: &[Vec<u8>], frames: &[Vec<u8>]) {
        assert_eq!(got.len(), frames.len(), "frames");
        for (number, (got, frame)) in got.iter().zip(frames).enumerate() {
            let length = frame.len();
            assert!(
                got == frame,
                "frame {number} of {length} bytes: {got:02x?} for {frame:02x?}"
            );
        }
    }

    /// What DPDK's drivers count of these frames, by the end of the counter's name.
    fn counts(frames: &[Vec<u8>]) -> Vec<(String, u64)> {
        const BINS: [(&str, usize); 8] = [
            ("undersize", 0),
            ("size_64", 64),
            ("size_65_127", 65),
            ("size_128_255", 128),
            ("size_256_511", 256),
            ("size_512_1023", 512),
            ("size_1024_1518", 1024),
            ("size_1519_max", 1519),
        ];
        let number = |of: &dyn Fn(&[u8]) -> bool| {
            u64::try_from(frames.iter().filter(|frame| of(frame)).count()).unwrap()
        };
        let least = BINS.iter().map(|(_, least)| *least);
        let most = least.skip(1).chain([usize::MAX]);
        let bins = BINS.iter().zip(most).map(|(&(bin, least), next)| {
            let count = number(&|frame| (least..next).contains(&frame.len()));
            (format!("{bin}_packets"), count)
        });
        let all = number(&|frame| frame[..6] == [0xff; 6]);
        let groups = number(&|frame| frame[0] & 1 != 0) - all;
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let others = [
            ("good_packets", u64::try_from(frames.len()).unwrap()),
            ("good_bytes", u64::try_from(bytes).unwrap()),
            ("broadcast_packets", all),
            ("multicast_packets", groups),
        ];
        let others = others.map(|(name, count)| (name.to_owned(), count));
        bins.chain(others).collect()
    }

    /// Two front-ends in one testpmd, on the sockets `a` and `b`: what is in a capture file goes
    /// into the first, and what comes out of the second goes into another.
    fn two_front_ends(
        dir: &TempDir,
        paths: [u8; 2],
        frames: &[Vec<u8>],
        option: &str,
    ) -> TestpmdConfig {
        let [from, to] = paths.map(|number| RingPath::number(number).unwrap());
        let mut config = from.front_end(&dir.path("a.sock"));
        let other = to.front_end(&dir.path("b.sock"));
        let vdev = other.vdevs[0].replace("virtio_user0", "virtio_user1");
        config.vdevs.push(vdev.replace("04:05", "04:06"));
        for vdev in &mut config.vdevs {
            *vdev += option;
        }
        config.more_eal.extend(other.more_eal);
        config.more_eal.sort();
        config.more_eal.dedup();
        let [sent, nothing] = ["sent.pcap", "nothing.pcap"].map(|name| dir.path(name));
        write_pcap(&sent, frames);
        write_pcap(&nothing, &[]);
        config.first_vdev(pcap_port(0, &sent, &dir.path("back.pcap")));
        let last = pcap_port(1, &nothing, &dir.path("received.pcap"));
        config.vdevs.push(last);
        config.app("--no-flush-rx");
        config
    }

    /// [`two_front_ends`], started, and the daemon between them.
    struct TwoFrontEnds {
        dir: TempDir,
        daemon: Daemon,
        testpmd: Testpmd,
    }

    impl TwoFrontEnds {
        /// With `frames` sent and received; the capture file is complete after [`Self::end`].
        fn carry(link: &str, [from, to]: [u8; 2], frames: &[Vec<u8>]) -> Self {
            let dir = TempDir::new("plans-vm2vm");
            let net = |name: &str, link: &str| {
                let socket = dir.path(&format!("{name}.sock"));
                format!("name={name},socket={}{link}", socket.display())
            };
            let other = if link.contains("switch") { link } else { "" };
            let daemon = start_daemon(&[net("a", link), net("b", other)]);
            let config = two_front_ends(&dir, [from, to], frames, "");
            let mut testpmd = Testpmd::start(&config);
            wait_started(&daemon, 2, 1);
            testpmd.cmd("start");
            let all = u64::try_from(frames.len()).unwrap();
            testpmd.wait_stats("all arrive", 3, |stats| stats.tx_packets >= all);
            Self {
                dir,
                daemon,
                testpmd,
            }
        }

        /// What a front-end counts by size and by kind of address.
        fn drivers_count_the_same(&mut self, port: usize, way: &str, frames: &[Vec<u8>]) {
            let xstats = self.testpmd.xstats(port);
            for (name, count) in counts(frames) {
                let name = format!("{way}_q0_{name}");
                let counted = xstats.iter().find(|(theirs, _)| *theirs == name);
                assert_eq!(counted.map(|(_, counted)| *counted), Some(count), "{name}");
            }
        }

        /// Compares what arrived, and what the daemon counted.
        fn end(mut self, frames: &[Vec<u8>]) {
            assert_eq!(self.testpmd.stop(), 0, "testpmd dropped frames itself");
            self.testpmd.quit();
            let count = u64::try_from(frames.len()).unwrap();
            let bytes: usize = frames.iter().map(Vec::len).sum();
            for (port, way, back) in [("a", "tx", "rx"), ("b", "rx", "tx")] {
                let counter = |name: String| self.daemon.counter(port, &name);
                assert_eq!(counter(format!("{way}_frames")), count);
                assert_eq!(
                    counter(format!("{way}_bytes")),
                    u64::try_from(bytes).unwrap()
                );
                assert_eq!(counter(format!("{back}_frames")), 0);
                for (name, count) in counts(frames) {
                    let key = format!("{way}_q0_{name}");
                    let counted = self.daemon.one_queue_counter(port, &key);
                    assert_eq!(counted, count, "{port} {key}");
                }
            }
            stop(self.daemon);
            compare(&read_pcap(&self.dir.path("received.pcap")), frames);
            let back = read_pcap(&self.dir.path("back.pcap"));
            assert!(back.is_empty(), "{} frames came back", back.len());
        }
    }

    /// Frames that one front-end queues before the daemon starts come out of the other.
    fn frames_queued_before_the_start_reach_the_other(number: u8) {
        let dir = TempDir::new("plans-queued-vm2vm");
        let mut random = Random(0x9216_d5d9_8979_fb1b ^ u64::from(number));
        let frames: Vec<_> = (0..288).map(|_| random.frame(60, 1514)).collect();
        let net = |name: &str| {
            let socket = dir.path(&format!("{name}.sock"));
            format!("name={name},socket={},mode=client", socket.display())
        };
        let nets = [format!("{},link=wire:b", net("a")), net("b")];
        let daemon = start_daemon(&nets);
        let mut config = two_front_ends(&dir, [number; 2], &frames, ",server=1");
        let mut testpmd = start_quiet(config.app("--mask-event=intr_lsc"));
        wait_started(&daemon, 2, 1);
        drop(daemon);
        testpmd.cmd("start");
        testpmd.wait_stats("all are queued", 1, |stats| stats.tx_packets == 288);
        assert_eq!(testpmd.stats(3).tx_packets, 0, "nobody is there");
        let daemon = start_daemon(&nets);
        testpmd.wait_stats("all arrive", 3, |stats| stats.tx_packets >= 288);
        let there = TwoFrontEnds {
            dir,
            daemon,
            testpmd,
        };
        there.end(&frames);
    }

    fn from_one_to_the_other(number: u8) {
        let path = RingPath::number(number).unwrap();
        let mut random = Random(0xd129_0d3b_5e11_c0ff ^ u64::from(number));
        let longest = if path.mergeable { 8000 } else { 1514 };
        let mut frames: Vec<_> = (0..200).map(|_| random.frame(60, longest)).collect();
        // One for each bin that is hardly met by chance.
        frames.extend([60, 64, 65, 127].map(|length| random.frame(length, length)));
        for frame in frames.iter_mut().step_by(5) {
            frame[..6].fill(0xff);
        }
        for frame in frames.iter_mut().skip(1).step_by(7) {
            frame[0] = 0x33;
        }
        // A path of the other ring format, with receive buffers that are as large.
        let other = [5, 9, 8, 7, 1, 2, 4, 3, 10, 9][usize::from(number) - 1];
        for (link, ends) in [
            (",link=wire:b", [number, number]),
            (",link=switch:lan", [number, other]),
        ] {
            let mut there = TwoFrontEnds::carry(link, ends, &frames);
            for (port, way, end) in [(1, "tx", ends[0]), (2, "rx", ends[1])] {
                // Vectorised functions count frames alone.
                if end != 10 && (end, way) != (7, "rx") {
                    there.drivers_count_the_same(port, way, &frames);
                }
            }
            there.end(&frames);
        }
    }

    macro_rules! on_every_path {
        ($($name:ident: $number:literal $(, $queued:ident)*;)+) => {
            $(
                mod $name {
                    #[test]
                    fn restarts_of_port_front_end_and_daemon_lose_no_ring() {
                        super::survives_restarts($number);
                    }

                    #[test]
                    fn every_byte_goes_from_one_front_end_to_the_other() {
                        super::from_one_to_the_other($number);
                    }

                    $(
                        #[test]
                        fn $queued() {
                            super::$queued($number);
                        }
                    )*
                }
            )+
        };
    }

    on_every_path! {
        path_01_packed_mergeable: 1;
        path_02_packed: 2;
        path_03_packed_in_order_mergeable: 3;
        path_04_packed_in_order: 4;
        path_05_split_mergeable: 5, frames_queued_before_the_start_come_through,
            frames_queued_before_the_start_reach_the_other;
        path_06_split: 6, frames_queued_before_the_start_come_through,
            frames_queued_before_the_start_reach_the_other;
        path_07_split_vector_rx: 7, frames_queued_before_the_start_come_through,
            frames_queued_before_the_start_reach_the_other;
        path_08_split_in_order_mergeable: 8, frames_queued_before_the_start_come_through,
            frames_queued_before_the_start_reach_the_other;
        path_09_split_in_order: 9, frames_queued_before_the_start_come_through,
            frames_queued_before_the_start_reach_the_other;
        path_10_packed_vectorized: 10;
    }
}
