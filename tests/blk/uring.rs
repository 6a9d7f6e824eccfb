//! What a disk asks of io_uring beside the usual: what of it is there, and what happens without.

use std::process::Command;
use std::time::Duration;

use super::front_end::{FrontEnd, IN, OUT};
use super::served::{DISK, SECTOR, Served, Way, assert_same, image, on_a_disk};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::{TempDir, random_bytes};
use crate::support::{linux, missing};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const SOON: Duration = Duration::from_secs(20);
const KIB: u64 = 1024;

/// Memory of the daemon that is pinned.
fn pinned(daemon: &Daemon) -> u64 {
    let status = format!("/proc/{}/status", daemon.pid());
    let status = std::fs::read_to_string(status).expect("the daemon is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// Waits until so much is pinned and no more: Linux 6.1 lets go of memory a second after it was
/// taken out.
fn wait_pinned(daemon: &Daemon, kib: u64, when: &str) {
    wait_until(&format!("{kib} KiB are pinned {when}"), SOON, || {
        (pinned(daemon) == kib).then_some(())
    });
}

/// `strace` that leaves the daemon its place as a child of ours; `None` where nothing can be
/// traced.
pub(super) fn strace() -> Option<Command> {
    let trace = |more: &str| {
        let mut command = Command::new("strace");
        command.args(["-D", "-o", "/dev/null", more]);
        command
    };
    let tried = trace("true").status().expect("strace runs");
    if !tried.success() {
        return missing("no process can be traced here");
    }
    Some(trace("-f"))
}

/// Writes all over the disk and reads it back.
fn data_is_exact<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], seed: u64) {
    for (number, bytes) in [512, 4096, 65536, 1 << 20].into_iter().enumerate() {
        let at = (number + 1) * (DISK / 8);
        let data = random_bytes(seed + number as u64, bytes);
        let sector = (at / SECTOR) as u64;
        assert_eq!(front.run(OUT, sector, &data, 0).status, 0, "{bytes} bytes");
        model[at..at + bytes].copy_from_slice(&data);
        let back = front.run(IN, sector, &[], bytes);
        assert_eq!(back.status, 0);
        assert_same("read", &back.data, &data);
    }
}

