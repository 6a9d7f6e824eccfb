//! Offloads that the sender uses and the receiver did not acknowledge: what arrives is what a model
//! says that must, byte for byte.

use proptest::prelude::*;

use super::super::feature;
use super::wire::Wire;
use crate::host::net::{DropReason, Verdict, VnetHeader};
use crate::host::offload::PIECES_MAX;
use crate::ring::ChainQueue;
use crate::testing::packets::{ACK, CWR, ECE, FIN, PSH, Packet, receive};

const SENT: Verdict = Verdict::Sent;
const SENDER: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO;
/// What a receiver may acknowledge, and what goes with it.
const RECEIVERS: [u64; 8] = [
    0,
    feature::GUEST_CSUM,
    feature::GUEST_CSUM | feature::GUEST_TSO4,
    feature::GUEST_CSUM | feature::GUEST_TSO6,
    feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_ECN,
    feature::GUEST_CSUM | feature::GUEST_USO4,
    feature::GUEST_CSUM | feature::GUEST_USO4 | feature::GUEST_USO6,
    feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN,
];

impl Wire {
    /// One burst that is delivered or dropped whole; the verdicts.
    fn turn_whole(&mut self) -> Vec<Verdict> {
        let verdicts = self.turn();
        assert_eq!((self.from.in_flight(), self.to.in_flight()), (0, 0));
        verdicts
    }

    /// The frames received since used chain `first`, each with its header.
    fn frames(&self, mut first: usize) -> Vec<([u8; 12], Vec<u8>)> {
        let mut out = Vec::new();
        while first < self.to.used.len() {
            let header: [u8; 12] = self
                .to
                .written(self.to.used[first].id, 12)
                .try_into()
                .unwrap();
            let count = usize::from(VnetHeader::decode(&header).num_buffers);
            let chains = &self.to.used[first..first + count];
            let one = |used: &super::script::Used| self.to.written(used.id, used.written as usize);
            let bytes: Vec<u8> = chains.iter().flat_map(one).collect();
            out.push((header, bytes[12..].to_vec()));
            first += count;
        }
        out
    }
}

const PLAIN: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// A frame that asks for something: the packet, its segments' size (0: a checksum alone), ECN.
struct Case {
    packet: Packet,
    size: u16,
    ecn: bool,
    /// What the sender needs for it, and the receiver.
    sender: u64,
    receiver: u64,
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        let csum = Case {
            packet: Packet::new(v6, udp, 901),
            size: 0,
            ecn: false,
            sender: feature::CSUM,
            receiver: feature::GUEST_CSUM,
        };
        let (host, guest) = match (udp, v6) {
            (true, _) => (feature::HOST_USO, feature::GUEST_USO4 | feature::GUEST_USO6),
            (_, false) => (feature::HOST_TSO4, feature::GUEST_TSO4),
            (_, true) => (feature::HOST_TSO6, feature::GUEST_TSO6),
        };
        let gso = |packet: Packet, size| Case {
            packet,
            size,
            ecn: false,
            sender: feature::CSUM | host,
            receiver: feature::GUEST_CSUM | guest,
        };
        out.push(csum);
        out.push(gso(Packet::new(v6, udp, 5000), 1400));
        let mut ended = Packet::new(v6, udp, 2801);
        (ended.flags, ended.ip_options, ended.tcp_options) = (ACK | FIN | PSH, 2, 3);
        out.push(gso(ended, 1400));
        if !udp {
            let mut ecn = Packet::new(v6, udp, 4200);
            ecn.flags = ACK | CWR | ECE | PSH;
            let mut case = gso(ecn, 1400);
            case.ecn = true;
            case.sender |= feature::HOST_ECN;
            case.receiver |= feature::GUEST_ECN;
            out.push(case);
        }
    }
    out
}

