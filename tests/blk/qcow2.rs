//! qcow2 images: what a guest writes is what QEMU's tools find, and the image is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FrontEnd, WRITE_ZEROES};
use super::front_end::{FLUSH, IN, OUT, range};
use super::locks::refused;
use super::served::{DISK, SECTOR, Served, assert_same};
use crate::support::tmp::{TempDir, random_bytes};

pub(super) const ALL: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

/// What qemu-img says, which must be happy.
pub(super) fn qemu_img(args: &[&str]) -> String {
    let mut command = Command::new("timeout");
    let output = command.args(["30", "qemu-img"]).args(args).output();
    let output = output.expect("qemu-img starts");
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn create(dir: &TempDir, name: &str, options: &str) -> PathBuf {
    let path = dir.path(name);
    let (text, size) = (path.to_str().unwrap(), DISK.to_string());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text, &size]);
    path
}

/// What is in the image, as QEMU reads it; QEMU must find nothing wrong with it.
pub(super) fn content(image: &Path) -> Vec<u8> {
    let text = image.to_str().unwrap();
    // 0: neither errors nor leaks.
    qemu_img(&["check", "-q", "-f", "qcow2", text]);
    let raw = image.with_extension("raw");
    let to = raw.to_str().unwrap();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text, to]);
    fs::read(&raw).unwrap()
}

/// A daemon that serves `image`, which lies somewhere else.
fn serve(image: &Path, keys: &str) -> Served {
    let keys = format!("path={},format=qcow2{keys}", image.display());
    Served::start(TempDir::new("qcow2-served"), &keys)
}

pub(super) fn read<D: Driver>(front: &mut FrontEnd<D>, at: usize, bytes: usize) -> Vec<u8> {
    let answer = front.run(IN, (at / SECTOR) as u64, &[], bytes);
    assert_eq!(answer.status, 0, "read at {at}");
    answer.data
}

/// A guest that writes, zeroes, discards and reads everywhere; `model` is what it should find. A
/// discarded range is written before it is read again.
pub(super) fn work<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], seed: u64, rounds: u64) {
    let mut numbers = random_bytes(seed, 1 << 15).into_iter();
    let mut number = |below: usize| {
        let two = [(); 2].map(|()| numbers.next().unwrap());
        usize::from(u16::from_le_bytes(two)) * below / 65536
    };
    for round in 0..rounds {
        // Now and then more than the image's thread does at once.
        let most = if round % 20 == 7 { 5 << 19 } else { 96 << 10 };
        let bytes = (number(most / SECTOR) + 1) * SECTOR;
        let at = number((DISK - bytes) / SECTOR) * SECTOR;
        let sector = (at / SECTOR) as u64;
        let sectors = u32::try_from(bytes / SECTOR).unwrap();
        let mut discarded = false;
        if round % 5 == 4 {
            let unmap = u32::from(round % 2 == 0);
            let zeroes = front.run(WRITE_ZEROES, 0, &range(sector, sectors, unmap), 0);
            assert_eq!(zeroes.status, 0, "round {round}");
            model[at..at + bytes].fill(0);
        } else {
            discarded = round % 7 == 6;
            if discarded {
                let answer = front.run(DISCARD, 0, &range(sector, sectors, 0), 0);
                assert_eq!(answer.status, 0, "round {round}");
            }
            let data = random_bytes(seed + round, bytes);
            let answer = front.run(OUT, sector, &data, 0);
            assert_eq!(answer.status, 0, "round {round}");
            model[at..at + bytes].copy_from_slice(&data);
        }
        if round % 16 == 15 {
            assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
        }
        let (from, to) = (at.saturating_sub(4096), (at + bytes + 4096).min(DISK));
        let back = read(front, from, to - from);
        let what = format!("round {round}, discarded {discarded}");
        assert_same(&what, &back, &model[from..to]);
    }
}

/// The guest's work on `image`, which holds `model` before; then QEMU looks at it.
fn is_served<D: Driver>(image: &Path, mut model: Vec<u8>, keys: &str) {
    let served = serve(image, keys);
    let mut front = served.open::<D>(ALL);
    assert_same("before", &read(&mut front, 0, 1 << 20), &model[..1 << 20]);
    work(&mut front, &mut model, 300, 90);
    for at in (0..DISK).step_by(1 << 20) {
        let want = &model[at..at + (1 << 20)];
        assert_same("at the end", &read(&mut front, at, 1 << 20), want);
    }
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    drop(front);
    let (status, log) = served.daemon.stop();
    assert!(status.success(), "{log}");
    assert_same("as QEMU has it", &content(image), &model);
}

