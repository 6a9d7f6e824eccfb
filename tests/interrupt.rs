//! A DPDK front-end that sleeps until the daemon's call wakes it: DPDK's example l3fwd-power
//! (scripts/l3fwd-power), in its mode without polling, as in the test plans virtio_user_interrupt
//! and vhost_virtio_user_interrupt. The daemon sleeps as well, so that each frame wakes both.
//!
//! testpmd can't stand for it, since it always polls. Calls and their suppression are in
//! tests/rings. Needs root, 2 MiB hugepages and what scripts/l3fwd-power needs; run with one test
//! thread.

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
    use std::fs::File;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use vringd::testing::driver::SplitDriver;

    use crate::front_end::FrontEnd;
    use crate::support::daemon::Daemon;
    use crate::support::deadline::wait_until;
    use crate::support::testpmd::RingPath;
    use crate::support::tmp::{TempDir, random_bytes};

    const PATIENCE: Duration = Duration::from_secs(20);
    const MAC: [u8; 6] = [0, 1, 2, 3, 4, 5];

    /// l3fwd-power with one port, at a socket of the daemon; killed when dropped.
    struct Sleeper {
        child: Child,
        said: PathBuf,
    }

    impl Sleeper {
        fn start(path: &RingPath, socket: &Path, queues: u16, dir: &TempDir) -> Sleeper {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let built = Command::new(root.join("scripts/l3fwd-power")).status();
            assert!(built.expect("scripts/l3fwd-power runs").success());
            let said = dir.path("l3fwd-power");
            let log = File::create(&said).expect("a log file");
            let mut config = path.front_end_with(socket, 256, queues);
            let vdev = config.vdevs.remove(0);
            // Port, queue, core: one core sleeps for all of them.
            let queues: Vec<_> = (0..queues).map(|q| format!("(0,{q},0)")).collect();
            // Else the whole of a line may wait in its buffer.
            let child = Command::new("stdbuf")
                .arg("-oL")
                .arg(root.join("build/l3fwd-power/l3fwd-power"))
                .args(["--lcores=0@0", "--main-lcore=0", "--no-pci", "-m", "128"])
                .args(["--in-memory", "--single-file-segments", "--no-telemetry"])
                .args([format!("--vdev={vdev}"), "--".to_owned()])
                .args(["-p", "1", "--parse-ptype", "--interrupt-only", "--no-numa"])
                .arg(format!("--config={}", queues.join(",")))
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a second descriptor"))
                .stderr(log)
                .spawn()
                .expect("stdbuf (coreutils) runs");
            let mut sleeper = Sleeper { child, said };
            wait_until("l3fwd-power forwards", PATIENCE, || {
                let ended = sleeper.child.try_wait().expect("it can be waited for");
                let said = sleeper.said();
                assert!(ended.is_none(), "l3fwd-power {ended:?}: {said}");
                said.contains("entering main interrupt loop").then_some(())
            });
            let said = sleeper.said();
            assert!(!said.contains("interrupt won't enable"), "{said}");
            sleeper
        }

        fn said(&self) -> String {
            std::fs::read_to_string(&self.said).expect("its log")
        }

        /// How often an interrupt of this queue woke it.
        fn woken(&self, queue: u16) -> usize {
            let line = format!("is waked up from rx interrupt on port 0 queue {queue}\n");
            self.said().matches(&line).count()
        }

        /// Waits until it has nothing to do, has asked for interrupts and sleeps.
        fn sleeps(&self) {
            wait_until("l3fwd-power sleeps", PATIENCE, || {
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
                let stat = stat.expect("it runs");
                let (_, after_name) = stat.rsplit_once(") ").expect("a name in parentheses");
                after_name.starts_with('S').then_some(())
            });
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            if std::thread::panicking() {
                eprintln!("--- l3fwd-power said:\n{}", self.said());
            }
        }
    }

    /// A datagram to 1.1.1.1, which l3fwd-power has a route for; with the checksum of its header.
    fn datagram(number: u8) -> Vec<u8> {
        let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 1], &[8, 0]].concat();
        let mut head = vec![0x45, 0, 0, 128, 0, number, 0x40, 0, 64, 17, 0, 0];
        head.extend([192, 0, 2, 1, 1, 1, 1, 1]);
        let words = head
            .chunks(2)
            .map(|b| u32::from(b[0]) << 8 | u32::from(b[1]));
        let sum: u32 = words.sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("one carry");
        head[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(head);
        frame.extend([3, 232, 0, 9, 0, 108, 0, 0]);
        frame.extend(random_bytes(u64::from(number) + 1, 100));
        frame
    }

    /// The same after l3fwd-power: from its own address, to the station that it takes for the next,
    /// with one hop less; the header's checksum it sets to 0 for its look at it, and adds 1.
    fn forwarded(number: u8) -> Vec<u8> {
        let mut frame = datagram(number);
        frame[..12].copy_from_slice(&[&[2, 0, 0, 0, 0, 0], &MAC[..]].concat());
        frame[22] -= 1;
        frame[24..26].copy_from_slice(&[1, 0]);
        frame
    }

    fn calls_wake_a_driver(number: u8, queues: u16) {
        const NAPS: usize = 20;
        let path = RingPath::number(number).unwrap();
        let dir = TempDir::new("interrupt");
        let [a, b] = ["a.sock", "b.sock"].map(|name| dir.path(name));
        let one = format!("name=a,socket={},queues={queues},link=wire:b", a.display());
        let other = format!("name=b,socket={},queues={queues}", b.display());
        let nets = ["--net", &one, "--net", &other];
        let idle = ["run", "--core", "1", "--idle", "interrupt"];
        let daemon = Daemon::start(&[&idle[..], &nets].concat());
        let sleeper = Sleeper::start(&path, &a, queues, &dir);
        let line = daemon.wait_log("negotiated device=a", PATIENCE);
        assert_eq!(line.contains("RING_PACKED"), path.packed, "{line}");
        let mut guest = FrontEnd::<SplitDriver>::connect(&b, queues.into());
        // One for each ring that starts: somebody may have served it before.
        let before = daemon.counter("a", "calls");
        let mut sent = 0;
        // It looks at its ring every 10 ms by itself: what comes just then wakes nobody.
        let naps = || (0..queues).map(|queue| sleeper.woken(queue));
        while naps().min() < Some(NAPS) {
            let woken: Vec<_> = naps().collect();
            assert!(sent < 200, "woken {woken:?} times by {sent} frames");
            sleeper.sleeps();
            guest.transmit(usize::from(sent) % usize::from(queues), &datagram(sent));
            // Its one core sends with its first queue.
            let got = guest.receive(0);
            assert!(got == forwarded(sent), "frame {sent}: {got:02x?}");
            sent += 1;
        }
        let calls = daemon.counter("a", "calls") - before;
        let frames = u64::from(sent);
        // No wake-up without a call, be it one of those at the start.
        let least = (naps().sum::<usize>() as u64).saturating_sub(before);
        assert!(
            (least..=frames).contains(&calls),
            "{calls} calls for {frames} frames"
        );
        assert_eq!(daemon.counter("a", "rx_frames"), frames);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn calls_wake_a_driver_that_sleeps_split() {
        calls_wake_a_driver(5, 1);
    }

    #[test]
    fn calls_wake_a_driver_that_sleeps_packed() {
        calls_wake_a_driver(1, 1);
    }

    #[test]
    fn calls_of_each_of_two_queues_wake_a_driver_that_sleeps_split() {
        calls_wake_a_driver(5, 2);
    }

    #[test]
    fn calls_of_each_of_two_queues_wake_a_driver_that_sleeps_packed() {
        calls_wake_a_driver(1, 2);
    }
}