#[test]
fn every_offload_of_a_sender_meets_every_receiver() {
    let (mut asked, mut completed) = (0, 0);
    for case in cases() {
        // A sender may use what it acknowledged; all of it, or just enough.
        for sender in [case.sender, SENDER] {
            for (mergeable, receiver) in RECEIVERS
                .map(|r| [(false, r), (true, r | feature::MRG_RXBUF)])
                .concat()
            {
                let mut wire = Wire::new(64, sender, receiver);
                (0..64).for_each(|_| {
                    let lens: &[u32] = if mergeable { &[12, 700] } else { &[12, 6000] };
                    wire.to.offer_rx(lens);
                });
                let vnet = case.packet.vnet(case.size, case.ecn);
                wire.send(vnet, &case.packet.unfinished(), &[5, 40, 99]);
                assert_eq!(wire.turn_whole(), [SENT]);
                let got = wire.frames(0);
                let whole = receiver & case.receiver == case.receiver;
                let (wanted, segments) = match (whole, case.size) {
                    (true, _) => (vec![case.packet.unfinished()], 0),
                    (false, 0) => (vec![case.packet.whole()], 0),
                    (false, size) => {
                        let all = case.packet.cut(usize::from(size));
                        let count = all.len() as u64;
                        (all, count)
                    }
                };
                let frames: Vec<_> = got.iter().map(|(_, frame)| frame.clone()).collect();
                assert!(frames == wanted, "{case:?} to {receiver:#x}");
                for (header, frame) in &got {
                    let asks = if whole { &vnet[..10] } else { &PLAIN[..10] };
                    assert_eq!(header[..10], *asks);
                    if !whole {
                        receive(frame);
                    }
                }
                if !whole {
                    let carried: Vec<u8> = frames.iter().flat_map(|f| receive(f)).collect();
                    assert_eq!(carried, case.packet.payload);
                    completed += 1;
                }
                let counted = &wire.counters.rx;
                assert_eq!(counted.software_segments(), segments);
                let csum = u64::from(!whole && case.size == 0);
                assert_eq!(counted.software_csum(), csum);
                assert_eq!(counted.frames(), wanted.len() as u64);
                let bytes: usize = wanted.iter().map(Vec::len).sum();
                assert_eq!(counted.bytes(), bytes as u64);
                asked += 1;
            }
        }
    }
    // Both kinds of ends were met.
    assert!(
        completed > 100 && asked - completed > 50,
        "{completed} of {asked}"
    );
}

impl core::fmt::Debug for Case {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Packet { v6, udp, .. } = self.packet;
        write!(
            f,
            "v6 {v6}, udp {udp}, size {}, ecn {}",
            self.size, self.ecn
        )
    }
}

