//! Ports whose sockets the helper opened: the daemon has no capability at all.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::PoisonError;

use vringd::testing::driver::{PackedDriver, SplitDriver};

use super::tests::{PLAIN, cable, exchange, exchange_on_two, frame, has_program, peer};
use crate::front_end::{FrontEnd, PATIENCE};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::netns::Netns;
use crate::support::tmp::TempDir;

const VRINGD: &str = env!("CARGO_BIN_EXE_vringd");

/// The helper, to be told more.
fn helper(netns: &Netns, link: &str) -> Command {
    let mut command = netns.command(VRINGD);
    command.args(["xdp-helper", "--link", link]);
    command
}

/// Memory that daemons without capabilities lock is counted for all of them together: one of them
/// may take all there is.
#[expect(clippy::disallowed_types, reason = "tests of this file take turns")]
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Until it is dropped nobody else's daemon without capabilities runs.
pub(super) fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn daemon(netns: &Netns, link: &str, cores: &str, socket: &Path) -> Daemon {
    let mut command = helper(netns, link);
    command.args(["--", VRINGD]);
    let net = format!("name=net0,socket={},link={link}", socket.display());
    let arguments = ["run", "--core", cores, "--idle", "adaptive", "--net", &net];
    Daemon::spawn(command, &arguments)
}

/// None of the sets has a bit, and none can come back.
fn has_no_capability(daemon: &Daemon) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key} in {status}"))
            .trim()
            .to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(value(set), "0".repeat(16), "{set}");
    }
    assert_eq!(value("NoNewPrivs:"), "1");
}

/// One after the other: each locks as much memory as the usual limit is.
#[test]
fn a_daemon_without_capabilities_moves_frames_both_ways() {
    let _turn = turn();
    let (netns, dir) = (cable(1, 1500), TempDir::new("xdpfd"));
    let socket = dir.path("net0.sock");
    let first = daemon(&netns, "xdp:xa:fd=51:map=52", "1", &socket);
    has_no_capability(&first);
    assert!(has_program(&netns));
    let log = first.log();
    assert!(log.contains("xdp xa: native XDP, copy mode"), "{log}");
    let peer = peer(&netns);
    let line = netns.ok("ip -d link show xa");
    assert!(line.contains("promiscuity 1"), "{line}");
    // Nobody is there: lost, and not kept for who comes.
    peer.send(&PLAIN, &frame(100, 1));
    let mut front_end = FrontEnd::<PackedDriver>::connect(&socket, 1);
    let sizes: Vec<_> = (0..100).map(|i| 60 + i * 337 % 1455).collect();
    exchange(&mut front_end, &peer, &sizes);
    drop(front_end);
    // The next guest, with the same socket of the interface.
    let mut front_end = FrontEnd::<SplitDriver>::connect(&socket, 1);
    exchange(&mut front_end, &peer, &[1514, 60]);
    assert_eq!(first.counter("net0", "xdp_rx_dropped"), 0);
    drop(front_end);
    first.signal(libc::SIGKILL);
    wait_until("the program is gone", PATIENCE, || {
        (!has_program(&netns)).then_some(())
    });
    let line = netns.ok("ip -d link show xa");
    assert!(line.contains("promiscuity 0"), "{line}");
    // Long frames, without a map of its own, and on what the one before has just left.
    netns.ok("ip link set xa mtu 9000 && ip link set xb mtu 9000");
    let second = daemon(&netns, "xdp:xa:fd=51", "1", &socket);
    has_no_capability(&second);
    let mut front_end = FrontEnd::<SplitDriver>::connect(&socket, 1);
    exchange(&mut front_end, &peer, &[9014, 60, 4096, 1792, 1793, 8999]);
    let (status, log) = second.stop();
    assert!(status.success(), "{log}");
    assert!(!has_program(&netns));
}

#[test]
fn a_daemon_without_capabilities_moves_frames_on_two_queues() {
    let _turn = turn();
    let (netns, dir) = (cable(2, 1500), TempDir::new("xdpfd2"));
    let socket = dir.path("net0.sock");
    let daemon = daemon(&netns, "xdp:xa:fd=52+51:map=53", "0,1", &socket);
    has_no_capability(&daemon);
    let peer = peer(&netns);
    let mut front_end = FrontEnd::<PackedDriver>::connect(&socket, 2);
    exchange_on_two(&mut front_end, &peer);
    drop(front_end);
    // The next guest, with the same sockets of the interface.
    let mut front_end = FrontEnd::<SplitDriver>::connect(&socket, 2);
    exchange_on_two(&mut front_end, &peer);
    for (counter, value) in [
        ("tx_frames", 128),
        ("rx_frames", 128),
        ("xdp_rx_dropped", 0),
        ("xdp_rx_ring_full", 0),
        ("xdp_tx_invalid", 0),
    ] {
        assert_eq!(daemon.counter("net0", counter), value, "{counter}");
    }
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(!has_program(&netns));
}

