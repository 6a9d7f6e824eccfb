//! Frames through a tap of the running kernel, seen by a packet socket on the same interface.

use std::sync::Arc;
use std::time::Instant;

use super::super::net::{Cast, Frame, VnetHeader};
use super::*;
use crate::host::net::FrameBurst;
use crate::memory::{Access, GuestRam, Segments, copy};
use crate::sys::tap::{TapPlace, TapSource};
use crate::sys::testnet::{DEADLINE, ETHERTYPE, PacketSocket, in_private_netns, ip};
use crate::testing::packets::{ACK, CWR, ECE, FIN, PSH, Packet};

const VERSION_1: u64 = 1 << 32;
const CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const RAM: u64 = 1 << 20;

/// An Ethernet frame with `len` bytes of payload.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, seed]);
    frame.extend(ETHERTYPE);
    frame.extend((0..len).map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ seed));
    frame
}

/// An Ethernet frame with an IPv4 packet that holds a TCP segment of `len` bytes, checksum undone.
fn tcp_frame(len: usize) -> (VnetHeader, Vec<u8>) {
    let total = u16::try_from(40 + len).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let checksum = checksum(&ip, 0);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut tcp = vec![
        0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];
    // The checksum field holds that of the pseudo header, not inverted.
    let pseudo = [&ip[12..20], &[0, 6], &(total - 20).to_be_bytes()].concat();
    let start = !self::checksum(&pseudo, 0);
    tcp[16..18].copy_from_slice(&start.to_be_bytes());
    tcp.extend((0..len).map(|i| (i * 5 + i / 253).to_le_bytes()[0]));
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend(ip);
    frame.extend(tcp);
    let header = VnetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    (header, frame)
}

/// RFC 1071, with `start` added.
fn checksum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |&b| b.into()));
    let mut sum = words.sum::<u32>() + start;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A burst with frames in guest memory, each cut into segments of `cut` bytes.
fn burst(ram: &GuestRam, frames: &[(VnetHeader, &[u8])], cut: usize) -> FrameBurst {
    let mut burst = FrameBurst::new();
    let mut gpa = 0;
    for (header, bytes) in frames {
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
            header: *header,
            first: u32::try_from(first).unwrap(),
            count: u32::try_from(burst.segments.len() - first).unwrap(),
            bytes: u32::try_from(bytes.len()).unwrap(),
            verdict: Verdict::Retry,
            cast: Cast::Unicast,
        });
    }
    burst
}

/// Guest memory to read into, in segments of `cut` bytes.
fn window(ram: &Arc<GuestRam>, bytes: u64, cut: u64) -> Segments {
    let mut segments = Segments::with_capacity(1024);
    for at in 0..bytes / cut {
        let len = u32::try_from(cut).unwrap();
        ram.translate(at * (cut + 5), len, Access::Write, &mut segments)
            .unwrap();
    }
    segments
}

/// The next frame of `queue` that `wanted` says yes to: header and frame.
fn read_if(
    queue: &mut TapQueue,
    window: &Segments,
    wanted: impl Fn(&[u8]) -> bool,
) -> (VnetHeader, Vec<u8>) {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let Some(bytes) = queue.read_frame(window.as_slice()).unwrap() else {
            std::thread::yield_now();
            continue;
        };
        let mut frame = vec![0; bytes];
        copy::read(window.as_slice(), 0, &mut frame);
        if wanted(&frame[12..]) {
            let header = VnetHeader::decode(&frame[..12].try_into().unwrap());
            return (header, frame.split_off(12));
        }
    }
    panic!("no frame within {DEADLINE:?}");
}

fn ours(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&ETHERTYPE)
}

fn is_tcp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&6)
}