#[test]
fn an_empty_image_is_filled() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.qcow2", "cluster_size=64k");
    is_served::<SplitDriver>(&image, vec![0; DISK], "");
}

#[test]
fn an_old_image_with_small_clusters_is_filled_through_the_page_cache() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.qcow2", "compat=0.10,cluster_size=512");
    is_served::<PackedDriver>(&image, vec![0; DISK], ",direct=off");
}

#[test]
fn a_backing_file_is_read_and_stays_as_it_is() {
    let dir = TempDir::new("qcow2");
    let (raw, mut model) = dir.random_file("base.img", DISK / 2, 9);
    let middle = create(
        &dir,
        "middle.qcow2",
        "cluster_size=4k,backing_file=base.img,backing_fmt=raw",
    );
    let top = create(
        &dir,
        "top.qcow2",
        "backing_file=middle.qcow2,backing_fmt=qcow2",
    );
    let base = model.clone();
    model.resize(DISK, 0);
    let before = fs::read(&middle).unwrap();
    let dir = middle.parent().unwrap().display().to_string();
    is_served::<SplitDriver>(&top, model, &format!(",backing_dir={dir}"));
    assert_same("the lower image", &fs::read(&middle).unwrap(), &before);
    assert_same("the file below it", &fs::read(&raw).unwrap(), &base);
}

#[test]
fn compressed_clusters_and_snapshots_are_kept() {
    let dir = TempDir::new("qcow2");
    let (raw, model) = dir.random_file("base.img", DISK, 10);
    let image = dir.path("disk.qcow2");
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    qemu_img(&["snapshot", "-c", "before", to]);
    is_served::<SplitDriver>(&image, model.clone(), "");
    qemu_img(&["snapshot", "-a", "before", to]);
    assert_same("the snapshot", &content(&image), &model);
}

/// What was answered is there after the daemon was killed, flushed or not, and the image is whole.
#[test]
fn what_was_answered_survives_the_daemon() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.qcow2", "cluster_size=4k");
    let served = serve(&image, "");
    let mut front = served.open::<SplitDriver>(ALL);
    let mut model = vec![0; DISK];
    work(&mut front, &mut model, 400, 40);
    served.daemon.signal(libc::SIGKILL);
    assert!(!served.daemon.stop().0.success());
    let text = image.to_str().unwrap();
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", text])
        .output();
    // 3: leaked clusters, which do no harm.
    let code = check.expect("qemu-img starts").status.code();
    assert!(matches!(code, Some(0 | 3)), "qemu-img check says {code:?}");
    let raw = image.with_extension("raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text,
        raw.to_str().unwrap(),
    ]);
    assert_same("after the kill", &fs::read(&raw).unwrap(), &model);
}

#[test]
fn a_read_only_image_stays_as_it_is() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.qcow2", "cluster_size=64k");
    let text = image.to_str().unwrap();
    let write = ["-f", "qcow2", "-c", "write -q -P 0x5a 1M 64k", text];
    let done = Command::new("qemu-io").args(write).status();
    assert!(done.expect("qemu-io starts").success());
    let before = fs::read(&image).unwrap();
    let served = serve(&image, ",read_only=true");
    let mut front = served.open::<SplitDriver>(ALL);
    for _ in 0..2 {
        assert_same(
            "a read",
            &read(&mut front, 1 << 20, 64 << 10),
            &[0x5a; 64 << 10],
        );
        assert_same("nothing", &read(&mut front, 0, 4096), &[0; 4096]);
    }
    assert_ne!(front.run(OUT, 0, &[1; 512], 0).status, 0);
    drop(front);
    assert!(served.daemon.stop().0.success());
    assert_same("the file", &fs::read(&image).unwrap(), &before);
}

