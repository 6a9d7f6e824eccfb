//! A panic in the library that images are read and written by costs its image, and nothing else.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use vringd::testing::driver::{PackedDriver, SplitDriver};

use super::front_end::{DISCARD, FLUSH, FrontEnd, IN, OUT, WRITE_ZEROES, range};
use super::qcow2::{ALL, content, create, qemu_img, read, work};
use super::served::{DISK, assert_same};
use crate::support::daemon::Daemon;
use crate::support::tmp::{TempDir, random_bytes};

const OK: u8 = 0;
const IOERR: u8 = 1;
/// The library panics when it reads this sector of the disk, which nothing was written to.
const TRIP: u64 = (4 << 20) / 512;

/// Where a sector of the disk is in the image's file.
fn place_of(image: &Path, sector: u64) -> u64 {
    let map = qemu_img(&["map", "--output=json", image.to_str().unwrap()]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
    let at = sector * 512;
    let holds = |extent: &&serde_json::Value| {
        (number(extent, "start")..number(extent, "start") + number(extent, "length")).contains(&at)
    };
    let extent = map.as_array().unwrap().iter().find(holds).unwrap();
    number(extent, "offset") + at - number(extent, "start")
}

fn serve(dir: &TempDir, panics_at: &str) -> Daemon {
    let disk = |name: &str| {
        let (socket, path) = (
            dir.path(&format!("{name}.sock")),
            dir.path(&format!("{name}.img")),
        );
        let (socket, path) = (socket.display(), path.display());
        format!("name={name},socket={socket},path={path},format=qcow2")
    };
    let (sick, well) = (disk("sick"), disk("well"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
    command.env("VRINGD_QCOW2_PANIC", panics_at);
    let args = ["run", "--core", "1", "--blk", &sick, "--blk", &well];
    Daemon::spawn(command, &args)
}

/// Whatever is asked of it, the disk says that it can't.
fn fails_in_everything(front: &mut FrontEnd<PackedDriver>) {
    for sector in [0, 64, TRIP, 2 * TRIP - 128] {
        assert_eq!(front.run(IN, sector, &[], 4096).status, IOERR, "{sector}");
        let write = front.run(OUT, sector, &[7; 4096], 0);
        assert_eq!(write.status, IOERR, "{sector}");
    }
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(front.run(kind, 0, &range(0, 128, 0), 0).status, IOERR);
    }
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, IOERR);
}

#[test]
fn a_panic_costs_its_image_and_nothing_else() {
    let dir = TempDir::new("panic");
    let options = "cluster_size=64k,preallocation=metadata";
    let [sick_image, well_image] = ["sick.img", "well.img"].map(|it| create(&dir, it, options));
    let inode = fs::metadata(&sick_image).unwrap().ino();
    let daemon = serve(&dir, &format!("{inode}:{}", place_of(&sick_image, TRIP)));
    let mut sick = FrontEnd::<PackedDriver>::open(&dir.path("sick.sock"), ALL);
    let mut well = FrontEnd::<SplitDriver>::open(&dir.path("well.sock"), ALL);
    let mut model = vec![0; DISK];
    let written = random_bytes(1, 65536);
    assert_eq!(sick.run(OUT, 0, &written, 0).status, OK);
    // By the worker itself, soon: it finds the cluster in the file.
    for _ in 0..50 {
        assert_same("before", &read(&mut sick, 0, 65536), &written);
    }
    assert_eq!(sick.run(FLUSH, 0, &[], 0).status, OK);
    work(&mut well, &mut model, 500, 20);

    for place in 0..16 {
        let (sector, kind) = (1024 + 128 * place, if place % 2 == 0 { IN } else { OUT });
        let data_in = if kind == IN { 4096 } else { 0 };
        match place {
            6 => sick.post(place, IN, TRIP, &[], 4096),
            _ => sick.post(place, kind, sector, &vec![7; 4096 - data_in], data_in),
        }
        let at = usize::try_from(place).unwrap() * 4096;
        let data = random_bytes(place, 4096);
        well.post(place, OUT, place * 8, &data, 0);
        model[at..at + 4096].copy_from_slice(&data);
    }
    for (place, answer) in sick.all_answers() {
        assert!(answer.status == IOERR || place != 6);
        assert!([OK, IOERR].contains(&answer.status), "{place}: {answer:?}");
    }
    for (place, answer) in well.all_answers() {
        assert_eq!(answer.status, OK, "{place}");
    }
    fails_in_everything(&mut sick);
    work(&mut well, &mut model, 600, 30);
    drop(sick);
    let mut sick = FrontEnd::<PackedDriver>::open(&dir.path("sick.sock"), ALL);
    fails_in_everything(&mut sick);
    for at in (0..DISK).step_by(1 << 20) {
        let back = read(&mut well, at, 1 << 20);
        assert_same("well", &back, &model[at..at + (1 << 20)]);
    }
    let errors = |name: &str| daemon.counter(name, "errors");
    assert!(errors("sick") > 20 && errors("well") == 0);
    drop((sick, well));
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("as a test wants it"), "{log}");
    assert!(log.contains("blk sick: the library panicked"), "{log}");
    assert_same("the other image", &content(&well_image), &model);
    // What was flushed before is there.
    let flushed = content(&sick_image);
    assert_same("the image", &flushed[..65536], &written);
}

#[test]
fn a_panic_over_an_image_that_is_opened_ends_the_daemon_with_its_name() {
    let dir = TempDir::new("panic-open");
    let image = create(&dir, "sick.img", "cluster_size=64k");
    let inode = fs::metadata(&image).unwrap().ino();
    let socket = dir.path("sick.sock");
    let (socket, path) = (socket.display(), image.display());
    let disk = format!("name=sick,socket={socket},path={path},format=qcow2");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
    command.env("VRINGD_QCOW2_PANIC", format!("{inode}:0"));
    let output = command
        .args(["run", "--core", "1", "--blk", &disk])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let why = format!("path = {image:?}: open: the library for qcow2 images panicked over it");
    assert!(said.contains(&why), "{said}");
}