#[test]
fn frames_reach_the_kernel_byte_exact_from_any_segments() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let plain = VnetHeader::default();
        for cut in [1, 13, 700, 2000] {
            let (small, large) = (frame(46, 1), frame(900, 2));
            let mut burst = burst(&ram, &[(plain, &small), (plain, &large)], cut);
            // A frame that is dropped already must not travel.
            let dropped = Verdict::Dropped(DropReason::BadChain);
            burst.frames.insert(
                1,
                Frame {
                    verdict: dropped,
                    ..burst.frames[0]
                },
            );
            queue.transmit(&mut burst.frames, &burst.segments);
            queue.flush();
            let verdicts: Vec<_> = burst.frames.iter().map(|frame| frame.verdict).collect();
            assert_eq!(verdicts, [Verdict::Sent, dropped, Verdict::Sent]);
            assert_eq!(packets.receive().1, small);
            assert_eq!(packets.receive().1, large);
        }
        assert!(!queue.take_guest_fault());
    });
}

#[test]
fn a_tso_frame_reaches_the_kernel_whole_with_its_header() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let (header, bytes) = tcp_frame(20_000);
        let mut burst = burst(&ram, &[(header, &bytes)], 4096);
        queue.transmit(&mut burst.frames, &burst.segments);
        assert_eq!(burst.frames[0].verdict, Verdict::Sent);
        let (seen, got) = packets.receive_if(is_tcp);
        assert_eq!(got, bytes);
        assert_eq!(seen[..2], [1, 1], "flags and GSO type");
        assert_eq!(
            seen[4..10],
            header.encode()[4..10],
            "GSO size and place of the checksum"
        );
    });
}

#[test]
fn frames_of_the_kernel_are_read_byte_exact_into_any_segments() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        for cut in [7, 100, 2048] {
            let window = window(&ram, 2048, cut);
            for len in [46, 300, 1500] {
                packets.send(&[0; 10], &frame(len, 3));
                let (header, got) = read_if(&mut queue, &window, ours);
                assert_eq!(got, frame(len, 3));
                assert_eq!(header.gso_type, 0);
                assert_eq!(header.flags & 1, 0);
            }
        }
        assert_eq!(
            queue
                .read_frame(window(&ram, 2048, 2048).as_slice())
                .unwrap(),
            None
        );
    });
}

#[test]
fn the_kernel_does_what_the_driver_did_not_acknowledge() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let window = window(&ram, 70_000, 10_000);
        let (header, bytes) = tcp_frame(3500);
        let vnet: [u8; 10] = header.encode()[..10].try_into().unwrap();

        follow_features(&tap, VERSION_1 | CSUM | TSO4).unwrap();
        packets.send(&vnet, &bytes);
        let (seen, got) = read_if(&mut queue, &window, is_tcp);
        assert_eq!(got, bytes);
        let seen = VnetHeader {
            num_buffers: 0,
            hdr_len: header.hdr_len,
            ..seen
        };
        assert_eq!(seen, header);

        follow_features(&tap, VERSION_1).unwrap();
        packets.send(&vnet, &bytes);
        let mut payload = Vec::new();
        for _ in 0..4 {
            let (seen, got) = read_if(&mut queue, &window, is_tcp);
            assert_eq!((seen.flags & 1, seen.gso_type), (0, 0));
            let tcp = &got[34..];
            let pseudo = u32::from(!checksum(&got[26..34], 6));
            let sum = checksum(tcp, pseudo + u32::try_from(tcp.len()).unwrap());
            assert_eq!(sum, 0, "the TCP checksum of a segment");
            payload.extend_from_slice(&tcp[20..]);
        }
        assert_eq!(payload, bytes[54..]);
    });
}

#[test]
fn every_attached_queue_sends_and_a_detached_one_gets_nothing() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 2, None).unwrap();
        let mut queues = [
            TapQueue::new(&tap, 0).unwrap(),
            TapQueue::new(&tap, 1).unwrap(),
        ];
        assert!(TapQueue::new(&tap, 2).is_none());
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        for (seed, queue) in (1..).zip(&mut queues) {
            let bytes = frame(100, seed);
            let mut burst = burst(&ram, &[(VnetHeader::default(), &bytes)], 64);
            queue.transmit(&mut burst.frames, &burst.segments);
            assert_eq!(packets.receive().1, bytes);
        }
        tap.set_attached(1, false).unwrap();
        let window = window(&ram, 2048, 2048);
        for seed in 0..32 {
            packets.send(&[0; 10], &frame(100, seed));
        }
        for seed in 0..32 {
            assert_eq!(read_if(&mut queues[0], &window, ours).1, frame(100, seed));
        }
    });
}

