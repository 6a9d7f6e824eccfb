//! Offloads of a guest's card, switched off and on (`ethtool -K`) while TCP goes both ways.
//!
//! What the guest leaves undone is its own choice, frame by frame. What it takes was agreed on at
//! the start: QEMU keeps VIRTIO_NET_CTRL_GUEST_OFFLOADS to itself, so that a back-end goes on as
//! before, and the guest must take it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vringd::sys::testnet::PacketSocket;

use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::guest::Guest;
use crate::support::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(60);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Descriptors of QEMU's rings: no frame from before a switch comes after so many.
const RING: u64 = 256;

/// How the guest's card is set, and what that makes of its frames.
struct Setting {
    ethtool: &'static str,
    /// Frames are to be cut (VIRTIO_NET_HDR_GSO_TCPV4).
    is_tso: bool,
    /// Checksums are to be made (VIRTIO_NET_HDR_F_NEEDS_CSUM).
    needs_csum: bool,
}

const fn setting(ethtool: &'static str, is_tso: bool, needs_csum: bool) -> Setting {
    Setting {
        ethtool,
        is_tso,
        needs_csum,
    }
}

const SETTINGS: [Setting; 8] = [
    // Without checksums Linux has no segmentation by the card either.
    setting("tx off", false, false),
    setting("tx on", true, true),
    setting("tso off", false, true),
    setting("gso off", false, true),
    setting("tso on gso on", true, true),
    setting("sg off", false, true),
    setting("sg on", true, true),
    setting("rx-gro-hw off", true, true),
];

/// A server at 10.7.0.1:7 that sends everything back, however much comes first.
struct Echo {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Echo {
    fn start(netns: &Netns) -> Echo {
        let listener = netns.spawn(|| TcpListener::bind("10.7.0.1:7"));
        let listener = listener.join().expect("no panic").expect("a listener");
        listener.set_nonblocking(true).expect("non-blocking");
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            while let Some(stream) = wait_until("a client", PATIENCE, || match listener.accept() {
                Ok((stream, _)) => Some(Some(stream)),
                Err(_) => seen.load(Ordering::Relaxed).then_some(None),
            }) {
                stream.set_nonblocking(false).expect("blocking");
                stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
                stream.set_write_timeout(Some(PATIENCE)).expect("a limit");
                send_back(&stream);
            }
        });
        Echo { ended, thread }
    }

    fn end(self) {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().expect("the server does not panic");
    }
}

/// Reads without ever waiting for the client to take something: it may not while it writes.
fn send_back(stream: &TcpStream) {
    let (sender, received) = mpsc::channel::<Vec<u8>>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for bytes in received {
                (&*stream).write_all(&bytes).expect("the client reads");
            }
            let _ = stream.shutdown(std::net::Shutdown::Write);
        });
        let mut bytes = vec![0; 1 << 16];
        loop {
            let length = (&*stream).read(&mut bytes).expect("the client writes");
            if length == 0 {
                break;
            }
            sender.send(bytes[..length].to_vec()).expect("it is sent");
        }
        drop(sender);
    });
}

/// Frames of the card so far: all from the guest, those of them that are longer than a frame on a
/// cable, and those so long to the guest.
fn frames(daemon: &Daemon) -> [u64; 3] {
    [
        ("tx", "good_packets"),
        ("tx", "size_1519_max_packets"),
        ("rx", "size_1519_max_packets"),
    ]
    .map(|(way, name)| daemon.queue_counter("net0", way, name))
}

/// Checks on both sides of the daemon that frames are as `setting` makes them.
fn check(setting: &Setting, netns: &Netns, daemon: &Daemon) {
    let what = setting.ethtool;
    let [sent, ..] = frames(daemon);
    let before = wait_until("what was in the ring is out", PATIENCE, || {
        let now = frames(daemon);
        (now[0] > sent + RING).then_some(now)
    });
    let after = wait_until(&format!("traffic with {what}"), PATIENCE, || {
        let now = frames(daemon);
        let more = |which: usize| now[which] - before[which];
        let all = more(0) > 100 && more(2) > 10;
        (all && (!setting.is_tso || more(1) > 10)).then_some(now)
    });
    assert!(
        setting.is_tso || after[1] == before[1],
        "{what}: {before:?} to {after:?}"
    );
    // What the tap was given.
    let tap = netns.spawn(|| PacketSocket::bind("vt0")).join().unwrap();
    let (header, frame) = tap.receive_if(|frame| {
        let is_tcp = frame[12..14] == [8, 0] && frame[23] == 6;
        // A part of a stream's middle: where it can be large it is.
        let is_full = frame.len() >= if setting.is_tso { 1519 } else { 1514 };
        frame[6..12] == MAC && is_tcp && is_full
    });
    let [flags, kind] = [header[0], header[1]];
    let length = frame.len();
    assert_eq!(flags & 1 != 0, setting.needs_csum, "{what}: {header:x?}");
    assert_eq!(kind, u8::from(setting.is_tso), "{what}: {length} bytes");
}

/// The guest sends a file to a server that sends it back, again and again, while its card is set
/// otherwise; each time it gets what it sent.
pub(crate) fn offloads_are_switched_under_traffic(
    guest: &mut Guest,
    netns: &Netns,
    daemon: &Daemon,
) {
    let echo = Echo::start(netns);
    guest.ok("dd if=/dev/urandom of=/tmp/s bs=1M count=2 2>/dev/null; : >/tmp/bad; : >/tmp/rounds");
    guest.ok(
        "{ while [ ! -e /tmp/stop ]; do nc 10.7.0.1 7 </tmp/s >/tmp/r; \
         cmp /tmp/s /tmp/r >>/tmp/bad 2>&1; echo >>/tmp/rounds; done; \
         : >/tmp/over; } >/dev/null 2>&1 &",
    );
    for setting in &SETTINGS {
        guest.ok(&format!("ethtool -K eth0 {}", setting.ethtool));
        check(setting, netns, daemon);
    }
    wait_until("some rounds", PATIENCE, || {
        let rounds: usize = guest.ok("wc -l </tmp/rounds").parse().expect("a number");
        (rounds >= 3).then_some(())
    });
    let last = "touch /tmp/stop; while [ ! -e /tmp/over ]; do usleep 100000; done; cat /tmp/bad";
    assert_eq!(guest.ok(last), "", "other bytes came back");
    echo.end();
}
