//! Frames through a socket on one end of a cable, seen by a packet socket on the other.

use std::time::Instant;

use super::*;
use crate::memory::{Access, GuestRam};
use crate::sys::testnet::{DEADLINE, ETHERTYPE, PacketSocket, VNET_HEADER, in_private_netns, ip};
use crate::sys::xdp::XdpPlace;

mod csum;

const RAM: u64 = 1 << 20;
const PLAIN: [u8; VNET_HEADER] = [0; VNET_HEADER];

/// An Ethernet frame with `len` bytes of payload.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    let seed = seed.to_le_bytes();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, seed[1], seed[0]]);
    frame.extend(ETHERTYPE);
    frame.extend((0..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ seed[0]));
    frame
}

/// A burst with frames in guest memory, each cut into segments of `cut` bytes.
fn burst(ram: &GuestRam, frames: &[Vec<u8>], cut: usize) -> FrameBurst {
    let mut burst = FrameBurst::new();
    let mut gpa = 0;
    for bytes in frames {
        let first = burst.segments.len();
        for piece in bytes.chunks(cut) {
            let len = u32::try_from(piece.len()).unwrap();
            let at = burst.segments.len();
            ram.translate(gpa, len, Access::Write, &mut burst.segments)
                .unwrap();
            copy::write(&burst.segments.as_slice()[at..], 0, piece);
            gpa += u64::from(len) + 3;
        }
        burst.frames.push(Frame {
            header: VnetHeader::PLAIN,
            first: u32::try_from(first).unwrap(),
            count: u32::try_from(burst.segments.len() - first).unwrap(),
            bytes: u32::try_from(bytes.len()).unwrap(),
            verdict: Verdict::Retry,
            cast: Cast::Unicast,
        });
    }
    burst
}

/// A cable between `xa` and `xb`, both up.
fn cable(mtu: u16) {
    ip("link add xa type veth peer name xb");
    for end in ["xa", "xb"] {
        ip(&format!("link set {end} mtu {mtu} up"));
    }
}

/// The end of a cable that the port has, or an interface upon it without native XDP.
fn port(generic: bool, mtu: u16) -> (Xdp, XdpQueue) {
    port_polled(generic, mtu, 0)
}

fn port_polled(generic: bool, mtu: u16, busy_poll: u32) -> (Xdp, XdpQueue) {
    let place = XdpPlace {
        busy_poll,
        ..XdpPlace::default()
    };
    port_at(place, generic, mtu)
}

fn port_at(mut place: XdpPlace, generic: bool, mtu: u16) -> (Xdp, XdpQueue) {
    cable(mtu);
    let name = if generic {
        ip("link add link xa name mv type macvlan mode passthru");
        ip("link set mv up");
        "mv"
    } else {
        "xa"
    };
    place.interface = name.into();
    let xdp = Xdp::open_at(&place, 1, Some(mtu)).unwrap();
    xdp.set_receiving(0, true).unwrap();
    let queue = XdpQueue::take(&xdp).unwrap();
    (xdp, queue)
}

fn transmit(queue: &mut XdpQueue, burst: &mut FrameBurst) -> Vec<Verdict> {
    queue.transmit(&mut burst.frames, &burst.segments);
    queue.flush();
    burst.frames.iter().map(|frame| frame.verdict).collect()
}

/// Frames of ours in the next burst with any, all of them sent in the end.
fn receive(queue: &mut XdpQueue, burst: &mut FrameBurst) -> Vec<Vec<u8>> {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let frames = peek(queue, burst);
        burst
            .frames
            .iter_mut()
            .for_each(|frame| frame.verdict = Verdict::Sent);
        queue.complete(burst);
        if !frames.is_empty() {
            return frames;
        }
        std::thread::yield_now();
    }
    panic!("no frame within {DEADLINE:?}");
}