proptest! {
    #[test]
    fn any_packet_is_cut_as_the_model_does_over_any_cuts_of_both_sides(
        (v6, udp) in any::<(bool, bool)>(),
        (bytes, size) in (0usize..9000, 100u16..3000),
        tags in proptest::collection::vec(any::<u16>(), 0..3),
        (ip_options, tcp_options) in (0u8..11, 0u8..11),
        (id, seq, flags) in any::<(u16, u32, u8)>(),
        cuts in proptest::collection::vec(any::<usize>(), 0..5),
        buffers in proptest::collection::vec(0u32..900, 1..4),
        fill in any::<u8>(),
    ) {
        let mut packet = Packet::new(v6, udp, bytes);
        packet.payload.iter_mut().for_each(|byte| *byte ^= fill);
        // Without SYN.
        (packet.tags, packet.id, packet.seq, packet.flags) = (tags, id, seq, flags & !2);
        (packet.ip_options, packet.tcp_options) = (ip_options, tcp_options);
        let mut wire = Wire::new(1024, SENDER, feature::MRG_RXBUF);
        (0..1024).for_each(|_| {
            let mut lens = buffers.clone();
            lens[0] += 12;
            wire.to.offer_rx(&lens);
        });
        wire.send(packet.vnet(size, false), &packet.unfinished(), &cuts);
        wire.send(packet.vnet(0, false), &packet.unfinished(), &cuts);
        let room: u32 = buffers.iter().sum();
        let verdicts = wire.turn_whole();
        prop_assume!(verdicts == [SENT, SENT] || room > 20);
        prop_assert_eq!(verdicts, [SENT, SENT]);
        let mut got: Vec<_> = wire.frames(0).into_iter().map(|(_, frame)| frame).collect();
        let csum = got.pop().unwrap();
        prop_assert_eq!(receive(&csum), packet.payload.clone());
        prop_assert_eq!(got, packet.cut(usize::from(size)));
    }

    #[test]
    fn whatever_a_sender_writes_is_delivered_or_dropped(
        vnet in any::<[u8; 10]>(),
        kind in prop_oneof![Just(0u8), Just(1), Just(4), Just(5), Just(0x81)],
        (v6, udp, broken) in any::<(bool, bool, Vec<(usize, u8)>)>(),
        (start, keep) in (any::<bool>(), 14usize..400),
    ) {
        let packet = Packet::new(v6, udp, 300);
        let mut frame = packet.unfinished();
        for (at, byte) in broken {
            frame[at % 80] = byte;
        }
        frame.truncate(keep);
        let mut header = packet.vnet(100, false);
        header[1] = kind;
        if start {
            header[2..12].copy_from_slice(&vnet);
        }
        let mut wire = Wire::new(512, SENDER, 0);
        (0..512).for_each(|_| drop(wire.to.offer_rx(&[500])));
        wire.send(header, &frame, &[]);
        wire.send(PLAIN, &[7; 60], &[]);
        let verdicts = wire.turn_whole();
        prop_assert_ne!(verdicts[0], Verdict::Retry);
        prop_assert_eq!(verdicts[1], SENT);
        prop_assert_eq!(&wire.frames(0).pop().unwrap().1, &[7; 60]);
    }
}

fn dropped(packet: &Packet, spoil: impl FnOnce(&mut Vec<u8>, &mut [u8; 12])) -> Verdict {
    let mut wire = Wire::new(64, SENDER, 0);
    (0..64).for_each(|_| drop(wire.to.offer_rx(&[2000])));
    let (mut frame, mut vnet) = (packet.unfinished(), packet.vnet(500, false));
    // The length of the headers is a hint: we look.
    vnet[2] = 0;
    spoil(&mut frame, &mut vnet);
    wire.send(vnet, &frame, &[]);
    let verdict = wire.turn_whole()[0];
    if let Verdict::Dropped(reason) = verdict {
        assert_eq!(wire.counters.rx.dropped(reason), 1);
        assert!(wire.to.used.is_empty());
    }
    verdict
}

