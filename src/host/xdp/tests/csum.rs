//! Checksums that guests leave undone: who makes them, and what each kind of reader at the far end
//! of the cable finds.

use std::net::UdpSocket;
use std::process::Command;

use super::*;
use crate::host::net::decided;
use crate::sys::xdp::TxCsum;

/// Bytes of the headers of a datagram, and where its checksum begins.
const HEADERS: usize = 42;
const UDP: u16 = 34;
const OFFLOADED: usize = 0;
const SOFTWARE: usize = 1;
const SEGMENTS: usize = 2;

fn csum_port(tx_csum: TxCsum, generic: bool, mtu: u16) -> (Xdp, XdpQueue) {
    let place = XdpPlace {
        tx_csum,
        ..XdpPlace::default()
    };
    port_at(place, generic, mtu)
}

/// The sum of 16-bit words, a word at a time.
fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap()
}

fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// From 192.0.2.1 to 192.0.2.2, with `len` bytes of payload; its checksum is left undone.
fn datagram(len: usize, seed: u8) -> (VnetHeader, Vec<u8>) {
    let short = |len: usize| u16::try_from(len).unwrap();
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 9, 0x40, 0, 64, 17, 0, 0]);
    frame.extend([192, 0, 2, 1, 192, 0, 2, 2]);
    frame.extend([0x12, 0x34, 0x12, 0x35, 0, 0, 0, 0]);
    frame.extend((0..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ seed));
    put(&mut frame, 16, short(28 + len));
    let head = !sum(&frame[14..34]);
    put(&mut frame, 24, head);
    put(&mut frame, 38, short(8 + len));
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(short(8 + len).to_be_bytes());
    put(&mut frame, 40, sum(&pseudo));
    let header = VnetHeader {
        flags: 1,
        csum_start: UDP,
        csum_offset: 6,
        ..VnetHeader::PLAIN
    };
    (header, frame)
}

