//! Disks whose queues are served by two workers and go from one to the other, under I/O that is
//! verified; and what the disks of one worker share.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::front_end::{FrontEnd, IN, OUT};
use super::qcow2::{create, qemu_img};
use super::served::{DISK, assert_same};
use crate::support::daemon::Daemon;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{PackedDriver, SplitDriver};

const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with two workers and a disk of four queues.
struct Four {
    daemon: Daemon,
    dir: TempDir,
    keys: String,
}

impl Four {
    fn start(dir: TempDir, keys: String) -> Four {
        let file = dir.path("vringd.toml");
        std::fs::write(&file, settings(&dir, &keys, "[0, 1]")).unwrap();
        let daemon = Daemon::start(&["run", "--config", file.to_str().unwrap()]);
        Four { daemon, dir, keys }
    }

    /// A load on all four queues that reads back what it has written.
    fn load(&self, arguments: &str) -> Child {
        let socket = self.dir.path("disk0.sock");
        Command::new(env!("CARGO_BIN_EXE_vringd"))
            .args(["bench", "blk", "--queues", "4", "--threads", "1", "--json"])
            .arg("--socket")
            .arg(socket)
            .args(arguments.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the load starts")
    }

    /// Other cores, from now on; waits a little for the queues to go there: before they are
    /// started, or while they are slow, there is nothing to wait for.
    fn serve_on(&self, cores: &str, load: &mut Child) {
        let text = settings(&self.dir, &self.keys, cores);
        std::fs::write(self.dir.path("vringd.toml"), text).unwrap();
        let position = self.daemon.log().len();
        self.daemon.signal(libc::SIGHUP);
        let soon = Instant::now() + Duration::from_millis(100);
        while Instant::now() < soon && !is_over(load) {
            if self.daemon.log()[position..].contains("vrings moved") {
                break;
            }
            std::thread::yield_now();
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.daemon.counter("disk0", name)
    }
}

fn settings(dir: &TempDir, keys: &str, cores: &str) -> String {
    let socket = dir.path("disk0.sock");
    let socket = socket.display();
    format!(
        "[engine]\ncores = [0, 1]\nidle = \"adaptive\"\n[[blk]]\nname = \"disk0\"\n\
         socket = \"{socket}\"\nqueues = 4\ncores = {cores}\n{keys}\n"
    )
}

fn is_over(load: &mut Child) -> bool {
    load.try_wait().expect("it can be waited for").is_some()
}

fn verified_while_queues_move(dir: TempDir, keys: String, format: &str) -> TempDir {
    let disk = Four::start(dir, keys);
    let arguments = "--rw randrw --bs 4k --iodepth 16 --verify --runtime 1s --format";
    // All on one, all on the other, two on each.
    let mut cores = ["[1]", "[0]", "[0, 1]"].iter().cycle();
    // A busy machine may get little done in a second.
    let begin = Instant::now();
    while disk.counter("vrings_moved") < 24 {
        assert!(begin.elapsed() < 3 * PATIENCE, "queues hardly move");
        let connected = disk.daemon.log().len();
        let mut load = disk.load(&format!("{arguments} {format}"));
        disk.daemon
            .wait_log_after(connected, "negotiated", PATIENCE);
        while !is_over(&mut load) {
            disk.serve_on(cores.next().unwrap(), &mut load);
        }
        let output = load.wait_with_output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{message}");
    }
    assert_eq!(
        (disk.counter("errors"), disk.counter("ring_faults")),
        (0, 0)
    );
    assert!(!disk.daemon.log().contains("takes a restart"));
    let (status, log) = disk.daemon.stop();
    assert!(status.success(), "{log}");
    disk.dir
}

#[test]
fn queues_of_an_image_move_under_verified_load() {
    let dir = TempDir::new("moves");
    let image = create(&dir, "disk.qcow2", "cluster_size=64k");
    let keys = format!("path = \"{}\"\nformat = \"qcow2\"", image.display());
    let _dir = verified_while_queues_move(dir, keys, "packed");
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
}

#[test]
fn queues_of_a_file_move_under_verified_load() {
    let dir = TempDir::new("moves");
    let path = dir.path("disk.img");
    std::fs::write(&path, vec![0; DISK]).unwrap();
    let keys = format!("path = \"{}\"", path.display());
    verified_while_queues_move(dir, keys, "split");
}

#[test]
fn queues_in_memory_move_under_verified_load() {
    let keys = "backend = \"ram:8M\"".to_owned();
    verified_while_queues_move(TempDir::new("moves"), keys, "packed");
}

#[test]
fn queues_of_an_encrypted_disk_move_under_verified_load() {
    let dir = TempDir::new("moves");
    let path = dir.path("disk.img");
    std::fs::write(&path, vec![0; DISK]).unwrap();
    let (key, _) = dir.random_file("key", 64, 7);
    let keys = format!(
        "path = \"{}\"\nencrypt = \"aes-256-xts\"\nkey_file = \"{}\"",
        path.display(),
        key.display()
    );
    verified_while_queues_move(dir, keys, "packed");
}

#[test]
fn queues_on_two_workers_share_the_limit_of_their_disk() {
    let keys = "backend = \"ram:8M\"\niops = 2000\nrate_burst = \"10ms\"".to_owned();
    let disk = Four::start(TempDir::new("moves"), keys);
    let load = disk.load("--rw randread --bs 4k --iodepth 4 --ramp-time 100ms --runtime 1s");
    let output = load.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let iops = report["read"]["iops"].as_f64().unwrap();
    // What was in flight at the start of the measurement counts too.
    assert!(iops > 100.0 && iops < 2000.0 * 1.1, "{iops} IOPS");
}

/// The rings of the kernel that the daemon has.
fn rings(daemon: &Daemon) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy() == "anon_inode:[io_uring]")
        .count()
}

