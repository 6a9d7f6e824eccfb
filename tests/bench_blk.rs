//! `vringd bench blk` against a daemon of ours and QEMU's: what it counts, what it verifies, and
//! how it fails.

#[path = "support/mod.rs"]
mod support;

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::tmp::TempDir;

    /// Longer than any measurement here takes, and any deadline of the command.
    const PATIENCE: Duration = Duration::from_secs(30);
    const MIB: usize = 1 << 20;

    /// A daemon with one disk of two queues, and the directory of its socket.
    struct Disk {
        daemon: Daemon,
        socket: String,
        directory: TempDir,
    }

    impl Disk {
        fn ram() -> Disk {
            Disk::start(|_| "backend=ram:16M".to_owned())
        }

        /// A file of zeros.
        fn file(bytes: usize) -> Disk {
            Disk::start(|directory| {
                let path = directory.path("disk");
                fs::write(&path, vec![0; bytes]).unwrap();
                format!("path={}", path.display())
            })
        }

        fn start(backend: impl FnOnce(&TempDir) -> String) -> Disk {
            let directory = TempDir::new("bench-blk");
            let socket = directory.path("s").display().to_string();
            let backend = backend(&directory);
            let blk = format!("name=d0,socket={socket},queues=2,{backend}");
            Disk {
                daemon: Daemon::start(&["run", "--blk", &blk]),
                socket,
                directory,
            }
        }

        fn bench(&self, arguments: &str) -> Output {
            bench(&format!("--socket {} {arguments}", self.socket))
        }

        /// Runs with `--json`; it has to succeed.
        #[track_caller]
        fn report(&self, arguments: &str) -> Value {
            report(&self.bench(&format!("{arguments} --json")))
        }
    }

    /// Runs the command to its end, which has to come.
    fn bench(arguments: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vringd"))
            .args(["bench", "blk"])
            .args(arguments.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("bench blk {arguments} does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.wait_with_output().unwrap()
    }

    fn text(bytes: &[u8]) -> &str {
        str::from_utf8(bytes).unwrap()
    }

    #[track_caller]
    fn report(output: &Output) -> Value {
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(output: &Output, status: i32, says: &str) {
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{message}");
        assert!(message.contains(says), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert_eq!(text(&output.stdout), "");
    }

    #[track_caller]
    fn count(report: &Value, key: &str) -> u64 {
        let value = key.split('.').fold(report, |value, key| &value[key]);
        value.as_u64().unwrap_or_else(|| panic!("{key}: {report}"))
    }

    /// The daemon's own counts agree with what the command says it did.
    fn written_and_verified(disk: &Disk, arguments: &str) {
        for (format, chains) in [
            ("split", "direct"),
            ("split", "indirect"),
            ("packed", "direct"),
            ("packed", "indirect"),
        ] {
            let line = format!("{arguments} --format {format} --chains {chains} --verify");
            let before = ["writes", "reads"].map(|name| disk.daemon.counter("d0", name));
            let report = disk.report(&line);
            let after = ["writes", "reads"].map(|name| disk.daemon.counter("d0", name));
            let (requests, verified) = (count(&report, "requests"), count(&report, "verified"));
            // 4 MiB of blocks of 4 KiB, in sequence: each is written once and read once.
            assert_eq!((requests, verified), (1024, 1024), "{line}: {report}");
            assert_eq!(count(&report, "write.requests"), 1024);
            assert_eq!(after[0] - before[0], 1024, "{line}");
            assert_eq!(after[1] - before[1], 1024, "{line}");
            assert_eq!(report["format"], format);
        }
    }

    #[test]
    fn what_is_written_to_memory_is_read_back() {
        let disk = Disk::ram();
        for more in ["--iodepth 1", "--iodepth 32", "--iodepth 8 --queues 2"] {
            let line = format!("--rw write --bs 4k --size 4M --loops 1 {more}");
            written_and_verified(&disk, &line);
        }
    }

    #[test]
    fn what_is_written_to_a_file_is_read_back() {
        let disk = Disk::file(4 * MIB);
        written_and_verified(&disk, "--rw write --iodepth 16 --loops 1");
        // The seed decides the bytes, wherever they go through.
        let content = fs::read(disk.directory.path("disk")).unwrap();
        let again = Disk::ram();
        for (disk, format) in [(&disk, "split"), (&again, "packed")] {
            let line = "--rw write --size 4M --loops 2 --iodepth 4 --verify --seed 5";
            disk.report(&format!("{line} --format {format}"));
        }
        assert_ne!(content, fs::read(disk.directory.path("disk")).unwrap());
        let read = "--rw read --size 4M --loops 1 --iodepth 4 --verify --seed 5";
        assert_eq!(count(&disk.report(read), "verified"), 1024);
        assert_eq!(count(&again.report(read), "verified"), 1024);
    }

    #[test]
    fn random_writes_in_flight_are_verified_too() {
        let disk = Disk::ram();
        let pid = disk.daemon.pid();
        for line in [
            "--rw randwrite --iodepth 32 --size 256k --fsync 10",
            "--rw randrw --iodepth 8 --size 256k --fsync 10 --rewrite",
            "--rw randrw --rwmixread 70 --iodepth 32 --queues 2 --format packed --size 1M",
            "--rw rw --iodepth 4 --queues 2 --threads 1 --bs 512 --event-idx --size 64k",
            "--rw randrw --iodepth 3 --bs 64k --chains indirect --offset 1M --format packed",
            "--rw randrw --iodepth 5 --chains indirect --size 1M --rewrite --event-idx",
        ] {
            let report = disk.report(&format!("{line} --runtime 200ms --verify --pid {pid}"));
            assert_eq!(report["rewrite"], line.contains("--rewrite"), "{report}");
            let writes = count(&report, "write.requests");
            assert!(writes > 100, "{line}: {report}");
            assert!(count(&report, "verified") > 0, "{line}: {report}");
            assert!(count(&report, "backend_cpu_ns") > 0, "{line}: {report}");
            for key in ["p50", "p90", "p99", "p99_9"] {
                let key = format!("write.latency_ns.{key}");
                let value = count(&report, &key);
                let max = count(&report, "write.latency_ns.max");
                assert!(value > 0 && value <= max, "{line}: {report}");
            }
            let mb = report["mb_per_s"].as_f64().unwrap();
            let bytes = report["iops"].as_f64().unwrap() * report["bs"].as_f64().unwrap();
            assert!((mb - bytes / 1e6).abs() < 0.01, "{report}");
            if line.contains("--fsync") {
                let flushes = count(&report, "flush.requests");
                assert!(flushes > 0 && flushes <= writes / 10 + 1, "{report}");
                assert!(disk.daemon.counter("d0", "flushes") >= flushes);
            } else {
                assert!(count(&report, "read.requests") > 0, "{report}");
            }
        }
    }

    /// Flips one byte of a file, and says which values it had and has.
    fn flip(path: &Path, at: u64) -> (u8, u8) {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let (file, mut byte) = (file.unwrap(), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        (byte[0], byte[0] ^ 0x10)
    }

    #[test]
    fn a_flipped_byte_is_found() {
        let disk = Disk::start(|directory| {
            let path = directory.path("disk");
            fs::write(&path, vec![0; MIB]).unwrap();
            // Through the page cache, where the byte is flipped.
            format!("path={},direct=false", path.display())
        });
        disk.report("--rw write --iodepth 8 --loops 1 --verify");
        let read = "--rw randread --iodepth 8 --runtime 200ms --verify --format packed";
        assert!(count(&disk.report(read), "verified") > 0);
        let path = disk.directory.path("disk");
        let (was, is) = flip(&path, 20 * 4096 + 1000);
        let says = format!(
            "; first wrong byte at {}: expected {was:#04x}, got {is:#04x}",
            20 * 4096 + 1000
        );
        for line in ["--format split", "--format packed --queues 2"] {
            let output = disk.bench(&format!("--rw read --loops 1 --iodepth 8 --verify {line}"));
            fails(&output, 1, &says);
            let place = "vringd: verify: offset 81920: expected crc32c 0x";
            fails(&output, 1, place);
        }
        flip(&path, 20 * 4096 + 1000);
        disk.report("--rw read --loops 1 --iodepth 8 --verify");
        let other = disk.bench("--rw read --loops 1 --verify --seed 1");
        fails(
            &other,
            1,
            "vringd: verify: offset 0: expected seed 0x1, got",
        );
        flip(&path, 5 * 4096);
        let output = disk.bench("--rw read --loops 1 --verify");
        fails(
            &output,
            1,
            "vringd: verify: offset 20480: expected stamp 0x",
        );
    }

    #[test]
    fn a_disk_that_forgets_is_found() {
        let disk = Disk::start(|_| "backend=null:16M".to_owned());
        let output = disk.bench("--rw randwrite --iodepth 8 --runtime 100ms --verify");
        fails(&output, 1, "vringd: verify: offset ");
    }

    #[test]
    fn without_json_there_is_a_table() {
        let disk = Disk::ram();
        let output = disk.bench("--rw randrw --runtime 50ms --iodepth 4 --verify");
        assert!(output.status.success(), "{}", text(&output.stderr));
        for word in ["split rings of 128", "IOPS", "MB/s", "p99.9", "verified"] {
            assert!(text(&output.stdout).contains(word), "{output:?}");
        }
        assert_eq!(text(&output.stderr), "");
    }

    /// `script` gives it a terminal.
    #[test]
    fn who_looks_on_sees_the_rate_once_a_second_and_then_the_table() {
        let disk = Disk::ram();
        let (vringd, socket) = (env!("CARGO_BIN_EXE_vringd"), &disk.socket);
        let seen = |more: &str| {
            let command = format!("{vringd} bench blk --socket {socket} --runtime 3s {more}");
            let script = ["-qec", &command, "/dev/null"];
            let output = Command::new("script").args(script).output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stdout));
            text(&output.stdout).to_owned()
        };
        // One queue, one busy thread: with more than cores somebody would wait for a turn.
        for load in ["--rw randread --iodepth 8", "--rw randrw --iodepth 4"] {
            let shown = seen(load);
            let rates: Vec<f64> = shown
                .split('\r')
                .filter_map(|line| line.split_once(" s ")?.1.strip_suffix(" K IOPS "))
                .map(|rate| rate.trim().parse().unwrap())
                .collect();
            assert!(rates.len() >= 2, "{shown:?}");
            assert!(rates.iter().all(|rate| *rate > 0.0), "{shown:?}");
            let table = shown.rfind(" s ").unwrap() < shown.find("latency").unwrap();
            assert!(table, "the table comes last: {shown:?}");
        }
        // Whoever reads by program is not disturbed, nor a log.
        let report = seen("--json");
        assert!(
            serde_json::from_str::<Value>(report.trim()).is_ok(),
            "{report:?}"
        );
        let log = disk.directory.path("log");
        let table = seen(&format!("2>{}", log.display()));
        assert!(
            table.contains("latency") && !table.contains("K IOPS"),
            "{table:?}"
        );
        assert_eq!(fs::read_to_string(log).unwrap(), "");
    }

    #[test]
    fn a_disk_can_be_trimmed() {
        let disk = Disk::ram();
        let output = disk.bench("--rw randtrim --runtime 50ms --iodepth 4");
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "");
    }

    #[test]
    fn what_can_not_be_done_is_refused_with_status_2() {
        for (arguments, says) in [
            ("--rw randreed", "vringd: --rw \"randreed\": unknown load"),
            ("--bs 1000", "vringd: --bs \"1000\": 1000 bytes are not a"),
            ("--format round", "vringd: --format \"round\": unknown ring"),
            ("--iodepth 0", "vringd: --iodepth \"0\": not in 1..=8192"),
            (
                "--cpus-allowed 4000",
                "vringd: --cpus-allowed \"4000\": core",
            ),
            (
                "",
                "vringd: --socket \"/none\": can't connect: No such file",
            ),
        ] {
            fails(&bench(&format!("--socket /none {arguments}")), 2, says);
        }
        let disk = Disk::ram();
        for (arguments, says) in [
            ("--queues 3", "vringd: --queues \"3\": the back-end has 2"),
            ("--size 17M", "vringd: 17825792 bytes from offset 0 on: the"),
            ("--offset 16M", "vringd: 0 bytes from offset 16777216 on"),
            ("--iodepth 64 --ring-size 64", "vringd: --iodepth \"64\":"),
            (
                "--rw write --iodepth 9 --size 32k --verify",
                "vringd: the range has 8 blocks for a queue",
            ),
        ] {
            fails(&disk.bench(arguments), 2, says);
        }
        let disk = Disk::start(|_| "backend=ram:1M,discard=off".to_owned());
        let says = "vringd: --rw \"trim\": the back-end does not";
        fails(&disk.bench("--rw trim"), 2, says);
        let disk = Disk::start(|_| "backend=ram:1M,block_size=4096,read_only=true".to_owned());
        for (arguments, says) in [
            ("--bs 512", "vringd: --bs \"512\": not a multiple of the"),
            (
                "--rw write",
                "vringd: --rw \"write\": the disk is read-only",
            ),
        ] {
            fails(&disk.bench(arguments), 2, says);
        }
    }

    #[test]
    fn a_back_end_that_is_killed_ends_the_measurement() {
        let disk = Disk::ram();
        let daemon = &disk.daemon;
        let output = std::thread::scope(|scope| {
            let output = scope.spawn(|| disk.bench("--runtime 60s --iodepth 4"));
            wait_until("requests are served", PATIENCE, || {
                (daemon.counter("d0", "reads") > 0).then_some(())
            });
            daemon.signal(libc::SIGKILL);
            output.join().unwrap()
        });
        fails(&output, 1, "vringd: the back-end went away after");
    }

    /// QEMU's own back-end with a file behind it; ended when dropped.
    struct StorageDaemon(Child);

    impl StorageDaemon {
        fn start(directory: &TempDir) -> (StorageDaemon, String) {
            let socket = directory.path("q").display().to_string();
            let disk = directory.path("disk");
            fs::write(&disk, vec![0; 4 * MIB]).unwrap();
            let child = Command::new("qemu-storage-daemon")
                .arg("--blockdev")
                .arg(format!(
                    "driver=file,node-name=d,discard=unmap,filename={}",
                    disk.display()
                ))
                .arg("--export")
                .arg(format!(
                    "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},\
                     writable=on,num-queues=2"
                ))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("qemu-storage-daemon is installed");
            let daemon = StorageDaemon(child);
            // It serves one front-end after another.
            wait_until("qemu-storage-daemon listens", PATIENCE, || {
                UnixStream::connect(&socket).ok()
            });
            (daemon, socket)
        }
    }

    impl Drop for StorageDaemon {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn qemus_back_end_is_driven_as_well() {
        let directory = TempDir::new("bench-qsd");
        let (_daemon, socket) = StorageDaemon::start(&directory);
        let run = |arguments: &str| bench(&format!("--socket {socket} {arguments} --json"));
        let written = report(&run(
            "--rw write --iodepth 16 --loops 1 --verify --queues 2",
        ));
        assert_eq!(count(&written, "requests"), 1024);
        assert_eq!(count(&written, "verified"), 1024);
        for line in [
            "--rw randrw --iodepth 32 --runtime 300ms --verify --event-idx --fsync 16",
            "--rw randwrite --iodepth 4 --runtime 300ms --verify --chains indirect",
        ] {
            let mixed = report(&run(line));
            assert!(count(&mixed, "write.requests") > 0, "{mixed}");
            assert!(count(&mixed, "verified") > 0, "{mixed}");
        }
        let trimmed = report(&run("--rw trim --bs 64k --iodepth 2 --loops 1"));
        assert_eq!(count(&trimmed, "trim.requests"), 64);
        let output = run("--rw read --loops 1 --verify");
        fails(&output, 1, "vringd: verify: offset 0: expected stamp");
        let output = run("--format packed");
        let says = "vringd: --format \"packed\": the back-end does not offer VIRTIO_F_RING_PACKED";
        fails(&output, 2, says);
    }
}