fn memory_comes_and_goes<D: Driver>() {
    // A file in memory would need none of it.
    let Some(dir) = on_a_disk("pinned") else {
        return;
    };
    let (path, mut model) = image(&dir);
    let keys = format!("path={},fixed_buffers=true", path.display());
    let served = Served::start(dir, &keys);
    assert_eq!(served.way(&path), Way::Direct);
    assert_eq!(pinned(&served.daemon), 0);
    let said = served.daemon.log();
    assert!(
        said.contains("fixed_buffers: guest memory is pinned"),
        "{said}"
    );
    let mut front = served.open::<D>(0);
    let all = pinned(&served.daemon);
    assert!(all > 1024, "{all} KiB are pinned");
    data_is_exact(&mut front, &mut model, 1);
    for (round, parts) in [2, 1, 4].into_iter().enumerate() {
        front.share_in(parts);
        data_is_exact(&mut front, &mut model, 10 + round as u64);
        wait_pinned(&served.daemon, all, &format!("in {parts} regions"));
        front.more_memory(256 * KIB, true);
        data_is_exact(&mut front, &mut model, 20 + round as u64);
        wait_pinned(&served.daemon, all + 256, "and one more");
        front.more_memory(256 * KIB, false);
        wait_pinned(&served.daemon, all, "and without it");
        data_is_exact(&mut front, &mut model, 30 + round as u64);
    }
    drop(front);
    // The next session begins when all of the last is gone.
    let front = served.open::<D>(0);
    wait_pinned(&served.daemon, all, "in the next session");
    drop(front);
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn registered_memory_follows_the_table_on_a_split_ring() {
    memory_comes_and_goes::<SplitDriver>();
}

#[test]
fn registered_memory_follows_the_table_on_a_packed_ring() {
    memory_comes_and_goes::<PackedDriver>();
}

#[test]
fn without_the_right_to_pin_memory_the_disk_works_all_the_same() {
    let Some(dir) = on_a_disk("memlock") else {
        return;
    };
    let (path, mut model) = image(&dir);
    let socket = dir.path("disk.sock");
    // Root may pin what it likes but for this. Enough for the ring itself, and not for the memory.
    let mut command = Command::new("prlimit");
    command.args(["--memlock=2097152:2097152", "setpriv"]);
    command.args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
    command.arg(env!("CARGO_BIN_EXE_vringd"));
    let disk = format!(
        "name=disk0,socket={},path={},fixed_buffers=true",
        socket.display(),
        path.display()
    );
    let daemon = Daemon::spawn(command, &["run", "--core", "1", "--blk", &disk]);
    let mut front = FrontEnd::<SplitDriver>::open(&socket, 0);
    daemon.wait_log("guest memory can't be pinned", SOON);
    data_is_exact(&mut front, &mut model, 1);
    front.share_in(2);
    data_is_exact(&mut front, &mut model, 2);
    drop(front);
    assert_eq!(daemon.counter("disk0", "errors"), 0);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn without_memory_for_a_ring_the_daemon_says_what_to_raise() {
    let dir = TempDir::new("memlock");
    let (path, _) = image(&dir);
    let disk = format!(
        "name=disk0,socket={},path={}",
        dir.path("disk.sock").display(),
        path.display()
    );
    let mut command = Command::new("prlimit");
    command.args(["--memlock=4096:4096", "setpriv"]);
    command.args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
    // It must end by itself; the test does so in any case.
    command.args(["timeout", "20", env!("CARGO_BIN_EXE_vringd"), "run"]);
    let output = command.args(["--blk", &disk]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    if linux() < (6, 14) && message.contains("shutting down") {
        // It served its disk until `timeout` ended it.
        let _: Option<()> = missing("memory of a ring does not count as locked before Linux 6.14");
        return;
    }
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("RLIMIT_MEMLOCK"), "{message}");
}

#[test]
fn a_file_that_can_not_be_polled_is_served_without() {
    let dir = TempDir::new("iopoll");
    let file = vmm_sys_util::tempfile::TempFile::new_in("/dev/shm".as_ref()).unwrap();
    let mut model = random_bytes(3, DISK);
    std::fs::write(file.as_path(), &model).unwrap();
    let keys = format!("path={},iopoll=true", file.as_path().display());
    let served = Served::start(dir, &keys);
    served.daemon.wait_log("iopoll: not here", SOON);
    let mut front = served.open::<SplitDriver>(0);
    data_is_exact(&mut front, &mut model, 1);
    drop(front);
    // In memory, so nobody was asked.
    assert!(served.daemon.counter("disk0", "at_once") >= 8);
    assert_same("the file", &std::fs::read(file.as_path()).unwrap(), &model);
}

#[test]
fn without_a_thread_of_the_kernel_the_worker_makes_the_calls() {
    let Some(dir) = on_a_disk("sqpoll") else {
        return;
    };
    let (path, mut model) = image(&dir);
    let socket = dir.path("disk.sock");
    // The kernel says no to a thread's first two rings: those of a worker with SQPOLL.
    let Some(mut command) = strace() else {
        return;
    };
    command.args(["-e", "trace=io_uring_setup"]);
    command.args(["-e", "inject=io_uring_setup:error=EPERM:when=1..2"]);
    command.arg(env!("CARGO_BIN_EXE_vringd"));
    let disk = format!(
        "name=disk0,socket={},path={},sqpoll=true",
        socket.display(),
        path.display()
    );
    let daemon = Daemon::spawn(command, &["run", "--core", "1", "--blk", &disk]);
    let line = daemon.wait_log("sqpoll: not here", SOON);
    assert!(line.contains("Operation not permitted"), "{line}");
    let mut front = FrontEnd::<SplitDriver>::open(&socket, 0);
    data_is_exact(&mut front, &mut model, 1);
    drop(front);
    assert_eq!(daemon.counter("disk0", "errors"), 0);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}