#[test]
fn what_cannot_be_completed_is_dropped_under_its_reason() {
    let (v4, v6) = (
        Packet::new(false, false, 900),
        Packet::new(true, false, 900),
    );
    let udp = Packet::new(false, true, 900);
    let none = Verdict::Dropped(DropReason::NoOffload);
    let bad = Verdict::Dropped(DropReason::BadVnetHeader);
    assert_eq!(dropped(&v4, |_, _| ()), SENT);
    assert_eq!(dropped(&v4, |frame, _| frame[12] = 0x99), none, "not IP");
    assert_eq!(dropped(&v4, |frame, _| frame[23] = 47), none, "GRE");
    assert_eq!(
        dropped(&v4, |frame, _| frame[20] |= 0x20),
        none,
        "a fragment"
    );
    assert_eq!(
        dropped(&v4, |frame, _| frame[21] = 1),
        none,
        "a later fragment"
    );
    assert_eq!(
        dropped(&v6, |frame, _| frame[20] = 43),
        none,
        "a routing header"
    );
    assert_eq!(
        dropped(&v6, |frame, _| frame[20] = 44),
        none,
        "a fragment header"
    );
    assert_eq!(dropped(&v4, |frame, _| frame[47] |= 2), none, "SYN");
    assert_eq!(
        dropped(&v4, |frame, _| frame[14] = 0x65),
        bad,
        "version 6 in IPv4"
    );
    assert_eq!(
        dropped(&v6, |frame, _| frame[14] = 0x40),
        bad,
        "version 4 in IPv6"
    );
    assert_eq!(
        dropped(&v4, |frame, _| frame[14] = 0x44),
        bad,
        "header of 16 bytes"
    );
    assert_eq!(
        dropped(&v4, |frame, _| frame[46] = 0x40),
        bad,
        "TCP header of 16 bytes"
    );
    assert_eq!(
        dropped(&v4, |frame, _| frame.truncate(53)),
        bad,
        "TCP header cut off"
    );
    assert_eq!(dropped(&v4, |_, vnet| vnet[1] = 5), bad, "TCP as UDP");
    assert_eq!(dropped(&v4, |_, vnet| vnet[1] = 4), bad, "IPv4 as IPv6");
    assert_eq!(dropped(&udp, |_, vnet| vnet[1] = 1), bad, "UDP as TCP");
    assert_eq!(dropped(&v4, |_, vnet| vnet[6] -= 2), bad, "another start");
    assert_eq!(dropped(&v4, |_, vnet| vnet[8] -= 2), bad, "another place");
    let large = Packet::new(false, false, 65_470);
    assert_eq!(
        dropped(&large, |frame, _| frame.extend([0; 26])),
        bad,
        "not an IP packet"
    );
}

#[test]
fn all_of_a_frame_or_nothing_is_delivered() {
    let packet = Packet::new(false, false, 5000);
    for buffers in 0..6 {
        let mut wire = Wire::new(64, SENDER, feature::MRG_RXBUF);
        (0..buffers).for_each(|_| drop(wire.to.offer_rx(&[1600])));
        wire.send(PLAIN, &[1; 60], &[]);
        wire.send(packet.vnet(1000, false), &packet.unfinished(), &[]);
        wire.send(PLAIN, &[2; 60], &[]);
        let first = if buffers == 0 { Verdict::Retry } else { SENT };
        let retry = [first, Verdict::Retry, Verdict::Retry];
        // The third would have had a buffer: order is kept.
        assert_eq!(
            wire.turn_whole(),
            if buffers < 6 { retry } else { [SENT; 3] }
        );
        assert_eq!(wire.to.used.len(), usize::from(buffers > 0));
        // More buffers, and it goes on where it was.
        (buffers..7).for_each(|_| drop(wire.to.offer_rx(&[1600])));
        wire.turn_whole();
        let got: Vec<_> = wire.frames(0).into_iter().map(|(_, frame)| frame).collect();
        let wanted = [vec![vec![1; 60]], packet.cut(1000), vec![vec![2; 60]]].concat();
        assert!(got == wanted, "{buffers} buffers at first");
    }
    // More segments than the ring can ever hold.
    let mut wire = Wire::new(4, SENDER, feature::MRG_RXBUF);
    (0..4).for_each(|_| drop(wire.to.offer_rx(&[1600])));
    wire.send(packet.vnet(1000, false), &packet.unfinished(), &[]);
    wire.send(PLAIN, &[3; 60], &[]);
    let never = Verdict::Dropped(DropReason::RxRingTooSmall);
    assert_eq!(wire.turn_whole(), [never, SENT]);
    // Or more bytes.
    let mut wire = Wire::new(5, SENDER, feature::MRG_RXBUF);
    (0..5).for_each(|_| drop(wire.to.offer_rx(&[1000])));
    wire.send(packet.vnet(1000, false), &packet.unfinished(), &[]);
    assert_eq!(wire.turn_whole(), [never]);
}