/// A TCP segment over IPv6 with `len` bytes of payload, to be cut into those of `size`.
fn large(len: usize, size: u16) -> (VnetHeader, Vec<u8>) {
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(u16::try_from(20 + len).unwrap().to_be_bytes());
    frame.extend([6, 64]);
    frame.extend([[0x20, 1, 0xd, 0xb8], [0; 4], [0; 4], [0, 0, 0, 1]].concat());
    frame.extend([[0x20, 1, 0xd, 0xb8], [0; 4], [0; 4], [0, 0, 0, 2]].concat());
    frame.extend([0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
    frame.extend([0x55, 0xaa, 0, 0]);
    frame.extend((0..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0]));
    let header = VnetHeader {
        flags: 1,
        gso_type: 4,
        hdr_len: 74,
        gso_size: size,
        csum_start: 54,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, frame)
}

/// What the checksum of `frame` must be in the end.
fn finished(header: VnetHeader, mut frame: Vec<u8>) -> Vec<u8> {
    let start = usize::from(header.csum_start);
    let csum = !sum(&frame[start..]);
    let csum = if csum == 0 { u16::MAX } else { csum };
    put(&mut frame, start + usize::from(header.csum_offset), csum);
    frame
}

/// The header of a packet socket for a frame whose checksum the kernel knows to be undone.
fn undone(start: u16, offset: u16) -> Vec<u8> {
    let [start, offset] = [start, offset].map(u16::to_le_bytes);
    [&[1, 0, 0, 0, 0, 0], &start[..], &offset[..]].concat()
}

fn send(queue: &mut XdpQueue, frames: &[(VnetHeader, Vec<u8>)]) -> Vec<Verdict> {
    let ram = GuestRam::for_test(&[(0, RAM)]);
    let bytes: Vec<_> = frames.iter().map(|(_, bytes)| bytes.clone()).collect();
    let mut burst = burst(&ram, &bytes, 700);
    for (frame, (header, _)) in burst.frames.iter_mut().zip(frames) {
        frame.header = *header;
    }
    transmit(queue, &mut burst)
}

fn counted(xdp: &Xdp) -> [u64; 3] {
    let one = &xdp.counters()[0];
    let all = [
        &one.offloaded_csum,
        &one.software_csum,
        &one.software_segments,
    ];
    all.map(|counter| counter.get())
}

/// Ours, by the last bytes of its sender's address.
fn is_ours(frame: &[u8]) -> bool {
    frame.get(6..12) == Some(&[2, 0, 0, 0, 0, 1])
}

fn lengths() -> Vec<usize> {
    let edges = [0, 1, 2, 3, 18, 19, 1470, 1471, 1472];
    (0..60).map(|i| i * 337 % 1473).chain(edges).collect()
}

/// As with any two interfaces of the kernel that are tied: whoever reads packets sees the checksum
/// undone and is told so, and a socket takes the datagram.
fn left_to_the_kernel(generic: bool) {
    let (xdp, mut queue) = csum_port(TxCsum::Offload, generic, 1500);
    ip("addr add 192.0.2.2/24 dev xb");
    let peer = PacketSocket::bind("xb");
    let socket = UdpSocket::bind("192.0.2.2:4661").unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    // Nobody knows of this one that it has no checksum yet: the socket refuses it.
    let (_, wrong) = datagram(5, 1);
    assert_eq!(
        send(&mut queue, &[(VnetHeader::PLAIN, wrong)]),
        [Verdict::Sent]
    );
    peer.receive_if(is_ours);
    for (number, len) in (0..).zip(lengths()) {
        let (header, frame) = datagram(len, number);
        let sent = send(&mut queue, &[(header, frame.clone())]);
        assert_eq!(sent, [Verdict::Sent]);
        let (told, got) = peer.receive_if(is_ours);
        assert!(got == frame, "{len} bytes differ");
        assert_eq!(told, undone(UDP, 6));
        let mut got = [0; 2048];
        let count = socket.recv(&mut got).unwrap();
        assert!(got[..count] == frame[HEADERS..], "{len} bytes differ");
    }
    assert_eq!(counted(&xdp), [lengths().len() as u64, 0, 0]);
    assert_eq!(xdp.statistics(), Default::default());
}

#[test]
fn a_checksum_that_is_left_to_the_kernel_stays_undone_on_a_cable_and_sockets_take_it() {
    in_private_netns(|| left_to_the_kernel(false));
}

#[test]
fn a_checksum_is_left_to_the_kernel_in_generic_mode_too() {
    in_private_netns(|| left_to_the_kernel(true));
}

/// A kernel's cable makes none, so we do, unless we are told otherwise.
#[test]
fn checksums_are_made_here_where_the_driver_does_not_announce_them() {
    for tx_csum in [TxCsum::Auto, TxCsum::Software] {
        in_private_netns(move || {
            let (xdp, mut queue) = csum_port(tx_csum, false, 1500);
            let peer = PacketSocket::bind("xb");
            for (number, len) in (0..).zip(lengths()) {
                let (header, frame) = datagram(len, number);
                let sent = send(&mut queue, &[(header, frame.clone())]);
                assert_eq!(sent, [Verdict::Sent]);
                let (told, got) = peer.receive_if(is_ours);
                assert!(got == finished(header, frame), "{len} bytes differ");
                assert_eq!(told, PLAIN);
            }
            assert_eq!(counted(&xdp), [0, lengths().len() as u64, 0]);
        });
    }
}

/// The next device that makes no checksums gets them from the kernel.
#[test]
fn a_checksum_that_is_left_to_the_kernel_is_made_where_the_frame_leaves_it() {
    in_private_netns(|| {
        let (_xdp, mut queue) = csum_port(TxCsum::Offload, false, 1500);
        ip("link add ya type veth peer name yb");
        ip("link add lan type bridge");
        for port in ["xb", "yb"] {
            ip(&format!("link set {port} master lan"));
        }
        for end in ["ya", "yb", "lan"] {
            ip(&format!("link set {end} up"));
        }
        let off = Command::new("ethtool")
            .args(["-K", "yb", "tx", "off"])
            .output();
        assert!(off.unwrap().status.success());
        let beyond = PacketSocket::bind("ya");
        for len in [1, 100, 1471, 1472] {
            let (header, frame) = datagram(len, 3);
            assert_eq!(
                send(&mut queue, &[(header, frame.clone())]),
                [Verdict::Sent]
            );
            let (told, got) = beyond.receive_if(is_ours);
            assert!(got == finished(header, frame), "{len} bytes differ");
            assert_eq!(told, PLAIN);
        }
    });
}

/// Why `auto` leaves none to a cable: an AF_XDP socket at its other end is not told.
#[test]
fn an_af_xdp_reader_finds_the_checksum_as_it_was_left() {
    for tx_csum in [TxCsum::Offload, TxCsum::Auto] {
        in_private_netns(move || {
            let (_xdp, mut queue) = csum_port(tx_csum, false, 1500);
            let far = Xdp::open("xb", 1, None).unwrap();
            far.set_receiving(0, true).unwrap();
            let mut reader = XdpQueue::take(&far).unwrap();
            let (header, frame) = datagram(100, 3);
            assert_eq!(
                send(&mut queue, &[(header, frame.clone())]),
                [Verdict::Sent]
            );
            let expected = match tx_csum {
                TxCsum::Offload => frame,
                _ => finished(header, frame),
            };
            let mut burst = FrameBurst::new();
            let start = Instant::now();
            loop {
                assert!(start.elapsed() < DEADLINE, "{tx_csum:?}: no frame");
                burst.clear();
                reader.receive(&mut burst);
                let payloads = burst.frames.iter().map(|frame| {
                    let mut bytes = vec![0; frame.bytes as usize];
                    copy::read(burst.payload(frame), 0, &mut bytes);
                    bytes
                });
                if let Some(got) = payloads.into_iter().find(|got| is_ours(got)) {
                    assert!(got == expected, "{tx_csum:?}");
                    break;
                }
                burst
                    .frames
                    .iter_mut()
                    .for_each(|frame| frame.verdict = Verdict::Sent);
                reader.complete(&mut burst);
                std::thread::yield_now();
            }
        });
    }
}

/// Segments get the sum of their own pseudo-header, which is what is missing in the end.
#[test]
fn segments_are_cut_here_and_their_checksums_left_to_the_kernel() {
    in_private_netns(|| {
        let (header, frame) = large(20_001, 1428);
        let mut all = Vec::new();
        for tx_csum in [TxCsum::Software, TxCsum::Offload] {
            let (xdp, mut queue) = csum_port(tx_csum, false, 1500);
            let peer = PacketSocket::bind("xb");
            assert_eq!(
                send(&mut queue, &[(header, frame.clone())]),
                [Verdict::Sent]
            );
            let segments: Vec<_> = (0..15)
                .map(|_| {
                    let (told, got) = peer.receive_if(is_ours);
                    if tx_csum == TxCsum::Software {
                        assert_eq!(told, PLAIN);
                        return got;
                    }
                    assert_eq!(told, undone(54, 16));
                    finished(header, got)
                })
                .collect();
            let left = if tx_csum == TxCsum::Software { 0 } else { 15 };
            assert_eq!(counted(&xdp), [left, 0, 15]);
            all.push(segments);
            drop((xdp, queue));
            ip("link del xa");
        }
        let payload: Vec<_> = all[0].iter().flat_map(|one| &one[74..]).collect();
        assert!(payload.into_iter().eq(&frame[74..]));
        assert!(all[0] == all[1]);
    });
}

/// Only the first of several chunks says that a checksum is missing; all have room to say it.
#[test]
fn a_frame_of_several_chunks_leaves_its_checksum_too() {
    in_private_netns(|| {
        let (xdp, mut queue) = csum_port(TxCsum::Offload, false, 9000);
        assert_eq!(xdp.frame_max(), 9022);
        let peer = PacketSocket::bind("xb");
        // Around one and two chunks of 1984 bytes.
        for len in [1941, 1942, 1943, 3926, 3927, 8971, 8972] {
            let (header, frame) = datagram(len, 5);
            let plain = (VnetHeader::PLAIN, super::frame(len, 1));
            let both = [(header, frame.clone()), plain.clone()];
            assert_eq!(send(&mut queue, &both), [Verdict::Sent; 2]);
            let (told, got) = peer.receive_if(is_ours);
            assert!(got == frame, "{len} bytes differ");
            assert_eq!(told, undone(UDP, 6));
            let (told, got) = peer.receive();
            assert!(got == plain.1, "{len} bytes differ");
            assert_eq!(told, PLAIN);
        }
        assert_eq!(counted(&xdp), [7, 0, 0]);
        assert_eq!(xdp.statistics(), Default::default());
    });
}

/// A checksum beyond the first chunk would hold the kernel up for good; others are not where each
/// interface looks for them.
#[test]
fn checksums_that_not_every_interface_finds_are_made_here() {
    in_private_netns(|| {
        let (xdp, mut queue) = csum_port(TxCsum::Offload, false, 9000);
        let peer = PacketSocket::bind("xb");
        let at = |start, offset| VnetHeader {
            flags: 1,
            csum_start: start,
            csum_offset: offset,
            ..VnetHeader::PLAIN
        };
        let (usual, whole) = datagram(4000, 1);
        let mut fragment = whole.clone();
        fragment[20] = 0x20;
        let mut options = whole.clone();
        options[12..14].copy_from_slice(&[0x86, 0xdd]);
        options[14] = 0x60;
        options[20] = 60;
        options[54..62].copy_from_slice(&[17, 0, 0, 0, 0, 0, 0, 0]);
        let cases = [
            (at(1982, 0), whole.clone()),
            (at(1983, 0), whole.clone()),
            (at(34, 1948), whole.clone()),
            (at(3000, 16), whole.clone()),
            (at(0, 12), whole.clone()),
            (at(34, 4), whole.clone()),
            (at(30, 10), whole.clone()),
            (at(62, 6), options),
            (usual, fragment),
        ];
        for (number, (header, frame)) in cases.iter().enumerate() {
            let sent = send(
                &mut queue,
                &[(*header, frame.clone()), (usual, whole.clone())],
            );
            assert_eq!(sent, [Verdict::Sent; 2]);
            let mut both: Vec<_> = (0..2)
                .map(|_| peer.receive_if(|got| !got.starts_with(&[0x33; 2])))
                .collect();
            // What the frame says of its sender may be part of the checksum's place.
            let (told, got) = both.remove(0);
            assert!(got == finished(*header, frame.clone()), "{number}");
            assert_eq!(told, PLAIN, "{number}");
            let (told, got) = both.remove(0);
            assert!(got == whole, "{number}: the next differs");
            assert_eq!(told, undone(UDP, 6), "{number}");
        }
        let all = cases.len() as u64;
        assert_eq!(counted(&xdp), [all, all, 0]);
        let out = at(u16::MAX, u16::MAX);
        let refused = [Verdict::Dropped(DropReason::BadVnetHeader)];
        assert_eq!(send(&mut queue, &[(out, whole)]), refused);
        assert_eq!(counted(&xdp)[OFFLOADED..=SOFTWARE], [all, all]);
        assert_eq!(counted(&xdp)[SEGMENTS], 0);
    });
}

/// A sender that wants its frames cut into the smallest pieces gets so many of them in a turn, and
/// the others in the next ones.
#[test]
fn tiny_segments_are_cut_in_turns() {
    in_private_netns(|| {
        let (xdp, mut queue) = csum_port(TxCsum::Software, false, 1500);
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let (header, bytes) = large(17_000, 20);
        let pieces = 17_000 / 20;
        let mut burst = burst(&ram, &vec![bytes; 32], 5000);
        for frame in &mut burst.frames {
            frame.header = header;
        }
        let (mut sent, mut turns) = (0, 0);
        while sent < burst.frames.len() {
            let verdicts = transmit(&mut queue, &mut burst);
            let now = decided(&burst.frames);
            assert!(verdicts[..now].iter().all(|v| *v == Verdict::Sent));
            assert!(verdicts[now..].iter().all(|v| *v == Verdict::Retry));
            assert_eq!(now - sent, PIECES_MAX / pieces);
            (sent, turns) = (now, turns + 1);
        }
        assert_eq!(turns, 16);
        assert_eq!(counted(&xdp), [0, 0, 32 * pieces as u64]);
    });
}