#[test]
fn frames_that_the_kernel_refuses_are_dropped_and_the_next_goes_on() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let (good, short) = (frame(100, 1), [0; 5]);
        let many = frame(2100, 2);
        let plain = VnetHeader::default();
        let mut burst = burst(&ram, &[(plain, &short), (plain, &many), (plain, &good)], 1);
        queue.transmit(&mut burst.frames, &burst.segments);
        let verdicts: Vec<_> = burst.frames.iter().map(|frame| frame.verdict).collect();
        let error = Verdict::Dropped(DropReason::HostError);
        assert_eq!(
            verdicts,
            [error, Verdict::Dropped(DropReason::TooBig), Verdict::Sent]
        );
        assert_eq!(packets.receive().1, good);
        assert!(!queue.take_guest_fault());
    });
}

#[test]
fn an_interface_that_is_down_drops_and_one_that_is_gone_is_an_error() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let window = window(&ram, 2048, 2048);
        let bytes = frame(100, 1);
        let send = |queue: &mut TapQueue| {
            let mut burst = burst(&ram, &[(VnetHeader::default(), &bytes)], 64);
            queue.transmit(&mut burst.frames, &burst.segments);
            burst.frames[0].verdict
        };
        ip("link set t0 down");
        assert_eq!(send(&mut queue), Verdict::Dropped(DropReason::HostError));
        queue.discard_waiting();
        assert_eq!(queue.read_frame(window.as_slice()).unwrap(), None);
        ip("link set t0 up");
        assert_eq!(send(&mut queue), Verdict::Sent);
        ip("link delete t0");
        assert_eq!(send(&mut queue), Verdict::Dropped(DropReason::HostError));
        queue.read_frame(window.as_slice()).unwrap_err();
    });
}

#[test]
fn memory_that_went_away_is_the_senders_fault() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        // Longer than what is copied before it is written: the kernel reads it from there.
        let bytes = frame(3000, 1);
        let mut burst = burst(&ram, &[(VnetHeader::default(), &bytes)], 64);
        // The front-end shrinks the file behind the guest's memory.
        ram.specs()[0].file.set_len(0).unwrap();
        queue.transmit(&mut burst.frames, &burst.segments);
        assert_eq!(
            burst.frames[0].verdict,
            Verdict::Dropped(DropReason::HostError)
        );
        assert!(queue.take_guest_fault());
        assert!(!queue.take_guest_fault());
        packets.send(&[0; 10], &frame(100, 1));
        let window = &burst.segments;
        let start = Instant::now();
        let error = loop {
            match queue.read_frame(window.as_slice()) {
                Ok(None) => assert!(start.elapsed() < DEADLINE, "no frame"),
                Ok(Some(_)) => panic!("read into memory that is gone"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.raw_os_error(), Some(14));
    });
}

#[test]
fn waiting_frames_are_thrown_away() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        for seed in 0..10 {
            packets.send(&[0; 10], &frame(1000, seed));
        }
        assert!(queue.discard_waiting() >= 10);
        packets.send(&[0; 10], &frame(100, 42));
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let window = window(&ram, 2048, 2048);
        assert_eq!(read_if(&mut queue, &window, ours).1, frame(100, 42));
    });
}