/// Frames of ours in a burst, which is not complete.
fn peek(queue: &mut XdpQueue, burst: &mut FrameBurst) -> Vec<Vec<u8>> {
    burst.clear();
    let count = queue.receive(burst);
    assert_eq!(burst.frames.len(), count);
    let mut frames = Vec::new();
    for frame in &burst.frames {
        assert_eq!(frame.header, VnetHeader::PLAIN);
        let mut bytes = vec![0; frame.bytes as usize];
        assert_eq!(copy::read(burst.payload(frame), 0, &mut bytes), bytes.len());
        if bytes[12..14] == ETHERTYPE {
            frames.push(bytes);
        }
    }
    frames
}

fn both_ways(generic: bool, busy_poll: u32) {
    let (xdp, mut queue) = port_polled(generic, 1500, busy_poll);
    let peer = PacketSocket::bind("xb");
    let ram = GuestRam::for_test(&[(0, RAM)]);
    // More frames than any ring has entries, in and out.
    let mut number = 0;
    let mut incoming = FrameBurst::new();
    for round in 0..90 {
        let sizes = [46, 47, 60, 200, 1000, 1499, 1500, 1504];
        let frames: Vec<_> = (0..64)
            .map(|at| frame(sizes[at % sizes.len()], number + at))
            .collect();
        number += frames.len();
        let cut = [1518, 700, 14, 12][round % 4];
        let mut burst = burst(&ram, &frames, cut);
        let verdicts = transmit(&mut queue, &mut burst);
        assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Sent));
        for sent in &frames {
            let (_, got) = peer.receive();
            assert!(got == *sent, "round {round}: {} bytes differ", sent.len());
        }
        for sent in frames.iter().filter(|frame| frame.len() <= 1514) {
            peer.send(&PLAIN, sent);
            let got = receive(&mut queue, &mut incoming);
            assert!(got == [sent.clone()], "round {round}: {} bytes", sent.len());
        }
    }
    assert!(!queue.is_sending());
    assert_eq!(xdp.statistics(), Default::default());
}

#[test]
fn frames_go_both_ways_byte_for_byte() {
    in_private_netns(|| both_ways(false, 0));
}

#[test]
fn frames_go_both_ways_in_generic_mode() {
    in_private_netns(|| both_ways(true, 0));
}

#[test]
fn frames_go_both_ways_through_a_socket_that_is_polled_busily() {
    in_private_netns(|| both_ways(false, 20));
}

#[test]
fn frames_of_9000_bytes_take_several_chunks() {
    in_private_netns(|| {
        let (xdp, mut queue) = port(false, 9000);
        assert_eq!(xdp.frame_max(), 9022);
        let peer = PacketSocket::bind("xb");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let mut incoming = FrameBurst::new();
        for (number, cut) in [9014, 4096, 1000, 333].into_iter().enumerate() {
            let frames: Vec<_> = [9000, 1792, 1793 - 14, 2048 - 14, 2049 - 14, 46, 4096 - 14]
                .into_iter()
                .map(|len| frame(len, number))
                .collect();
            let mut burst = burst(&ram, &frames, cut);
            let verdicts = transmit(&mut queue, &mut burst);
            assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Sent));
            for sent in &frames {
                let (_, got) = peer.receive();
                assert!(got == *sent, "{} bytes differ", sent.len());
                peer.send(&PLAIN, sent);
                let got = receive(&mut queue, &mut incoming);
                assert!(got == [sent.clone()], "{} bytes differ", sent.len());
            }
        }
    });
}

