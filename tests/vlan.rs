//! No frame gets into a VLAN that it does not belong to: every kind of tag into every kind of port
//! of a switch, and what comes out of every port, captured.
//!
//! One testpmd (DPDK) holds a front-end on each port, and a capture file for each way of each. What
//! must come out is worked out here from IEEE 802.1Q alone. Needs what tests/testpmd.rs needs. The
//! same for stations that the switch knows, with front-ends of our own and a tap, is in `known`.

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
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "vlan"]
mod vlan {
    mod known;
    pub mod model;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::pcap::{read_pcap, write_pcap};
    use super::support::testpmd::{PortStats, RingPath, Testpmd};
    use super::support::tmp::{TempDir, random_bytes};
    use super::vlan::model::{PORTS, Tags, given, kinds, taken};

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// A broadcast or a frame for an unknown station, for all ports of its VLAN in either case. No
    /// two have the same sender or payload.
    fn frame(number: u16, tags: &Tags) -> Vec<u8> {
        let [high, low] = number.to_be_bytes();
        let mut frame = if number.is_multiple_of(2) {
            vec![0xff; 6]
        } else {
            vec![2, 1, 0, 0, high, low]
        };
        frame.extend([2, 2, 0, 0, high, low]);
        for &(vlan, priority) in tags {
            frame.extend([0x81, 0x00]);
            frame.extend((vlan | priority << 13).to_be_bytes());
        }
        frame.extend([0x88, 0xb5]);
        frame.extend(random_bytes(u64::from(number), 100 + usize::from(number)));
        frame
    }

    struct Lan {
        daemon: Daemon,
        testpmd: Testpmd,
        dir: TempDir,
    }

    impl Lan {
        /// Front-ends on all ports, each of which is to send the frames of its list.
        fn start(paths: [u8; 2], frames: &[Vec<Vec<u8>>]) -> Lan {
            let dir = TempDir::new("vlan");
            let nets: Vec<_> = (0..PORTS.len())
                .map(|at| {
                    let socket = dir.path(&format!("{at}.sock"));
                    let (socket, option) = (socket.display(), PORTS[at].option);
                    format!("--net=name=p{at},socket={socket},link=switch:lan,{option}")
                })
                .collect();
            let mut arguments = vec!["run", "--core", "1", "--log-level", "debug"];
            arguments.extend(nets.iter().map(String::as_str));
            let daemon = Daemon::start(&arguments);
            let socket = |at: usize| dir.path(&format!("{at}.sock"));
            let paths = paths.map(|number| RingPath::number(number).unwrap());
            let mut config = paths[0].front_end_with(&socket(0), 256, 1);
            config.vdevs.clear();
            for (at, frames) in frames.iter().enumerate() {
                let [sent, got] = ["sent", "got"].map(|way| capture(&dir, way, at));
                write_pcap(&sent, frames);
                // The ports at the socket and at the files forward to each other.
                let front_end = paths[at % 2].front_end_with(&socket(at), 256, 1);
                let vdev = front_end.vdevs[0].replace("virtio_user0", &format!("virtio_user{at}"));
                config.vdevs.push(vdev);
                let (sent, got) = (sent.display(), got.display());
                config
                    .vdevs
                    .push(format!("net_pcap{at},rx_pcap={sent},tx_pcap={got}"));
            }
            config.app("--no-flush-rx");
            let testpmd = Testpmd::start(&config);
            wait_until("every vring is enabled", TIMEOUT, || {
                let enabled = "SET_VRING_ENABLE vring=1 enable=true";
                (daemon.log().matches(enabled).count() == PORTS.len()).then_some(())
            });
            Lan {
                daemon,
                testpmd,
                dir,
            }
        }

        fn sum(&self, counters: &[&str]) -> u64 {
            let of_port = |at: usize| {
                let count = |name: &&str| self.daemon.counter(&format!("p{at}"), name);
                counters.iter().map(count).sum::<u64>()
            };
            (0..PORTS.len()).map(of_port).sum()
        }

        /// Sends everything; returns what came out of each port when all that was sent has been
        /// dealt with, and nothing is on its way any more.
        fn run(mut self, frames: &[Vec<Vec<u8>>]) -> Vec<Vec<Vec<u8>>> {
            let sent: usize = frames.iter().map(Vec::len).sum();
            let sent = u64::try_from(sent).unwrap();
            self.testpmd.cmd("start");
            wait_until("the switch has dealt with every frame", TIMEOUT, || {
                let dealt_with = ["tx_frames", "tx_drop_vlan", "tx_drop_no_port"];
                (self.sum(&dealt_with) == sent).then_some(())
            });
            for at in 0..PORTS.len() {
                let given = self.daemon.counter(&format!("p{at}"), "rx_frames");
                let captured = |stats: &PortStats| stats.tx_packets >= given;
                self.testpmd.wait_stats("captured", 2 * at + 1, captured);
            }
            assert_eq!(self.sum(&["rx_drop_peer_full", "rx_drop_peer_down"]), 0);
            assert_eq!(self.testpmd.stop(), 0, "testpmd dropped frames itself");
            self.testpmd.quit();
            let (status, log) = self.daemon.stop();
            assert!(status.success(), "{log}");
            let captures = (0..PORTS.len()).map(|at| capture(&self.dir, "got", at));
            captures.map(|file| read_pcap(&file)).collect()
        }
    }

    fn capture(dir: &TempDir, way: &str, port: usize) -> PathBuf {
        dir.path(&format!("{way}{port}.pcap"))
    }

    fn nothing_leaks(paths: [u8; 2]) {
        let kinds = kinds();
        let mut frames = vec![Vec::new(); PORTS.len()];
        let mut expected = vec![BTreeMap::new(); PORTS.len()];
        let mut number = 0;
        for (from, port) in PORTS.iter().enumerate() {
            for tags in &kinds {
                number += 1;
                frames[from].push(frame(number, tags));
                let Some((vlan, priority, rest)) = taken(port, tags) else {
                    continue;
                };
                for (to, other) in PORTS.iter().enumerate().filter(|(to, _)| *to != from) {
                    if let Some(tags_out) = given(other, vlan, priority, rest) {
                        let what = format!("{tags:?} from {}", port.option);
                        expected[to].insert(frame(number, &tags_out), what);
                    }
                }
            }
        }
        let got = Lan::start(paths, &frames).run(&frames);
        for (to, (got, mut expected)) in got.into_iter().zip(expected).enumerate() {
            let port = PORTS[to].option;
            for frame in got {
                let head = &frame[..26];
                let was_due = expected.remove(&frame);
                assert!(was_due.is_some(), "leaked to {port}: {head:02x?}");
            }
            let missing: Vec<_> = expected.into_values().collect();
            assert!(
                missing.is_empty(),
                "did not come out of {port}: {missing:?}"
            );
        }
    }

    #[test]
    fn no_frame_leaves_its_vlan_on_packed_rings() {
        nothing_leaks([1, 2]);
    }

    #[test]
    fn no_frame_leaves_its_vlan_on_split_rings() {
        nothing_leaks([5, 9]);
    }

    #[test]
    fn no_frame_leaves_its_vlan_between_split_and_packed_rings() {
        nothing_leaks([3, 8]);
    }
}
