//! Disks that become larger, and smaller, while a guest uses them.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::front_end::{DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, IN, OUT};
use super::front_end::{WRITE_ZEROES, range};
use super::locks::refused;
use super::served::{DISK, SECTOR, Served, assert_same, image};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::loop_device::Loop;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::FrontEnd;

const SOON: Duration = Duration::from_secs(20);
const MIB: usize = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;

fn sector(byte: usize) -> u64 {
    (byte / SECTOR) as u64
}

/// As any program does it: the file is opened for writing, and closed.
fn set_len(path: &Path, bytes: usize) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes as u64).unwrap();
}

/// Writes at `byte`, in the disk and in the model; reads it back.
fn write<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], byte: usize, len: usize) {
    let data = random_bytes(byte as u64, len);
    let answer = front.run(OUT, sector(byte), &data, 0);
    assert_eq!(answer.status, OK, "a write of {len} bytes at {byte}");
    let answer = front.run(IN, sector(byte), &[], len);
    assert_eq!(answer.status, OK, "a read of {len} bytes at {byte}");
    assert_same("what was written", &answer.data, &data);
    model[byte..byte + len].copy_from_slice(&data);
}

/// Nothing at `byte` can be reached.
fn assert_beyond<D: Driver>(front: &mut FrontEnd<D>, byte: usize) {
    let at = sector(byte);
    let ranges = range(at, 8, 0);
    for (kind, sector, data, data_in) in [
        (OUT, at, &[0x5a; 4096][..], 0),
        (IN, at, &[], 4096),
        (DISCARD, 0, &ranges, 0),
        (WRITE_ZEROES, 0, &ranges, 0),
    ] {
        let answer = front.run(kind, sector, data, data_in);
        assert_eq!(answer.status, IOERR, "request {kind} at {byte}");
    }
}