fn disks_on(cores: &str, want: usize) {
    let dir = TempDir::new("share");
    let disk = |number: u64| {
        let name = format!("d{number}");
        let (path, bytes) = dir.random_file(&name, 1 << 20, number);
        let socket = dir.path(&format!("{name}.sock"));
        let keys = format!(
            "name={name},socket={},path={},queues=2",
            socket.display(),
            path.display()
        );
        (socket, keys, bytes)
    };
    let disks: Vec<_> = (1..=6).map(disk).collect();
    let mut args = vec!["run", "--core", cores];
    for (_, keys, _) in &disks {
        args.extend(["--blk", keys]);
    }
    let daemon = Daemon::start(&args);
    assert_eq!(rings(&daemon), want);
    let open = |number: usize| FrontEnd::<PackedDriver>::open(&disks[number].0, 0);
    let mut fronts: Vec<_> = (0..disks.len()).map(open).collect();
    for (front, (_, _, bytes)) in fronts.iter_mut().zip(&disks) {
        for place in 0..8 {
            front.post(place, IN, place * 8, &[], 4096);
        }
        let _ = bytes;
    }
    for (front, (_, _, bytes)) in fronts.iter_mut().zip(&disks) {
        for (place, answer) in front.all_answers() {
            let at = usize::try_from(place).unwrap() * 4096;
            assert_eq!(answer.status, 0);
            assert_same("read", &answer.data, &bytes[at..at + 4096]);
        }
    }
    assert_eq!(rings(&daemon), want);
}

#[test]
fn the_disks_of_a_worker_share_one_ring_of_the_kernel() {
    disks_on("1", 1);
    disks_on("0,1", 2);
}

#[test]
fn a_worker_that_had_no_ring_makes_one_for_a_queue_that_comes() {
    let dir = TempDir::new("share");
    let (path, mut model) = dir.random_file("disk.img", DISK, 3);
    let file = dir.path("vringd.toml");
    let keys = format!("path = \"{}\"", path.display());
    std::fs::write(&file, settings(&dir, &keys, "[0]")).unwrap();
    let daemon = Daemon::start(&["run", "--config", file.to_str().unwrap()]);
    assert_eq!(rings(&daemon), 1);
    let mut front = FrontEnd::<SplitDriver>::open(&dir.path("disk0.sock"), 0);
    for (round, cores) in ["[1]", "[0]", "[1]"].into_iter().enumerate() {
        std::fs::write(&file, settings(&dir, &keys, cores)).unwrap();
        let position = daemon.log().len();
        daemon.signal(libc::SIGHUP);
        let line = format!("served on cores {cores}");
        daemon.wait_log_after(position, &line, PATIENCE);
        let data = random_bytes(round as u64, 65536);
        assert_eq!(front.run(OUT, 256 * round as u64, &data, 0).status, 0);
        let at = 131_072 * round;
        model[at..at + 65536].copy_from_slice(&data);
        let back = front.run(IN, 256 * round as u64, &[], 65536);
        assert_same("read", &back.data, &data);
    }
    assert_eq!(rings(&daemon), 2);
    drop(front);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}
