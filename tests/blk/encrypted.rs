//! Encrypted disks: the file has what the standard says and no plaintext, the log no key.

use std::fs::{self, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vmm_sys_util::tempfile::TempFile;
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{
    DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FrontEnd, WRITE_ZEROES, range,
};
use super::front_end::{FLUSH, Framing, IN, OUT};
use super::served::{DISK, SECTOR, Served, Way, assert_same, image, on_a_disk};
use super::uring::strace;
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::{TempDir, random_bytes};
use crate::support::xts::reference;

const SOON: Duration = Duration::from_secs(20);
/// `write_zeroes_may_unmap` in config space.
const MAY_UNMAP: usize = 56;

/// A key file with these permissions.
pub(super) fn key_file(dir: &TempDir, mode: u32) -> (PathBuf, [u8; 64]) {
    // Letters, so that a log would show them as they are.
    let letters = random_bytes(41, 64);
    let key = core::array::from_fn(|i| b'a' + letters[i] % 26);
    let path = dir.path("disk.key");
    fs::write(&path, key).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    (path, key)
}

fn assert_no_key(log: &str, key: &[u8; 64]) {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = String::from_utf8(key.to_vec()).unwrap();
    // Any eighth of it would be too much.
    for at in (0..64).step_by(8) {
        assert!(!log.contains(&text[at..at + 8]), "{log}");
        assert!(!log.contains(&hex[2 * at..2 * at + 16]), "{log}");
        let numbers = format!("{:?}", &key[at..at + 8]);
        assert!(!log.contains(numbers.trim_matches(['[', ']'])), "{log}");
    }
}

/// A guest that writes, zeroes and reads everywhere; `model` is what it should find.
fn work<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], align: usize) {
    let mut numbers = random_bytes(77, 1 << 16).into_iter();
    let mut number = |below: usize| {
        let two = [(); 2].map(|()| numbers.next().unwrap());
        usize::from(u16::from_le_bytes(two)) * below / 65536
    };
    for round in 0..120 {
        // Now and then more than one operation takes.
        let most = if round % 20 == 7 { 2 << 20 } else { 96 << 10 };
        let bytes = (number(most / align) + 1) * align;
        let at = number((DISK - bytes) / align) * align;
        let sector = (at / SECTOR) as u64;
        if round % 6 == 5 {
            let sectors = u32::try_from(bytes / SECTOR).unwrap();
            let zeroes = front.run(WRITE_ZEROES, 0, &range(sector, sectors, 1), 0);
            assert_eq!(zeroes.status, 0, "round {round}");
            model[at..at + bytes].fill(0);
        } else {
            let data = random_bytes(1000 + round, bytes);
            let cut = u32::try_from(number(bytes)).unwrap();
            let framing = Framing {
                readable: vec![16, 16 + cut],
                writable: vec![],
                indirect: round % 2 == 0,
            };
            let answer = front.run_framed(OUT, sector, &data, 0, &framing);
            assert_eq!(answer.status, 0, "round {round}");
            model[at..at + bytes].copy_from_slice(&data);
        }
        let cut = u32::try_from(number(bytes) + 1).unwrap();
        let framing = Framing {
            readable: vec![16],
            writable: vec![cut],
            indirect: round % 2 == 1,
        };
        let back = front.run_framed(IN, sector, &[], bytes, &framing);
        assert_eq!(back.status, 0, "round {round}");
        assert_same("a read", &back.data, &model[at..at + bytes]);
    }
}

fn is_ciphertext<D: Driver>(keys: &str, way: Way, align: usize, sector: usize) {
    let Some(dir) = on_a_disk("encrypted") else {
        return;
    };
    let (path, ciphertext) = image(&dir);
    let (key_path, key) = key_file(&dir, 0o600);
    let mut model = reference(&key, sector, 0, &ciphertext, false);
    let keys = format!(
        "path={},encrypt=aes-256-xts,key_file={}{keys}",
        path.display(),
        key_path.display()
    );
    let served = Served::start(dir, &keys);
    assert_eq!(served.way(&path), way);
    let mut front = served.open::<D>(F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    assert_eq!(front.config()[MAY_UNMAP], 0);
    work(&mut front, &mut model, align);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
    let on_disk = fs::read(&path).unwrap();
    let plain = reference(&key, sector, 0, &on_disk, false);
    assert_same("the file, decrypted", &plain, &model);
    let same = |(got, want): (&[u8], &[u8])| got == want;
    let pairs = on_disk.chunks(16).zip(model.chunks(16));
    assert_eq!(
        pairs.filter(|pair| same(*pair)).count(),
        0,
        "plaintext on the disk"
    );
    // A hole reads as what the cipher makes of its zeros.
    let discarded = front.run(DISCARD, 0, &range(1024, 256, 0), 0);
    assert_eq!(discarded.status, 0);
    let hole = 1024 * SECTOR..1280 * SECTOR;
    assert_same(
        "the hole",
        &fs::read(&path).unwrap()[hole.clone()],
        &[0; 256 * SECTOR],
    );
    let want = reference(&key, sector, hole.start as u64, &[0; 256 * SECTOR], false);
    assert_same(
        "a read of it",
        &front.run(IN, 1024, &[], hole.len()).data,
        &want,
    );
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    assert_eq!(served.daemon.counter("disk0", "unaligned"), 0);
    drop(front);
    let (status, log) = served.daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("encrypted with aes-256-xts"), "{log}");
    assert!(!log.contains("everybody can read"), "{log}");
    assert_no_key(&log, &key);
}

#[test]
fn a_file_with_direct_io_has_ciphertext() {
    is_ciphertext::<SplitDriver>("", Way::Direct, 512, 512);
}