#[test]
fn a_macvtap_takes_and_gives_frames_like_a_tap() {
    in_private_netns(|| {
        // /dev has one device for each number, whatever the namespace.
        let index = 3_000_000 + std::process::id() % 1_000_000;
        ip("link add v0 type veth peer name v1");
        ip(&format!(
            "link add link v0 name mv0 address 02:00:00:00:00:09 index {index} type macvtap mode \
             bridge"
        ));
        for interface in ["v0", "v1", "mv0"] {
            ip(&format!("link set {interface} up"));
        }
        let place = TapPlace {
            persist: false,
            source: TapSource::Macvtap("mv0".to_owned()),
            netns: None,
        };
        let tap = Tap::open_at(&place, 1, None).unwrap();
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let window = window(&ram, 70_000, 3500);
        let packets = PacketSocket::bind("v1");
        for features in [VERSION_1, VERSION_1 | CSUM | TSO4] {
            follow_features(&tap, features).unwrap();
            let mut queue = TapQueue::new(&tap, 0).unwrap();
            let out = frame(700, 1);
            let (header, large) = tcp_frame(20_000);
            let frames: [(VnetHeader, &[u8]); 2] =
                [(VnetHeader::default(), &out), (header, &large)];
            let mut burst = burst(&ram, &frames, 900);
            queue.transmit(&mut burst.frames, &burst.segments);
            assert!(burst.frames.iter().all(|f| f.verdict == Verdict::Sent));
            assert_eq!(packets.receive().1, out);
            assert_eq!(packets.receive_if(is_tcp).1, large);
            let back = frame(1100, 2);
            packets.send(&[0; 10], &back);
            let (header, got) = read_if(&mut queue, &window, ours);
            assert_eq!(got, back);
            assert_eq!((header.flags & 1, header.gso_type), (0, 0));
        }
    });
}

#[test]
fn a_kernel_that_cuts_udp_takes_and_gives_it_whole() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        if !tap.supports_uso() {
            eprintln!("this kernel does not cut UDP frames (Linux 6.2): nothing to see");
            return;
        }
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let packet = Packet::new(false, true, 9000);
        let header = VnetHeader::decode(&packet.vnet(1000, false));
        let bytes = packet.unfinished();
        let mut burst = burst(&ram, &[(header, &bytes)], 4096);
        queue.transmit(&mut burst.frames, &burst.segments);
        assert_eq!(burst.frames[0].verdict, Verdict::Sent);
        let is_udp = |frame: &[u8]| frame.get(23) == Some(&17) && frame.len() > 1000;
        let (seen, got) = packets.receive_if(is_udp);
        assert_eq!(got, bytes);
        assert_eq!(seen[..2], [1, 5], "flags and GSO type");

        let window = window(&ram, 70_000, 3500);
        let uso = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        let vnet: [u8; 10] = packet.vnet(1000, false)[..10].try_into().unwrap();
        follow_features(&tap, VERSION_1 | CSUM | uso).unwrap();
        packets.send(&vnet, &bytes);
        let (header, got) = read_if(&mut queue, &window, is_udp);
        assert_eq!((header.gso_type, header.gso_size), (5, 1000));
        assert_eq!(got, bytes);
    });
}

/// The model that our own offloads are held to, held to the kernel.
#[test]
fn the_kernel_cuts_frames_as_the_model_says() {
    in_private_netns(|| {
        let tap = Tap::open("t0", 1, None).unwrap();
        let mut queue = TapQueue::new(&tap, 0).unwrap();
        let packets = PacketSocket::bind("t0");
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let window = window(&ram, 70_000, 3500);
        follow_features(&tap, VERSION_1).unwrap();
        let uso = tap.supports_uso();
        for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
            if udp && !uso {
                continue;
            }
            for bytes in [0, 900, 1001, 9000] {
                let mut packet = Packet::new(v6, udp, bytes);
                (packet.flags, packet.tcp_options) = (ACK | PSH | FIN, 3);
                for (size, ecn) in [(0, false), (1000, false), (1000, true)] {
                    let too_long = size == 0 && bytes > 1400;
                    if bytes <= usize::from(size) || too_long || (ecn && udp) {
                        continue;
                    }
                    packet.flags |= if ecn { CWR | ECE } else { 0 };
                    let vnet: [u8; 10] = packet.vnet(size, ecn)[..10].try_into().unwrap();
                    packets.send(&vnet, &packet.unfinished());
                    let kind = if v6 { [0x86, 0xdd] } else { [8, 0] };
                    let ours = |frame: &[u8]| {
                        frame.get(12..14) == Some(&kind) && frame[..6] == packet.whole()[..6]
                    };
                    let wanted = match size {
                        0 => vec![packet.whole()],
                        size => packet.cut(size.into()),
                    };
                    for wanted in wanted {
                        let got = read_if(&mut queue, &window, ours).1;
                        assert!(got == wanted, "v6 {v6}, udp {udp}, {bytes}, {size}, {ecn}");
                    }
                }
            }
        }
    });
}
