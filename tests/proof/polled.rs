//! `iopoll` on an NVMe controller (QEMU's): daemon and front-end are in the guest, as the daemon
//! needs the host's kernel to have the device.

use std::fs::File;

use crate::support::guest::{Guest, GuestConfig, Tools};
use crate::support::tmp::TempDir;

const DISK_BYTES: u64 = 32 << 20;
/// What the daemon says where the device can't be polled.
const NOT_HERE: &str = "iopoll: not here";
/// Starts a daemon on the disk in the guest and waits for its socket.
const START: &str = "rm -f /tmp/s; /proof/vringd run --core 1 --idle adaptive --blk \
    name=disk0,socket=/tmp/s,path=/tmp/disk,iopoll=true >/tmp/log 2>&1 & echo $! >/tmp/pid; \
    n=0; while ! [ -S /tmp/s ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done";

/// Has the driver set up the controller anew, with so many queues to poll. Controller or namespace
/// may have another number then, since the kernel closes the files of an io_uring a moment after
/// its owner has gone.
fn set_up(guest: &mut Guest, poll_queues: u32) {
    guest.ok(&format!(
        "cd /sys/bus/pci/drivers/nvme && at=$(ls -d 0*) && \
         echo {poll_queues} >/sys/module/nvme/parameters/poll_queues && echo $at >unbind && \
         echo $at >bind; n=0; while ! ln -sf $(ls /dev/nvme?n?) /tmp/disk; do n=$((n + 1)); \
         [ $n -lt 300 ] || exit 1; sleep 0.1; done"
    ));
}

/// Interrupts so far by which the controller told of reads and writes.
fn interrupts(guest: &mut Guest) -> u64 {
    let lines = guest.ok("grep -E 'nvme[0-9]+q[1-9]' /proc/interrupts");
    let counts = lines.lines().flat_map(|line| {
        let numbers = line.split_whitespace().skip(1);
        numbers.map_while(|number| number.parse::<u64>().ok())
    });
    counts.sum()
}

/// What a load of the disk came to: requests, and interrupts meanwhile.
fn load(guest: &mut Guest, line: &str) -> (u64, u64) {
    let before = interrupts(guest);
    let bench = "/proof/vringd bench blk --socket /tmp/s --verify --cpus-allowed 0 --json";
    let said = guest.ok(&format!("{bench} {line}"));
    let report = said.lines().find(|line| line.starts_with('{'));
    let report = report.unwrap_or_else(|| panic!("no report: {said}"));
    let report: serde_json::Value = serde_json::from_str(report).expect("one JSON object");
    let requests = report["requests"].as_u64().expect("a number");
    (requests, interrupts(guest) - before)
}

/// Writes the disk, reads it back, each block checked, then both at random. Requests and
/// interrupts of all that, and the daemon's log.
fn verified(guest: &mut Guest) -> (u64, u64, String) {
    guest.ok(START);
    let loads = [
        "--rw write --bs 16k --iodepth 16 --loops 1 --seed 9",
        "--rw read --bs 16k --iodepth 16 --loops 1 --seed 9",
        "--rw randrw --bs 16k --iodepth 8 --runtime 500ms --format packed",
    ];
    let done = loads.map(|line| load(guest, line));
    let stop = "kill $(cat /tmp/pid); n=0; while kill -0 $(cat /tmp/pid) 2>/dev/null; do \
                n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done; cat /tmp/log";
    let log = guest.ok(stop);
    assert!(!log.contains("ERROR"), "{log}");
    let sum = |of: fn((u64, u64)) -> u64| done.into_iter().map(of).sum();
    (sum(|load| load.0), sum(|load| load.1), log)
}

#[test]
fn an_nvme_disk_is_polled_and_all_blocks_are_right() {
    let dir = TempDir::new("polled");
    let disk = dir.path("disk");
    let file = File::create(&disk).expect("a disk");
    file.set_len(DISK_BYTES).expect("a sparse file");
    let mut guest = Guest::boot(&GuestConfig {
        tools: Some(Tools {
            nvme: vec![disk],
            programs: vec![env!("CARGO_BIN_EXE_vringd").into()],
            ..Tools::default()
        }),
        ..GuestConfig::default()
    });
    // Without a queue to poll the daemon says so, and does without.
    set_up(&mut guest, 0);
    let (requests, told, log) = verified(&mut guest);
    println!("not polled: {requests} requests, {told} interrupts");
    assert!(log.contains(NOT_HERE), "{log}");
    assert!(told > requests / 50, "{requests} {told}");

    set_up(&mut guest, 1);
    let (requests, told, log) = verified(&mut guest);
    println!("polled: {requests} requests, {told} interrupts");
    assert!(!log.contains(NOT_HERE), "{log}");
    assert!(
        requests > 4000 && told < requests / 200,
        "{requests} {told}"
    );
}