#[test]
fn a_file_in_the_page_cache_has_ciphertext() {
    is_ciphertext::<PackedDriver>(",direct=false", Way::Cached, 512, 512);
}

#[test]
fn sectors_of_4096_are_numbered_in_512_bytes() {
    let keys = ",block_size=4096,encrypt_sector=4096";
    is_ciphertext::<SplitDriver>(keys, Way::Direct, 4096, 4096);
}

#[test]
fn small_sectors_in_large_blocks() {
    is_ciphertext::<PackedDriver>(",block_size=4096", Way::Direct, 4096, 512);
}

/// The key comes through a descriptor that the daemon inherits.
#[test]
fn a_key_by_descriptor_and_a_warning_for_one_by_file() {
    let dir = TempDir::new("key-fd");
    let (path, ciphertext) = image(&dir);
    let (key_path, key) = key_file(&dir, 0o644);
    // Not close-on-exec, unlike what `std` opens.
    let passed = TempFile::new().unwrap();
    fs::write(passed.as_path(), key).unwrap();
    let keys = format!(
        "path={},encrypt=aes-256-xts,key_fd={}",
        path.display(),
        passed.as_file().as_raw_fd()
    );
    let served = Served::start(dir, &keys);
    let want = reference(&key, 512, 0, &ciphertext[..8192], false);
    let mut front = served.open::<SplitDriver>(F_FLUSH);
    assert_same("a read", &front.run(IN, 0, &[], 8192).data, &want);
    drop((front, served));
    let dir = TempDir::new("key-file");
    let (path, _) = image(&dir);
    let (readable, key) = key_file(&dir, 0o644);
    assert_ne!(readable, key_path);
    let keys = format!(
        "path={},encrypt=aes-256-xts,key_file={}",
        path.display(),
        readable.display()
    );
    let (_, log) = Served::start(dir, &keys).daemon.stop();
    let warning = format!("key_file = {readable:?}: everybody can read this key (mode 0644)");
    assert!(log.contains(&warning), "{log}");
    assert_no_key(&log, &key);
}

fn refused(image: &Path, key: &Path) -> String {
    let socket = image.with_extension("sock");
    let disk = format!(
        "name=disk0,socket={},path={},encrypt=aes-256-xts,key_file={}",
        socket.display(),
        image.display(),
        key.display()
    );
    let output = Command::new(env!("CARGO_BIN_EXE_vringd"))
        .args(["run", "--core", "1", "--blk", &disk])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(!socket.exists(), "a refused run leaves a socket");
    let said = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    said(output.stdout) + &said(output.stderr)
}

#[test]
fn a_key_of_another_size_is_refused_with_its_name_and_size() {
    let dir = TempDir::new("key-size");
    let (path, _) = image(&dir);
    let (key_path, key) = key_file(&dir, 0o600);
    for size in [0, 32, 63, 65, 1000] {
        let bytes: Vec<u8> = key.into_iter().cycle().take(size).collect();
        fs::write(&key_path, &bytes).unwrap();
        let said = refused(&path, &key_path);
        let want =
            format!("key_file = {key_path:?}: {size} bytes, a key for aes-256-xts has exactly 64");
        assert!(said.contains(&want), "{said}");
        if size > 8 {
            assert_no_key(&said, &key);
        }
    }
    let missing = refused(&path, &dir.path("none"));
    assert!(missing.contains("No such file"), "{missing}");
}

/// Places in the memory of a process that hold any eighth of the key.
fn places_of_key(pid: u32, key: &[u8; 64]) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = Vec::new();
    // What it may write, but for what is shared with others.
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split_whitespace().next().unwrap();
        let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut bytes = vec![0; 1 << 20];
        for at in (start..end).step_by(1 << 20) {
            let len = usize::try_from(end - at).unwrap().min(1 << 20);
            // What can't be read (a guard page) is nobody's.
            if memory.read_at(&mut bytes[..len], at).is_err() {
                continue;
            }
            let there = |part: &[u8]| bytes[..len].windows(8).any(|window| window == part);
            if key.chunks(8).any(there) {
                found.push(format!("{at:#x}: {line}"));
            }
        }
    }
    found
}

/// `strace` holds the daemon when it is about to end, with its memory as it is then.
#[test]
fn when_the_daemon_ends_nothing_of_the_key_is_in_its_memory() {
    let dir = TempDir::new("key-wiped");
    let (path, ciphertext) = image(&dir);
    let (key_path, key) = key_file(&dir, 0o600);
    let socket = dir.path("disk.sock");
    let Some(mut command) = strace() else {
        return;
    };
    command.args(["-e", "trace=exit_group"]);
    command.args(["-e", "inject=exit_group:delay_enter=5s"]);
    command.arg(env!("CARGO_BIN_EXE_vringd"));
    let disk = format!(
        "name=disk0,socket={},path={},encrypt=aes-256-xts,key_file={}",
        socket.display(),
        path.display(),
        key_path.display()
    );
    let daemon = Daemon::spawn(command, &["run", "--core", "1", "--blk", &disk]);
    let mut front = FrontEnd::<SplitDriver>::open(&socket, F_FLUSH);
    let want = reference(&key, 512, 0, &ciphertext[..65536], false);
    assert_same("a read", &front.run(IN, 0, &[], 65536).data, &want);
    let pid = daemon.pid();
    assert!(!places_of_key(pid, &key).is_empty(), "it is used");
    daemon.signal(libc::SIGTERM);
    // x86-64's number of exit_group.
    wait_until("the daemon is about to end", SOON, || {
        let call = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
        call.starts_with("231 ").then_some(())
    });
    let left = places_of_key(pid, &key);
    assert!(left.is_empty(), "the key is still in {left:#?}");
}
