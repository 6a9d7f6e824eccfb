//! Frames whose checksum or segmentation is left to their receiver: headers that lie, and the MTU.

use super::*;

/// A frame to B with `header` from port 0, and what comes of it: the frame and its bytes.
fn sent(
    bench: &mut Bench,
    header: VnetHeader,
    bytes: &[u8],
) -> Result<(VnetHeader, Vec<u8>), DropReason> {
    let mut burst = burst(bench, &[bytes.to_vec()]);
    burst.frames[0].header = header;
    let FrameBurst {
        frames, segments, ..
    } = &mut burst;
    bench
        .switch
        .route(0, bench.now, frames, segments, &mut bench.ways);
    let frame = match (frames[0].verdict, bench.ways.whole) {
        (Verdict::Dropped(reason), _) => return Err(reason),
        (_, Some(_)) => frames[0],
        (..) => bench.ways.share(1)[0],
    };
    let mut got = vec![0; frame.bytes as usize];
    assert_eq!(copy::read(frame.payload(segments), 0, &mut got), got.len());
    Ok((frame.header, got))
}

/// A switch that knows B at port 1.
fn with_b(from: PortRules, mut to: PortRules) -> Bench {
    to.stations = vec![B];
    Bench::new(vec![from, to])
}

fn csum(start: usize, offset: usize) -> VnetHeader {
    VnetHeader {
        flags: 1,
        csum_start: u16::try_from(start).unwrap(),
        csum_offset: u16::try_from(offset).unwrap(),
        ..VnetHeader::PLAIN
    }
}

/// A checksum is written into what comes behind addresses, tag and type, or the frame is dropped:
/// its sender chooses what comes of it, and would choose the VLAN. None that goes along ends behind
/// the frame.
#[test]
fn no_checksum_is_written_into_what_was_looked_at_or_behind_the_frame() {
    let at_trunk = |native| trunk(&[10, 20], native);
    for (from, to, tag) in [
        (at_trunk(None), access(10), Some(10)),
        (at_trunk(Some(10)), access(10), None),
        (access(10), at_trunk(None), None),
        (access(10), at_trunk(None), Some(0)),
        (access(10), access(10), Some(0)),
        (access(10), access(10), None),
        (at_trunk(None), at_trunk(None), Some(10)),
        (at_trunk(Some(10)), at_trunk(Some(10)), None),
    ] {
        let first = if tag.is_some() { 18 } else { 14 };
        let mut bench = with_b(from, to);
        let bytes = ethernet(B, A, tag, 60);
        for start in (0..40).chain([bytes.len() - 2]) {
            for offset in [0, bytes.len() - 2 - start] {
                let got = sent(&mut bench, csum(start, offset), &bytes);
                if start < first {
                    assert_eq!(got, Err(DropReason::BadVnetHeader), "{start} {tag:?}");
                    continue;
                }
                let (header, got) = got.unwrap();
                let (new, at) = (usize::from(header.csum_start), start + offset);
                assert_eq!(usize::from(header.csum_offset), offset);
                assert_eq!(got[new + offset..][..2], bytes[at..at + 2]);
                assert_eq!(got[new..], bytes[start..], "{start} {tag:?}");
            }
        }
        // Without a checksum to be made nothing is asked.
        sent(&mut bench, VnetHeader::PLAIN, &bytes).unwrap();
    }
}

#[test]
fn a_checksum_that_a_tag_would_move_beyond_what_can_be_said_is_refused() {
    let mut bench = with_b(access(10), trunk(&[10], None));
    let bytes = ethernet(B, A, None, 65_600);
    let most = usize::from(u16::MAX) - TAG;
    let (header, _) = sent(&mut bench, csum(most, 2), &bytes).unwrap();
    assert_eq!(header.csum_start, u16::MAX);
    let refused = sent(&mut bench, csum(most + 1, 2), &bytes);
    assert_eq!(refused.unwrap_err(), DropReason::BadVnetHeader);
}

const MSS: u16 = 1448;