/// As a service manager does: descriptors from 3 on, and their names in the environment.
#[test]
fn a_daemon_finds_descriptors_by_the_names_that_its_service_manager_tells() {
    let _turn = turn();
    let (netns, dir) = (cable(1, 1500), TempDir::new("xdpname"));
    let socket = dir.path("net0.sock");
    let run = |names: &str, link: &str| {
        let mut command = helper(&netns, "xdp:xa:fd=4:map=5");
        let line = format!(
            "exec 3</dev/null; export LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES={names}; \
             exec {VRINGD} run --core 1 --net name=net0,socket={},link={link}",
            socket.display()
        );
        command.args(["--", "sh", "-c", &line]);
        command
    };
    let named = "xdp:xa:fdname=eth1-q0:mapname=eth1-map";
    let daemon = Daemon::spawn(run("other:eth1-q0:eth1-map", named), &[]);
    has_no_capability(&daemon);
    let peer = peer(&netns);
    let mut front_end = FrontEnd::<PackedDriver>::connect(&socket, 1);
    exchange(&mut front_end, &peer, &[60, 1514, 700]);
    assert_eq!(daemon.counter("net0", "xdp_rx_dropped"), 0);
    drop(front_end);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    for (names, reason) in [
        (
            "other:eth1-q1:eth1-map",
            "xdp `xa`: the file descriptor named `eth1-q0`: systemd passed no socket of this name \
             (LISTEN_FDNAMES=\"other:eth1-q1:eth1-map\")",
        ),
        (
            "other:eth1-q0:eth1-q0",
            "xdp `xa`: the file descriptor named `eth1-q0`: systemd passed several sockets of this \
             name (LISTEN_FDNAMES=\"other:eth1-q0:eth1-q0\")",
        ),
        (
            "eth1-q0:other:eth1-map",
            "xdp `xa`: the file descriptor 3 is not an AF_XDP socket",
        ),
        (
            "eth1-map:eth1-q0:other",
            "xdp `xa`: the file descriptor 3 is not an XSKMAP",
        ),
    ] {
        let output = run(names, named).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        let line = format!("vringd: net net0: link = \"{named}\": {reason}");
        assert!(
            text.lines().any(|said| said == line),
            "{text} instead of {line}"
        );
    }
    assert!(!has_program(&netns));
}

#[test]
fn too_little_memory_that_may_be_locked_is_said_with_what_is_needed() {
    let (netns, dir) = (cable(2, 1500), TempDir::new("xdpfdmem"));
    let link = "xdp:xa:fd=51+52";
    let mut command = helper(&netns, link);
    command.args(["--", "prlimit", "--memlock=1048576:1048576"]);
    // It must end by itself; the test does so in any case.
    command.args(["timeout", "20", VRINGD, "run", "--net"]);
    let net = format!("socket={},link={link}", dir.path("net0.sock").display());
    let output = command.arg(net).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let line = "vringd: net net0: link = \"xdp:xa:fd=51+52\": xdp `xa`: can't register memory for \
                its frames (queue 0): all its queues lock 4096 KiB, and RLIMIT_MEMLOCK is 1024 KiB \
                for all processes of the user together: raise it (LimitMEMLOCK=, ulimit -l) or \
                give CAP_IPC_LOCK: No buffer space available (os error 105)";
    assert!(text.lines().any(|said| said == line), "{text}");
    assert!(!has_program(&netns));
}

#[test]
fn the_command_is_run_as_the_user_and_gets_what_it_was_promised() {
    let netns = cable(2, 1500);
    let mut command = helper(&netns, "xdp:xa:fd=52+51:map=53");
    let line = "id -u; grep CapPrm /proc/self/status; \
                readlink /proc/self/fd/51 /proc/self/fd/52 /proc/self/fd/53; \
                ip -d link show xa; exit 7";
    command.args(["--user", "nobody", "--", "/bin/sh", "-c", line]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], ["65534", "CapPrm:\t0000000000000000"], "{text}");
    for socket in &lines[2..4] {
        assert!(socket.starts_with("socket:["), "{text}");
    }
    assert_eq!(lines[4], "anon_inode:bpf-map", "{text}");
    assert!(
        text.contains("prog/xdp") && text.contains("promiscuity 1"),
        "{text}"
    );
    // Nobody but the command has kept it.
    assert!(!has_program(&netns));
}

#[test]
fn what_the_helper_or_the_daemon_can_not_do_is_one_line_and_leaves_nothing() {
    let (netns, dir) = (cable(1, 1500), TempDir::new("xdpfdno"));
    let fails = |output: Output, wanted: &str| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        let said = text.lines().any(|line| line == wanted);
        assert!(said, "{text} instead of {wanted}");
        assert!(!has_program(&netns), "{wanted}");
    };
    let run = |link: &str, arguments: &[&str]| {
        let mut command = helper(&netns, link);
        command.args(arguments).output().unwrap()
    };
    fails(
        run("xdp:none0:fd=51", &["--", "true"]),
        "vringd: xdp `none0`: there is no such interface",
    );
    fails(
        run("xdp:xa:fd=51+52", &["--", "true"]),
        "vringd: xdp `xa`: 2 queues asked for, the interface has 1",
    );
    fails(
        run("xdp:xa:fd=51", &["--user", "no-such-user", "--", "true"]),
        "vringd: --user \"no-such-user\": there is no such user",
    );
    fails(
        run("xdp:xa:fd=51", &["--", "/no/such/program"]),
        "vringd: /no/such/program can't be run: No such file or directory (os error 2)",
    );
    // Descriptors that somebody has already, and no capability.
    let mut taken = netns.command("sh");
    let line = format!("exec {VRINGD} xdp-helper --link xdp:xa:fd=9 -- true 9</dev/null");
    fails(
        taken.args(["-c", &line]).output().unwrap(),
        "vringd: xdp `xa`: the file descriptor 9 is in use already: choose another number",
    );
    fails(
        run(
            "xdp:xa:fd=51",
            &[
                "--",
                VRINGD,
                "xdp-helper",
                "--link",
                "xdp:xa:fd=53",
                "--",
                "true",
            ],
        ),
        "vringd: xdp `xa`: no permission to make a map (CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF are \
         needed)",
    );
    let net = format!(
        "socket={},link=xdp:xa:fd=51:map=53",
        dir.path("n").display()
    );
    fails(
        run("xdp:xa:fd=51", &["--", VRINGD, "run", "--net", &net]),
        "vringd: net net0: link = \"xdp:xa:fd=51:map=53\": xdp `xa`: the file descriptor 53 is not \
         open",
    );
}