#[test]
fn what_the_guest_has_no_buffers_for_is_offered_again_and_thrown_away_with_the_guest() {
    in_private_netns(|| {
        let (_xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        let sent: Vec<_> = (0..8).map(|number| frame(100, number)).collect();
        for frame in &sent {
            peer.send(&PLAIN, frame);
        }
        let mut burst = FrameBurst::new();
        let start = Instant::now();
        // Others may be on the cable, too; ours are complete only when the last is there.
        while peek(&mut queue, &mut burst) != sent {
            queue.complete(&mut burst);
            assert!(start.elapsed() < DEADLINE, "not all frames came");
        }
        let all = burst.frames.len();
        burst.frames[0].verdict = Verdict::Sent;
        burst.frames[1].verdict = Verdict::Dropped(DropReason::RxTooSmall);
        queue.complete(&mut burst);
        assert!(queue.arm());
        peek(&mut queue, &mut burst);
        assert_eq!(burst.frames.len(), all - 2);
        burst.limit = 3;
        peek(&mut queue, &mut burst);
        assert_eq!(burst.frames.len(), 3);
        assert!(queue.discard_waiting() >= all - 2);
        assert_eq!(peek(&mut queue, &mut burst), Vec::<Vec<u8>>::new());
    });
}

#[test]
fn a_port_without_a_guest_takes_no_frames() {
    in_private_netns(|| {
        let (xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        let mut burst = FrameBurst::new();
        xdp.set_receiving(0, false).unwrap();
        peer.send(&PLAIN, &frame(100, 1));
        xdp.set_receiving(0, true).unwrap();
        peer.send(&PLAIN, &frame(100, 2));
        assert_eq!(receive(&mut queue, &mut burst), [frame(100, 2)]);
        // Twice is once.
        xdp.set_receiving(0, true).unwrap();
        xdp.set_receiving(0, false).unwrap();
        xdp.set_receiving(0, false).unwrap();
        xdp.set_receiving(1, true).unwrap();
    });
}

#[test]
fn frames_that_find_no_buffer_are_counted_by_the_kernel() {
    in_private_netns(|| {
        let (xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        // A buffer for each of the first 2048.
        for number in 0..2148 {
            peer.send(&PLAIN, &frame(46, number));
        }
        let start = Instant::now();
        while xdp.statistics().rx_dropped < 100 {
            assert!(start.elapsed() < DEADLINE, "{:?}", xdp.statistics());
            std::thread::yield_now();
        }
        let counted = xdp.statistics();
        assert_eq!(counted.fill_ring_empty, counted.rx_dropped);
        assert_eq!((counted.rx_ring_full, counted.tx_invalid), (0, 0));
        let mut burst = FrameBurst::new();
        let mut number = 0;
        while number < 1024 {
            for got in receive(&mut queue, &mut burst) {
                assert!(got == frame(46, number), "{number}");
                number += 1;
            }
        }
    });
}

#[test]
fn frames_that_can_not_be_sent_are_dropped_for_their_reason() {
    in_private_netns(|| {
        let (_xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let mut frames = vec![frame(100, 0); 6];
        frames[2] = frame(1509, 0);
        frames[3].truncate(13);
        let mut bad = burst(&ram, &frames, 2000);
        // A checksum past the end of the frame, and a segment without headers.
        bad.frames[0].header.flags = 1;
        bad.frames[0].header.csum_start = 5000;
        bad.frames[1].header.gso_type = 1;
        bad.frames[4].verdict = Verdict::Dropped(DropReason::BadChain);
        assert_eq!(
            transmit(&mut queue, &mut bad),
            [
                Verdict::Dropped(DropReason::BadVnetHeader),
                Verdict::Dropped(DropReason::BadVnetHeader),
                Verdict::Dropped(DropReason::TooBig),
                Verdict::Dropped(DropReason::BadFrame),
                Verdict::Dropped(DropReason::BadChain),
                Verdict::Sent,
            ]
        );
        assert_eq!(peer.receive().1, frames[5]);
    });
}

/// A checksum to be made in a frame without a whole Ethernet header makes no frame of it.
#[test]
fn a_frame_that_is_too_short_is_not_sent_whatever_it_asks_for() {
    in_private_netns(|| {
        let (_xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let whole = frame(46, 0);
        let mut frames = [2, 13, 14].map(|len| whole[..len].to_vec()).to_vec();
        frames.push(frame(100, 1));
        let mut short = burst(&ram, &frames, 2000);
        for frame in &mut short.frames[..3] {
            frame.header.flags = 1;
        }
        let verdicts = transmit(&mut queue, &mut short);
        let refused = Verdict::Dropped(DropReason::BadFrame);
        assert_eq!(verdicts[..2], [refused, refused]);
        assert_eq!(verdicts[2..], [Verdict::Sent, Verdict::Sent]);
        // Whoever is on the cable sees the whole header, and nothing before it.
        let (_, got) = peer.receive_if(|got| got.len() < 14 || !got.starts_with(&[0x33, 0x33]));
        assert_eq!(got.len(), 14);
        assert_eq!(peer.receive().1, frames[3]);
    });
}

/// A TCP segment that is to be cut into pieces of one byte.
fn crumbs(len: usize) -> (VnetHeader, Vec<u8>) {
    let mut bytes = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    let total = u16::try_from(40 + len).unwrap().to_be_bytes();
    bytes.extend([
        8, 0, 0x45, 0, total[0], total[1], 0, 9, 0x40, 0, 64, 6, 0, 0,
    ]);
    bytes.extend([192, 0, 2, 1, 192, 0, 2, 2]);
    bytes.extend([
        0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    bytes.resize(54 + len, 5);
    let header = VnetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 1,
        csum_start: 34,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, bytes)
}

/// What no ring can hold at once is refused for good, and without a look at every piece.
#[test]
fn a_frame_of_more_pieces_than_there_are_chunks_is_too_big() {
    in_private_netns(|| {
        let (_xdp, mut queue) = port(false, 1500);
        let peer = PacketSocket::bind("xb");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let (header, many) = crumbs(60_000);
        let (_, few) = crumbs(60);
        let last = frame(100, 0);
        let mut mixed = burst(&ram, &[many, few.clone(), last.clone()], 70_000);
        mixed.frames[0].header = header;
        mixed.frames[1].header = header;
        assert_eq!(
            transmit(&mut queue, &mut mixed),
            [
                Verdict::Dropped(DropReason::TooBig),
                Verdict::Sent,
                Verdict::Sent
            ]
        );
        for number in 0..60u32 {
            let (_, got) = peer.receive_if(|got| got.get(12..14) == Some(&[8, 0]));
            assert_eq!(got.len(), 55);
            assert_eq!(got[38..42], (1 + number).to_be_bytes());
        }
        assert_eq!(peer.receive().1, last);
    });
}

#[test]
fn an_interface_that_is_down_takes_what_fits_and_all_again_when_it_is_up() {
    in_private_netns(|| {
        let (_xdp, mut queue) = port(false, 1500);
        let ram = GuestRam::for_test(&[(0, RAM)]);
        ip("link set xa down");
        let frames: Vec<_> = (0..256).map(|number| frame(46, number)).collect();
        let mut full = Vec::new();
        for _ in 0..9 {
            let mut burst = burst(&ram, &frames, 2000);
            // Not flushed: nobody has noticed yet.
            queue.transmit(&mut burst.frames, &burst.segments);
            full = burst.frames.iter().map(|frame| frame.verdict).collect();
        }
        let mut wanted = vec![Verdict::Dropped(DropReason::HostError); 256];
        wanted[0] = Verdict::Dropped(DropReason::HostFull);
        assert_eq!(full, wanted);
        let mut one = burst(&ram, &frames[..1], 2000);
        let refused = [Verdict::Dropped(DropReason::HostError)];
        assert_eq!(transmit(&mut queue, &mut one), refused);
        assert!(!queue.is_sending());
        ip("link set xa up");
        // What waited goes first.
        queue.transmit(&mut [], &one.segments);
        assert!(!queue.is_sending());
        let peer = PacketSocket::bind("xb");
        let last = frame(1000, 0);
        let mut one = burst(&ram, core::slice::from_ref(&last), 2000);
        assert_eq!(transmit(&mut queue, &mut one), [Verdict::Sent]);
        let (_, got) = peer.receive_if(|frame| frame.len() == last.len());
        assert_eq!(got, last);
        ip("link del xa");
        let mut one = burst(&ram, &frames[..1], 2000);
        transmit(&mut queue, &mut one);
        let mut one = burst(&ram, &frames[..1], 2000);
        assert_eq!(transmit(&mut queue, &mut one), refused);
    });
}