/// A TCP segment of IPv4 with `options` bytes of options in its TCP header, whose segmentation is
/// left to the receiver.
fn tso(tag: Option<u16>, options: usize, payload: usize, mss: u16) -> (VnetHeader, Vec<u8>) {
    let mut bytes = ethernet(B, A, tag, 0);
    let l4 = bytes.len() + 20;
    let total = u16::try_from(40 + options + payload).unwrap().to_be_bytes();
    bytes.extend([0x45, 0, total[0], total[1], 0, 9, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend([192, 0, 2, 1, 192, 0, 2, 2]);
    let words = u8::try_from(5 + options / 4).unwrap();
    bytes.extend([0x12, 0x34, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2]);
    bytes.extend([words << 4, 0x18, 1, 0, 0, 0, 0, 0]);
    bytes.extend(vec![1; options]);
    bytes.extend((0..payload).map(|at| (at * 7).to_le_bytes()[0]));
    let header = VnetHeader {
        gso_type: 1,
        gso_size: mss,
        hdr_len: u16::try_from(l4 + 20 + options).unwrap(),
        ..csum(l4, 16)
    };
    (header, bytes)
}

/// An access or trunk port with an MTU of 1500, where B is.
fn narrow(mode: PortRules) -> PortRules {
    PortRules {
        mtu: Some(1500),
        ..mode
    }
}

/// Of a frame that is still to be segmented the segments count, each with its headers.
#[test]
fn no_segment_is_longer_than_the_mtu_of_a_port() {
    for (from, to, tag) in [
        (access(1), access(1), None),
        (trunk(&[7], None), access(7), Some(7)),
        (access(7), trunk(&[7], None), None),
        (trunk(&[7], None), trunk(&[7], None), Some(7)),
        (access(7), access(7), Some(0)),
    ] {
        let mut bench = with_b(from, narrow(to));
        for (options, mss, fits) in [
            (0, 1460, true),
            (0, 1461, false),
            (12, 1448, true),
            (12, 1449, false),
            (40, 1420, true),
            (40, 1421, false),
            (0, 8948, false),
            (0, u16::MAX, false),
            (0, 1, true),
        ] {
            let (header, bytes) = tso(tag, options, 20_000, mss);
            let got = sent(&mut bench, header, &bytes);
            let what = format!("{tag:?} {options} {mss}");
            if !fits {
                assert_eq!(got.unwrap_err(), DropReason::Mtu, "{what}");
                continue;
            }
            let (got, payload) = got.unwrap();
            assert_eq!((got.gso_type, got.gso_size), (1, mss), "{what}");
            assert!(payload.ends_with(&bytes[18..]), "{what}");
        }
        // It fits whole, whatever is said of segments.
        let (header, bytes) = tso(tag, 0, 1460, u16::MAX);
        sent(&mut bench, header, &bytes).unwrap();
        let (header, bytes) = tso(tag, 0, 1461, u16::MAX);
        let got = sent(&mut bench, header, &bytes).map(drop);
        assert_eq!(got, Err(DropReason::Mtu));
    }
}

/// UDP and IPv6 have other headers.
#[test]
fn the_headers_of_a_segment_are_those_that_it_has() {
    let mut bench = with_b(access(1), narrow(access(1)));
    let mut bytes = ethernet(B, A, None, 0);
    bytes[12..].copy_from_slice(&[0x86, 0xdd]);
    bytes.extend([0x60, 0, 0, 0, 0, 8, 17, 64]);
    bytes.extend([0xfd; 32]);
    bytes.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    bytes.extend([5; 9000]);
    for (size, answer) in [(1452, Ok(())), (1453, Err(DropReason::Mtu))] {
        let header = VnetHeader {
            gso_type: 5,
            gso_size: size,
            ..csum(54, 6)
        };
        let got = sent(&mut bench, header, &bytes).map(drop);
        assert_eq!(got, answer, "{size}");
    }
}

/// Where nobody can say how long the segments will be, the frame counts as it is.
#[test]
fn headers_that_lie_about_segments_help_nobody_past_the_mtu() {
    let mut bench = with_b(access(1), narrow(access(1)));
    let (good, bytes) = tso(None, 0, 20_000, MSS);
    sent(&mut bench, good, &bytes).unwrap();
    let wrong = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        bytes
    };
    for (what, header, bytes) in [
        (
            "another type",
            VnetHeader {
                gso_type: 4,
                ..good
            },
            bytes.clone(),
        ),
        (
            "another start",
            VnetHeader {
                csum_start: 30,
                ..good
            },
            bytes.clone(),
        ),
        ("a protocol that is not TCP", good, wrong(23, 50)),
        ("no IP", good, wrong(12, 0x99)),
        ("a TCP header of no length", good, wrong(46, 0)),
    ] {
        let got = sent(&mut bench, header, &bytes).map(drop);
        assert_eq!(got, Err(DropReason::Mtu), "{what}");
    }
}

/// A sender that makes its headers longer after they were looked at changes nothing.
#[test]
fn the_headers_that_were_measured_are_those_that_are_given() {
    for (from, to, tag) in [
        (access(1), access(1), None),
        (trunk(&[7], None), access(7), Some(7)),
    ] {
        let mut bench = with_b(from, narrow(to));
        let (header, bytes) = tso(tag, 12, 20_000, MSS);
        let mut burst = burst(&bench, std::slice::from_ref(&bytes));
        burst.frames[0].header = header;
        let FrameBurst {
            frames, segments, ..
        } = &mut burst;
        bench.switch.route(0, 1, frames, segments, &mut bench.ways);
        let mut there = Segments::with_capacity(1);
        let ram = &bench.ram;
        ram.translate(0, 100, Access::Write, &mut there).unwrap();
        copy::write(there.as_slice(), 18, &[0xff; 30]);
        let share = bench.ways.share(1);
        let frame = share.first().copied().unwrap_or(burst.frames[0]);
        let mut got = vec![0; frame.bytes as usize];
        copy::read(frame.payload(&burst.segments), 0, &mut got);
        let start = usize::from(frame.header.csum_start);
        assert!(got[start - 20..] == bytes[usize::from(header.csum_start) - 20..]);
    }
}

/// A flood reaches the ports with an MTU and the others, whichever comes first.
#[test]
fn a_flood_of_segments_reaches_the_ports_that_they_fit() {
    let ports = [
        access(7),
        access(7),
        narrow(access(7)),
        trunk(&[7], None),
        narrow(trunk(&[7], None)),
    ];
    for (mss, wanted) in [(MSS, &[1, 2, 3, 4][..]), (1461, &[1, 3])] {
        let mut bench = Bench::new(ports.to_vec());
        let (header, bytes) = tso(None, 0, 20_000, mss);
        let mut burst = burst(&bench, std::slice::from_ref(&bytes));
        burst.frames[0].header = header;
        let FrameBurst {
            frames, segments, ..
        } = &mut burst;
        bench.switch.route(0, 1, frames, segments, &mut bench.ways);
        let got = given(&mut bench, &burst);
        let to: Vec<_> = got.iter().map(|(port, _)| *port).collect();
        assert_eq!(to, wanted, "{mss}");
        for (port, got) in got {
            let tag = usize::from(matches!(port, 3 | 4)) * TAG;
            assert!(got[12 + tag..] == bytes[12..], "port {port}");
        }
    }
}
