//! A block device that stands still, or fails, under the daemon: device-mapper's, so that it is the
//! kernel's own answers, and silence, that the daemon gets. Daemon and front-ends are in the guest.

use crate::support::guest::{Guest, GuestConfig, Tools};

const SECTORS: u32 = 16 << 11;
/// Longer than what the daemon waits for stuck requests at its end.
const PATIENCE: &str = "300";

/// Waits in the guest until `condition` holds.
fn wait(guest: &mut Guest, condition: &str) {
    guest.ok(&format!(
        "n=0; until {condition}; do n=$((n + 1)); [ $n -lt {PATIENCE} ] || \
         {{ cat /tmp/log; exit 1; }}; sleep 0.1; done"
    ));
}

/// Has the device-mapper device do something else from now on.
fn becomes(guest: &mut Guest, target: &str) {
    guest.ok(&format!(
        "export DM_DISABLE_UDEV=1; dmsetup suspend --noflush --nolockfs sick && \
         dmsetup load sick --table '0 {SECTORS} {target}' && dmsetup resume sick"
    ));
}

/// The command of a load on one of the disks.
fn load(disk: &str, line: &str) -> String {
    format!("/proof/vringd bench blk --socket /tmp/{disk}.s --cpus-allowed 0 --json {line}")
}

/// Begins a load whose status will be in a file.
fn begin(guest: &mut Guest, disk: &str, line: &str) {
    let load = load(disk, line);
    guest.ok(&format!(
        "rm -f /tmp/{disk}.rc; (({load}) >/tmp/{disk}.out 2>&1; echo $? >/tmp/{disk}.new; \
         mv /tmp/{disk}.new /tmp/{disk}.rc) &"
    ));
}

const WRITE: &str = "--rw write --bs 16k --iodepth 16 --loops 1 --seed 9 --verify";
const READ: &str = "--rw read --bs 16k --iodepth 16 --loops 1 --seed 9 --verify";

fn start(guest: &mut Guest) {
    let disk = |name: &str, path: &str| {
        format!("--blk name={name},socket=/tmp/{name}.s,path={path},io_timeout=500ms")
    };
    let (sick, well) = (disk("sick", "/dev/mapper/sick"), disk("well", "/dev/ram1"));
    guest.ok(&format!(
        "rm -f /tmp/*.s; /proof/vringd run --core 1 --idle adaptive --stop-timeout 2s \
         {sick} {well} >/tmp/log 2>&1 & echo $! >/tmp/pid"
    ));
    wait(guest, "[ -S /tmp/sick.s ] && [ -S /tmp/well.s ]");
}

#[test]
fn a_device_that_stands_still_or_fails_harms_nobody_else() {
    let mut guest = Guest::boot(&GuestConfig {
        tools: Some(Tools {
            programs: vec![env!("CARGO_BIN_EXE_vringd").into()],
            ..Tools::default()
        }),
        ..GuestConfig::default()
    });
    let linear = "linear /dev/ram0 0";
    guest.ok(&format!(
        "for n in 0 1; do [ -e /dev/ram$n ] || mknod /dev/ram$n b 1 $n; done; \
         DM_DISABLE_UDEV=1 dmsetup create sick --table '0 {SECTORS} {linear}'"
    ));
    start(&mut guest);
    for disk in ["sick", "well"] {
        guest.ok(&load(disk, WRITE));
    }

    // It stands still: told of, the other disk of the same worker goes on, nothing is lost.
    guest.ok("DM_DISABLE_UDEV=1 dmsetup suspend --noflush --nolockfs sick");
    begin(&mut guest, "sick", READ);
    wait(
        &mut guest,
        "grep -q 'blk sick queue 0: .* in flight for longer than' /tmp/log",
    );
    guest.ok(&load("well", READ));
    guest.ok("! [ -e /tmp/sick.rc ] && DM_DISABLE_UDEV=1 dmsetup resume sick");
    wait(&mut guest, "[ -e /tmp/sick.rc ]");
    assert_eq!(guest.ok("cat /tmp/sick.rc"), "0", "it went on");

    // It fails: so do its requests, each with its answer.
    becomes(&mut guest, "error");
    let (status, said) = guest.run(&load("sick", READ));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("I/O error"), "{said}");
    guest.ok(&load("well", READ));
    becomes(&mut guest, linear);
    guest.ok(&load("sick", READ));

    // It stands still for good: the daemon ends in time all the same, and says what it left.
    guest.ok("DM_DISABLE_UDEV=1 dmsetup suspend --noflush --nolockfs sick");
    begin(&mut guest, "sick", READ);
    wait(
        &mut guest,
        "[ $(grep -c 'in flight for longer than' /tmp/log) -ge 2 ]",
    );
    guest.ok("kill $(cat /tmp/pid)");
    wait(&mut guest, "! kill -0 $(cat /tmp/pid) 2>/dev/null");
    let log = guest.ok("cat /tmp/log");
    let stuck = "blk sick: not drained, 16 requests still in flight";
    assert!(
        log.contains(stuck) && !log.contains("blk well: not drained"),
        "{log}"
    );
    guest.ok("DM_DISABLE_UDEV=1 dmsetup resume sick");
}