fn grows<D: Driver>(keys: &str) {
    let dir = TempDir::new("grows");
    let (path, mut model) = image(&dir);
    let served = Served::start(
        TempDir::new("grows"),
        &format!("path={}{keys}", path.display()),
    );
    let mut front: FrontEnd<D> = served.open(F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    front.listen();
    write(&mut front, &mut model, DISK - 4096, 4096);
    for (from, to) in [(DISK, 12 * MIB), (12 * MIB, 20 * MIB)] {
        assert_eq!(front.sectors(), sector(from));
        assert_beyond(&mut front, from - 2048);
        assert_beyond(&mut front, from);
        if to == 12 * MIB {
            set_len(&path, to);
        } else {
            let size = to.to_string();
            let mut truncate = Command::new("truncate");
            let done = truncate.args(["-s", &size]).arg(&path).status();
            assert!(done.unwrap().success());
        }
        front.wait_config_change();
        assert_eq!(front.sectors(), sector(to));
        model.resize(to, 0);
        // Over the old end, in the middle, and up to the new one.
        for byte in [from - 4096, (from + to) / 2, to - 8192] {
            write(&mut front, &mut model, byte, 8192);
        }
        let answer = front.run(IN, sector(from + MIB), &[], 4096);
        assert_eq!((answer.status, &answer.data[..]), (OK, &[0; 4096][..]));
        assert_beyond(&mut front, to - 2048);
        let line = format!("blk disk0: grown from {from} to {to} bytes");
        served.daemon.wait_log(&line, SOON);
    }
    assert!(front.hears_nothing());
    // It is still locked.
    let message = refused(&path, "");
    assert!(message.contains("writes to it"), "{message}");
    assert_same("the file", &fs::read(&path).unwrap(), &model);
    // What does not fill a block is not there.
    set_len(&path, 20 * MIB + 511);
    served.daemon.signal(libc::SIGHUP);
    set_len(&path, 20 * MIB + 1023);
    front.wait_config_change();
    assert_eq!(front.sectors(), sector(20 * MIB) + 1);
    assert_beyond(&mut front, 20 * MIB);
}

#[test]
fn what_was_told_of_a_stopped_device_is_told_again_when_it_starts() {
    let dir = TempDir::new("unread");
    let (path, _) = image(&dir);
    let keys = format!("path={}", path.display());
    let served = Served::start(TempDir::new("unread"), &keys);
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    front.listen();
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    // As QEMU, which takes no notice while a guest's device is stopped.
    set_len(&path, 12 * MIB);
    front.wait_config_change();
    front.stop();
    front.go_on();
    front.wait_config_change();
    assert_eq!(front.sectors(), sector(12 * MIB));
    front.stop();
    front.go_on();
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    assert!(front.hears_nothing(), "it has been read");
}

#[test]
fn a_file_that_grows_is_told_and_can_be_used_to_its_new_end() {
    grows::<SplitDriver>("");
    grows::<PackedDriver>(",direct=false,fault=short=3");
}

#[test]
fn what_a_file_lost_can_not_be_reached_and_only_the_next_guest_is_told() {
    let dir = TempDir::new("shrinks");
    let (path, mut model) = image(&dir);
    let served = Served::start(TempDir::new("shrinks"), &format!("path={}", path.display()));
    let features = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
    let mut front: FrontEnd<PackedDriver> = served.open(features);
    front.listen();
    set_len(&path, 4 * MIB);
    model.truncate(4 * MIB);
    let line = "its medium has 4194304 bytes now, which were 8388608";
    served.daemon.wait_log(line, SOON);
    // The line comes after the change.
    for byte in [4 * MIB - 2048, 4 * MIB, 6 * MIB, DISK - 4096] {
        assert_beyond(&mut front, byte);
    }
    write(&mut front, &mut model, 4 * MIB - 4096, 4096);
    assert_eq!(front.sectors(), sector(DISK));
    assert_same("the file", &fs::read(&path).unwrap(), &model);
    // Some of it comes back.
    set_len(&path, 6 * MIB);
    model.resize(6 * MIB, 0);
    let line = "its medium has 6291456 bytes now, which were 4194304";
    served.daemon.wait_log(line, SOON);
    write(&mut front, &mut model, 6 * MIB - 4096, 4096);
    assert_beyond(&mut front, 6 * MIB);
    assert_eq!(front.sectors(), sector(DISK));
    assert!(front.hears_nothing());
    // More than ever is told.
    set_len(&path, 10 * MIB);
    model.resize(10 * MIB, 0);
    front.wait_config_change();
    assert_eq!(front.sectors(), sector(10 * MIB));
    write(&mut front, &mut model, 10 * MIB - 4096, 4096);
    assert_same("the file", &fs::read(&path).unwrap(), &model);
    set_len(&path, 5 * MIB);
    let line = "its medium has 5242880 bytes now";
    served.daemon.wait_log(line, SOON);
    assert_eq!(front.sectors(), sector(10 * MIB));
    drop(front);
    let mut next: FrontEnd<SplitDriver> = served.open(features);
    assert_eq!(next.sectors(), sector(5 * MIB));
    assert_beyond(&mut next, 5 * MIB);
    model.truncate(5 * MIB);
    write(&mut next, &mut model, 5 * MIB - 4096, 4096);
    assert_same("the file", &fs::read(&path).unwrap(), &model);
}

#[test]
fn a_block_device_that_grows_is_seen_at_sighup() {
    let dir = TempDir::new("grows");
    let (path, mut model) = image(&dir);
    let Some(device) = Loop::over(&path, 512) else {
        return;
    };
    let served = Served::start(TempDir::new("grows"), &format!("path={}", device.0));
    let mut front: FrontEnd<PackedDriver> = served.open(F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    front.listen();
    assert_eq!(front.sectors(), sector(DISK));
    set_len(&path, 12 * MIB);
    device.follow();
    served.daemon.signal(libc::SIGHUP);
    front.wait_config_change();
    assert_eq!(front.sectors(), sector(12 * MIB));
    model.resize(12 * MIB, 0);
    for byte in [DISK - 4096, 12 * MIB - 8192] {
        write(&mut front, &mut model, byte, 8192);
    }
    assert_beyond(&mut front, 12 * MIB - 2048);
    drop((front, served, device));
    assert_same("the file", &fs::read(&path).unwrap(), &model);
}

#[test]
fn an_encrypted_disk_grows_like_any_other() {
    let dir = TempDir::new("grows");
    let (path, _) = image(&dir);
    let (key, _) = dir.random_file("key", 64, 7);
    let keys = format!(
        "path={},encrypt=aes-256-xts,key_file={}",
        path.display(),
        key.display()
    );
    let served = Served::start(TempDir::new("grows"), &keys);
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    front.listen();
    set_len(&path, 12 * MIB);
    front.wait_config_change();
    let mut model = vec![0; 12 * MIB];
    let at = 12 * MIB - 8192;
    write(&mut front, &mut model, at, 8192);
    assert!(fs::read(&path).unwrap()[at..] != model[at..], "ciphertext");
    drop((front, served));
    let served = Served::start(TempDir::new("grown"), &keys);
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    let answer = front.run(IN, sector(at), &[], 8192);
    assert_same("after a restart", &answer.data, &model[at..]);
}

#[test]
fn a_disk_in_memory_grows_at_sighup_and_keeps_what_it_has() {
    let dir = TempDir::new("grows");
    let settings = dir.path("vringd.toml");
    let socket = |name: &str| dir.path(&format!("{name}.sock"));
    let set = |ram: &str, null: &str| {
        let disk = |name: &str, backend: &str| {
            let socket = socket(name);
            let socket = socket.display();
            format!("[[blk]]\nname = \"{name}\"\nsocket = \"{socket}\"\nbackend = \"{backend}\"\n")
        };
        let text = [
            "[engine]\ncores = [1]\n".to_owned(),
            disk("r", ram),
            disk("n", null),
        ];
        fs::write(&settings, text.concat()).unwrap();
    };
    set("ram:8M", "null:8M");
    let daemon = Daemon::start(&["run", "--config", settings.to_str().unwrap()]);
    let features = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
    let mut ram: FrontEnd<SplitDriver> = FrontEnd::open(&socket("r"), features);
    let mut null: FrontEnd<PackedDriver> = FrontEnd::open(&socket("n"), features);
    ram.listen();
    null.listen();
    let mut model = vec![0; 100 * MIB];
    write(&mut ram, &mut model, DISK - 4096, 4096);
    assert_beyond(&mut ram, DISK - 2048);
    set("ram:100M", "null:1G");
    daemon.signal(libc::SIGHUP);
    ram.wait_config_change();
    null.wait_config_change();
    assert_eq!(ram.sectors(), sector(100 * MIB));
    assert_eq!(null.sectors(), sector(1024 * MIB));
    for byte in [DISK - 4096 + 512, 50 * MIB, 100 * MIB - 8192] {
        write(&mut ram, &mut model, byte, 8192);
    }
    for byte in [DISK - 4096, 50 * MIB - 4096, 100 * MIB - 16384] {
        let answer = ram.run(IN, sector(byte), &[], 16384);
        assert_same("what there is", &answer.data, &model[byte..byte + 16384]);
    }
    assert_beyond(&mut ram, 100 * MIB - 2048);
    let far = sector(1024 * MIB) - 8;
    assert_eq!(null.run(IN, far, &[], 4096).status, OK);
    assert_beyond(&mut null, 1024 * MIB - 2048);
    // Neither smaller, nor larger than there are addresses for; the other is resized all the same.
    for (size, why) in [
        ("ram:50M", "52428800 bytes are less than 104857600"),
        ("ram:8G", "can become at most 134217728 bytes long"),
    ] {
        let mark = daemon.log().len();
        set(size, "null:2G");
        daemon.signal(libc::SIGHUP);
        daemon.wait_log_after(mark, why, SOON);
        daemon.wait_log_after(mark, "of disks or of the engine takes a restart", SOON);
    }
    null.wait_config_change();
    assert_eq!(ram.sectors(), sector(100 * MIB));
    assert!(ram.hears_nothing());
    let (status, log) = { daemon }.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn what_nobody_tells_of_is_seen_at_sighup() {
    let dir = TempDir::new("grows");
    let (path, mut model) = image(&dir);
    // Open for writing all the time.
    let other = OpenOptions::new().write(true).open(&path).unwrap();
    let served = Served::start(TempDir::new("grows"), &format!("path={}", path.display()));
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    front.listen();
    other.set_len(12 * MIB as u64).unwrap();
    assert!(front.hears_nothing());
    assert_eq!(front.sectors(), sector(DISK));
    served.daemon.signal(libc::SIGHUP);
    front.wait_config_change();
    assert_eq!(front.sectors(), sector(12 * MIB));
    model.resize(12 * MIB, 0);
    write(&mut front, &mut model, 12 * MIB - 4096, 4096);
    assert_same("the file", &fs::read(&path).unwrap(), &model);
    drop(other);
    // Without a guest the size is looked at, too.
    drop(front);
    set_len(&path, 16 * MIB);
    wait_until("the size", SOON, || {
        let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
        (front.sectors() == sector(16 * MIB)).then_some(())
    });
}