#[test]
fn what_can_not_be_served_is_refused_with_its_reason() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.qcow2", "cluster_size=64k");
    let log = refused(&image, "");
    assert!(log.contains("say format = \"qcow2\""), "{log}");
    let (raw, _) = dir.random_file("raw.img", DISK, 1);
    let log = refused(&raw, ",format=qcow2");
    assert!(log.contains("it is none"), "{log}");
    // Its first L2 entries point anywhere, its tables are cut off, it stands on itself.
    let bytes = fs::read(&image).unwrap();
    let cut = dir.path("cut.qcow2");
    fs::write(&cut, &bytes[..70_000]).unwrap();
    let log = refused(&cut, ",format=qcow2");
    assert!(
        log.contains("refcount table is at") || log.contains("L1 table is at"),
        "{log}"
    );
    let own = dir.path("own.qcow2");
    fs::copy(&image, &own).unwrap();
    let text = own.to_str().unwrap();
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", text, "-F", "qcow2", text,
    ]);
    let below = dir.path("");
    let keys = format!(",format=qcow2,backing_dir={}", below.display());
    let log = refused(&own, &keys);
    assert!(log.contains("it stands on itself"), "{log}");
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", "/no/such", "-F", "raw", text,
    ]);
    let log = refused(&own, &keys);
    assert!(log.contains("/no/such"), "{log}");
    let dirty = create(&dir, "dirty.qcow2", "cluster_size=64k");
    let mut bytes = fs::read(&dirty).unwrap();
    bytes[79] |= 1;
    fs::write(&dirty, &bytes).unwrap();
    let log = refused(&dirty, ",format=qcow2");
    assert!(log.contains("not closed cleanly"), "{log}");
}

/// An image may come from somebody who wants to read what is not theirs.
#[test]
fn an_image_does_not_choose_which_files_are_read() {
    let (dir, other) = (TempDir::new("qcow2"), TempDir::new("qcow2-other"));
    let (secret, _) = other.random_file("secret.img", DISK, 1);
    std::os::unix::fs::symlink(&secret, dir.path("link.img")).unwrap();
    let image = create(&dir, "disk.qcow2", "cluster_size=64k");
    let text = image.to_str().unwrap();
    let within = format!(",format=qcow2,backing_dir={}", dir.path("").display());
    let below = secret.strip_prefix(std::env::temp_dir()).unwrap();
    let climbing = format!("../{}", below.display());
    for name in [secret.to_str().unwrap(), "link.img", &climbing] {
        qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text]);
        let log = refused(&image, ",format=qcow2");
        assert!(log.contains("is not for the image to say"), "{log}");
        let log = refused(&image, &within);
        assert!(log.contains("which is not in backing_dir"), "{log}");
    }
    let log = refused(&image, ",format=qcow2,backing_dir=/no/such");
    assert!(log.contains("open backing_dir"), "{log}");
    // Whoever says so has it.
    let keys = format!(",backing_dir={}", other.path("").display());
    let served = serve(&image, &keys);
    let mut front = served.open::<SplitDriver>(0);
    let want = fs::read(&secret).unwrap();
    assert_same("as allowed", &read(&mut front, 0, 4096), &want[..4096]);
}

/// Whatever an image's tables say, the daemon goes on: requests are answered, with errors if need
/// be.
#[test]
fn a_broken_image_breaks_nothing_else() {
    let dir = TempDir::new("qcow2");
    let image = create(&dir, "disk.img", "cluster_size=4k");
    let text = image.to_str().unwrap();
    let write = ["-f", "qcow2", "-c", "write -q -P 0x5a 0 256k", text];
    assert!(
        Command::new("qemu-io")
            .args(write)
            .status()
            .unwrap()
            .success()
    );
    let mut bytes = fs::read(&image).unwrap();
    // Header, refcount table and L1 table in a cluster each are left, so that it can be opened:
    // what is spoilt are the counts, in the third, and the L2 tables and data behind them.
    for (at, byte) in random_bytes(17, bytes.len()).into_iter().enumerate() {
        if ![0, 1, 3].contains(&(at / 4096)) && at % 61 == 0 {
            bytes[at] = byte;
        }
    }
    fs::write(&image, &bytes).unwrap();
    let served = serve(&image, "");
    let mut front = served.open::<SplitDriver>(ALL);
    for at in (0..DISK / SECTOR).step_by(64) {
        let data = random_bytes(at as u64, 8192);
        // Answered; what is said does not matter.
        front.run(OUT, at as u64, &data, 0);
        front.run(IN, at as u64, &[], 8192);
    }
    front.run(FLUSH, 0, &[], 0);
    front.run(DISCARD, 0, &range(0, 4096, 0), 0);
    drop(front);
    let (status, log) = served.daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("its qcow2 image: "), "{log}");
}
