//! Checksums that the guest leaves undone, through the real daemon: who makes them, and that a
//! socket at the far end takes the datagram.

use std::net::UdpSocket;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::tests::{PLAIN, cable, peer};
use crate::front_end::{FrontEnd, PATIENCE};
use crate::support::daemon::Daemon;
use crate::support::netns::Netns;
use crate::support::tmp::TempDir;

const VRINGD: &str = env!("CARGO_BIN_EXE_vringd");
/// NEEDS_CSUM from byte 34 on, at byte 40.
const UNDONE: [u8; 12] = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
/// VIRTIO_NET_F_CSUM.
const CSUM: u64 = 1;
const HEADERS: usize = 42;

fn socket(netns: &Netns) -> UdpSocket {
    netns.ok("ip addr add 192.0.2.2/24 dev xb");
    let socket = netns.spawn(|| UdpSocket::bind("192.0.2.2:4661").unwrap());
    let socket = socket.join().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A datagram to that socket, with the sum of its pseudo-header and nothing else.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let length = |more: usize| u16::try_from(more + payload.len()).unwrap().to_be_bytes();
    let sum = |bytes: &[u8]| {
        let words = bytes.chunks_exact(2);
        let sum: u32 = words
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
            .sum();
        u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
    };
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(length(28));
    frame.extend([0, 9, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let head = (!sum(&frame[14..])).to_be_bytes();
    frame[24..26].copy_from_slice(&head);
    let pseudo = [&frame[26..34], &[0, 17], &length(8)].concat();
    frame.extend([0x12, 0x34, 0x12, 0x35]);
    frame.extend(length(8));
    frame.extend(sum(&pseudo).to_be_bytes());
    frame.extend(payload);
    frame
}

/// Sends datagrams, which arrive; a reader of packets is told of `undone` ones.
fn exchange<D: Driver>(netns: &Netns, front_end: &mut FrontEnd<D>, undone: bool) -> u64 {
    let (socket, peer) = (socket(netns), peer(netns));
    let lengths = [1, 2, 18, 19, 500, 1471, 1472];
    for len in lengths {
        let payload: Vec<u8> = (0..len).map(|i| (i * 7usize).to_le_bytes()[0]).collect();
        let frame = datagram(&payload);
        front_end.transmit_with(0, &UNDONE, &frame);
        let mut got = [0; 2048];
        let count = socket.recv(&mut got).unwrap();
        assert!(got[..count] == payload, "{len} bytes differ");
        let (told, got) = peer.receive_if(|got| got.get(6..12) == Some(&[2, 0, 0, 0, 0, 1]));
        assert!(got[HEADERS..] == payload, "{len} bytes differ");
        assert_eq!(got[40..42] == frame[40..42], undone, "{len}");
        let header = if undone { &UNDONE[..10] } else { &PLAIN };
        assert_eq!(told, header, "{len}");
    }
    lengths.len() as u64
}

fn counted(daemon: &Daemon) -> [u64; 3] {
    [
        "xdp_tx_offloaded_csum",
        "xdp_tx_software_csum",
        "xdp_tx_software_segments",
    ]
    .map(|counter| daemon.counter("net0", counter))
}

#[test]
fn checksums_are_made_by_the_daemon_or_left_to_the_interface() {
    for (options, undone) in [("", false), (",tx_csum=offload,busy_poll=20", true)] {
        let (netns, dir) = (cable(1, 1500), TempDir::new("xdpcsum"));
        let socket = dir.path("net0.sock");
        let net = format!("name=net0,socket={},link=xdp:xa{options}", socket.display());
        let arguments = ["run", "--core", "1", "--idle", "adaptive", "--net", &net];
        let daemon = Daemon::start_in(&netns, &arguments);
        let csum = if undone {
            "tx_csum=offload"
        } else {
            "tx_csum=software"
        };
        assert!(daemon.log().contains(csum), "{}", daemon.log());
        let mut front_end = FrontEnd::<SplitDriver>::connect_with(&socket, 1, CSUM);
        let count = exchange(&netns, &mut front_end, undone);
        let expected = if undone { [count, 0, 0] } else { [0, count, 0] };
        assert_eq!(counted(&daemon), expected);
        assert_eq!(daemon.counter("net0", "tx_frames"), count);
        assert_eq!(daemon.counter("net0", "xdp_tx_invalid"), 0);
    }
}

/// The daemon gives the memory to sockets that the helper opened: no capability is needed.
#[test]
fn a_daemon_without_capabilities_leaves_checksums_to_the_interface() {
    let _turn = super::passed::turn();
    let (netns, dir) = (cable(1, 1500), TempDir::new("xdpcsumfd"));
    let socket = dir.path("net0.sock");
    let link = "xdp:xa:fd=51:map=52";
    let mut command = netns.command(VRINGD);
    command.args(["xdp-helper", "--link", link, "--", VRINGD]);
    let net = format!(
        "name=net0,socket={},link={link},tx_csum=offload",
        socket.display()
    );
    let arguments = ["run", "--core", "1", "--idle", "adaptive", "--net", &net];
    let daemon = Daemon::spawn(command, &arguments);
    let mut front_end = FrontEnd::<PackedDriver>::connect_with(&socket, 1, CSUM);
    let count = exchange(&netns, &mut front_end, true);
    assert_eq!(counted(&daemon), [count, 0, 0]);
}

/// A guest that wants its frames cut into tiny pieces: the worker cuts so many in a turn, sleeps
/// over none that wait, and loses none.
#[test]
fn a_guest_that_wants_tiny_segments_has_them_in_turns() {
    /// HOST_TSO4; NEEDS_CSUM at byte 50, TCPV4, 54 bytes of headers, segments of 8.
    const TSO: u64 = 1 << 11;
    const HEADER: [u8; 12] = [1, 1, 54, 0, 8, 0, 34, 0, 16, 0, 0, 0];
    const PAYLOAD: u16 = 16_000;
    const FRAMES: usize = 32;
    let (netns, dir) = (cable(1, 1500), TempDir::new("xdptiny"));
    let socket = dir.path("net0.sock");
    let net = format!("name=net0,socket={},link=xdp:xa", socket.display());
    let arguments = ["run", "--core", "1", "--idle", "interrupt", "--net", &net];
    let daemon = Daemon::start_in(&netns, &arguments);
    let mut front_end = FrontEnd::<SplitDriver>::connect_with(&socket, 1, CSUM | TSO);
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((40 + PAYLOAD).to_be_bytes());
    frame.extend([0, 9, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    frame.extend([0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
    frame.extend([0; 4]);
    frame.resize(54 + usize::from(PAYLOAD), 7);
    let turns = || daemon.worker_counter(0, "busy_turns");
    let before = turns();
    front_end.transmit_all(0, &HEADER, &[&frame[..]; FRAMES]);
    let turns = turns() - before;
    let pieces = FRAMES as u64 * u64::from(PAYLOAD) / 8;
    assert_eq!(counted(&daemon), [0, 0, pieces]);
    // A frame in each, and the last of them may not be counted yet.
    assert!(
        turns + 1 >= FRAMES as u64,
        "{pieces} segments in {turns} turns"
    );
    assert_eq!(daemon.counter("net0", "tx_frames"), FRAMES as u64);
}