#[test]
fn segments_stand_between_the_frames_around_them() {
    let mut wire = Wire::new(256, SENDER, feature::MRG_RXBUF | feature::GUEST_CSUM);
    (0..200).for_each(|_| drop(wire.to.offer_rx(&[1600])));
    let mut wanted = Vec::new();
    for number in 0..20u8 {
        let plain = vec![number; 60 + usize::from(number)];
        wire.send(PLAIN, &plain, &[]);
        wanted.push(plain);
        let udp = number % 2 == 0;
        let packet = Packet::new(number % 3 == 0, udp, 100 * usize::from(number));
        // The checksum alone is the receiver's to complete.
        wire.send(packet.vnet(0, false), &packet.unfinished(), &[]);
        wanted.push(packet.unfinished());
        wire.send(packet.vnet(700, false), &packet.unfinished(), &[]);
        wanted.extend(packet.cut(700));
    }
    assert_eq!(wire.turn_whole(), vec![SENT; 60]);
    let got: Vec<_> = wire.frames(0).into_iter().map(|(_, frame)| frame).collect();
    assert!(got == wanted);
}

/// A sender of tiny segments costs the others of its worker so many in a turn, and loses nothing.
#[test]
fn what_is_cut_in_a_turn_is_limited() {
    let packet = Packet::new(false, false, 3000);
    let pieces = packet.cut(10).len();
    let turn = PIECES_MAX.div_ceil(pieces);
    let mut wire = Wire::new(4096, SENDER, feature::MRG_RXBUF);
    (0..4096).for_each(|_| drop(wire.to.offer_rx(&[100])));
    (0..2 * turn - 1).for_each(|_| wire.send(packet.vnet(10, false), &packet.unfinished(), &[]));
    wire.send(PLAIN, &[1; 60], &[]);
    let waiting = [vec![SENT; turn], vec![Verdict::Retry; turn]].concat();
    assert_eq!(wire.turn_whole(), waiting);
    assert_eq!(wire.turn_whole(), vec![SENT; turn]);
    let got: Vec<_> = wire.frames(0).into_iter().map(|(_, frame)| frame).collect();
    let mut wanted = vec![packet.cut(10); 2 * turn - 1].concat();
    wanted.push(vec![1; 60]);
    assert!(got == wanted);
}

/// What could not be cut counts for nothing, whatever was cut before.
#[test]
fn what_is_refused_is_not_counted_as_cut() {
    let packet = Packet::new(false, false, 3000);
    let mut wire = Wire::new(256, SENDER, feature::MRG_RXBUF);
    (0..100).for_each(|_| drop(wire.to.offer_rx(&[1600])));
    let mut unknown = packet.unfinished();
    unknown.truncate(60);
    unknown[12..14].copy_from_slice(&[0x99, 0x99]);
    let mut header = packet.vnet(1000, false);
    header[2..4].copy_from_slice(&[54, 0]);
    for _ in 0..3 {
        wire.send(packet.vnet(1000, false), &packet.unfinished(), &[]);
        wire.send(header, &unknown, &[]);
        wire.send(PLAIN, &[1; 60], &[]);
    }
    let no = Verdict::Dropped(DropReason::NoOffload);
    assert_eq!(wire.turn_whole(), [SENT, no, SENT].repeat(3));
}

/// A receiver whose last buffer is too small has all of its ring looked through for each frame.
#[test]
fn what_is_looked_through_for_nothing_is_limited() {
    let packet = Packet::new(false, false, 2560);
    let mut wire = Wire::new(256, SENDER, 0);
    (0..256).for_each(|number| drop(wire.to.offer_rx(&[if number == 255 { 20 } else { 100 }])));
    (0..20).for_each(|_| wire.send(packet.vnet(10, false), &packet.unfinished(), &[]));
    let dropped = PIECES_MAX.div_ceil(255);
    let small = Verdict::Dropped(DropReason::RxTooSmall);
    let wanted = [vec![small; dropped], vec![Verdict::Retry; 20 - dropped]].concat();
    assert_eq!(wire.turn_whole(), wanted);
}
