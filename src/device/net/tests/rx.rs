//! The receive queue, fed by the transmit queue of another guest.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::{RxHandler, TxHandler, feature};
use super::script::{pattern, verdicts};
use super::wire::Wire;
use crate::host::net::{DropReason, FrameBurst, Verdict, VnetHeader};
use crate::memory::copy::copied_by;
use crate::ring::{ChainQueue, RingFault};

const MRG: u64 = feature::MRG_RXBUF;
const SENT: Verdict = Verdict::Sent;
const RETRY: Verdict = Verdict::Retry;

/// Header with `num_buffers`, then `frame`.
fn wanted(num_buffers: u16, frame: &[u8]) -> Vec<u8> {
    let header = VnetHeader {
        num_buffers,
        ..VnetHeader::default()
    };
    [header.encode().as_slice(), frame].concat()
}

proptest! {
    /// VIRTIO 1.3 §5.1.6.3, §5.1.6.4: `num_buffers` says how many chains hold the frame.
    #[test]
    fn frames_arrive_byte_exact_over_any_cuts_of_both_sides(
        frames in proptest::collection::vec(
            (14usize..3000, proptest::collection::vec(any::<usize>(), 0..4)),
            1..8,
        ),
        buffers in proptest::collection::vec(
            proptest::collection::vec(0u32..900, 1..4),
            1..40,
        ),
    ) {
        let mut wire = Wire::new(1024, 0, MRG);
        for (seed, (len, cuts)) in frames.iter().enumerate() {
            let frame = pattern(*len, u8::try_from(seed).unwrap());
            wire.from.offer_tx(&wanted(99, &frame), cuts);
        }
        for lens in &buffers {
            // The first buffer of a frame must hold the header.
            let mut lens = lens.clone();
            lens[0] += 12;
            wire.to.offer_rx(&lens);
        }
        let (verdicts, copied) = copied_by(|| wire.turn());
        let sent = verdicts.iter().take_while(|&&verdict| verdict == SENT).count();
        // Once, from the one memory into the other; the address alone may be read besides.
        let bytes = frames[..sent].iter().map(|(len, _)| len).sum::<usize>();
        prop_assert!(copied >= bytes && copied <= bytes + 6 * sent, "{copied} for {bytes}");
        prop_assert!(verdicts[sent..].iter().all(|&verdict| verdict == RETRY));
        prop_assert_eq!(wire.from.used_ids().len(), sent);
        prop_assert_eq!((wire.from.in_flight(), wire.to.in_flight()), (0, 0));
        let mut at = 0;
        for (seed, (len, _)) in frames.iter().take(sent).enumerate() {
            let frame = pattern(*len, u8::try_from(seed).unwrap());
            let first = wire.to.written(wire.to.used[at].id, 12);
            let count = VnetHeader::decode(&first.try_into().unwrap()).num_buffers;
            let chains = &wire.to.used[at..at + usize::from(count)];
            // All but the last are full.
            let (last, full) = chains.split_last().unwrap();
            prop_assert!(full.iter().all(|used| used.written == used.writable));
            prop_assert!(last.written > 0 && last.written <= last.writable);
            let got: Vec<u8> = chains
                .iter()
                .flat_map(|used| wire.to.written(used.id, used.written as usize))
                .collect();
            prop_assert_eq!(got, wanted(count, &frame));
            at += usize::from(count);
        }
        prop_assert_eq!(at, wire.to.used.len());
        let left: u32 = buffers[at..].iter().map(|lens| 12 + lens.iter().sum::<u32>()).sum();
        if let Some((len, _)) = frames.get(sent) {
            prop_assert!(left < 12 + u32::try_from(*len).unwrap(), "a frame that fits was kept");
        }
    }
}

/// VIRTIO 1.3 §5.1.6.3.
#[test]
fn a_frame_without_mergeable_buffers_fits_one_chain_or_is_dropped() {
    let mut wire = Wire::new(16, 0, 0);
    wire.to.offer_rx(&[12, 60]);
    wire.to.offer_rx(&[12, 100]);
    for (len, seed) in [(61, 1), (60, 2), (101, 3), (100, 4)] {
        wire.send_plain(&pattern(len, seed));
    }
    let dropped = Verdict::Dropped(DropReason::RxTooSmall);
    assert_eq!(wire.turn(), [dropped, SENT, dropped, SENT]);
    assert_eq!(
        wire.to.received(0),
        [wanted(1, &pattern(60, 2)), wanted(1, &pattern(100, 4))].concat()
    );
    assert_eq!(wire.counters.rx.frames(), 2);
    assert_eq!(wire.counters.rx.bytes(), 160);
    assert_eq!(wire.counters.rx.dropped(DropReason::RxTooSmall), 2);
    assert_eq!(wire.from.used_ids(), [0, 1, 2, 3]);
}

#[test]
fn a_frame_waits_for_buffers_and_nothing_overtakes_it() {
    let mut wire = Wire::new(8, 0, MRG);
    wire.to.offer_rx(&[50]);
    wire.send_plain(&pattern(100, 1));
    wire.send_plain(&pattern(20, 2));
    assert_eq!(wire.turn(), [RETRY, RETRY]);
    assert_eq!((wire.to.in_flight(), wire.to.used.len()), (0, 0));
    wire.to.offer_rx(&[62]);
    assert_eq!(wire.turn(), [SENT, RETRY]);
    wire.to.offer_rx(&[50]);
    assert_eq!(wire.turn(), [SENT]);
    assert_eq!(
        wire.to.received(0),
        [wanted(2, &pattern(100, 1)), wanted(1, &pattern(20, 2))].concat()
    );
    assert_eq!(wire.counters.rx.frames(), 2);
}

#[test]
fn a_frame_that_a_whole_ring_can_not_hold_is_dropped() {
    let mut wire = Wire::new(2, 0, MRG);
    wire.to.offer_rx(&[50]);
    wire.to.offer_rx(&[50]);
    wire.send_plain(&pattern(38, 1));
    wire.send_plain(&pattern(89, 2));
    wire.send_plain(&pattern(38, 3));
    // The first frame takes a chain that comes back, so it is not yet sure about the second.
    assert_eq!(wire.turn(), [SENT, RETRY, RETRY]);
    wire.to.offer_rx(&[50]);
    assert_eq!(
        wire.turn(),
        [Verdict::Dropped(DropReason::RxRingTooSmall), SENT]
    );
    assert_eq!(wire.to.received(1), wanted(1, &pattern(38, 3)));
    assert_eq!(wire.to.in_flight(), 0);
}

#[test]
fn a_chain_that_can_not_hold_the_header_is_not_used_for_one() {
    let mut wire = Wire::new(8, 0, MRG);
    wire.to.offer_rx(&[11]);
    wire.to.offer_rx(&[500]);
    wire.send_plain(&pattern(60, 1));
    assert_eq!(wire.turn(), [Verdict::Dropped(DropReason::RxTooSmall)]);
    assert_eq!((wire.to.in_flight(), wire.to.used.len()), (0, 0));
}

/// A ring of them would be looked through for each frame, at the cost of others.
#[test]
fn buffers_shorter_than_the_header_are_not_merged() {
    let mut wire = Wire::new(64, 0, MRG);
    wire.to.offer_rx(&[12]);
    (0..40).for_each(|_| drop(wire.to.offer_rx(&[1])));
    wire.send_plain(&pattern(60, 1));
    wire.send_plain(&pattern(1, 2));
    // The last one may be: nothing is behind it.
    assert_eq!(
        wire.turn(),
        [Verdict::Dropped(DropReason::RxTooSmall), SENT]
    );
    assert_eq!(wire.to.received(0), wanted(2, &pattern(1, 2)));
    assert_eq!((wire.to.in_flight(), wire.to.used.len()), (0, 2));
}

#[test]
fn readable_buffers_of_a_receive_chain_are_left_alone() {
    let mut wire = Wire::new(8, 0, MRG);
    let first = wire.to.offer(&[(40, false), (30, true)]);
    wire.to.offer(&[(40, false), (90, true)]);
    wire.send_plain(&pattern(100, 1));
    assert_eq!(wire.turn(), [SENT]);
    assert_eq!(wire.to.received(0), wanted(2, &pattern(100, 1)));
    let readable = wire.to.segments(&first[..1]);
    let mut bytes = [1; 40];
    crate::memory::copy::read(readable.as_slice(), 0, &mut bytes);
    assert_eq!(bytes, [0; 40]);
}

/// VIRTIO 1.3 §5.1.6.4.
#[test]
fn offloads_that_the_receiver_acknowledged_are_delivered_as_they_are() {
    let csum = VnetHeader {
        flags: 1,
        csum_start: 34,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    let mut wire = Wire::new(8, feature::CSUM, MRG | feature::GUEST_CSUM);
    wire.to.offer_rx(&[500]);
    wire.from
        .offer_tx(&[csum.encode().as_slice(), &[3; 60]].concat(), &[]);
    assert_eq!(wire.turn(), [SENT]);
    let header = VnetHeader {
        num_buffers: 1,
        ..csum
    };
    assert_eq!(
        wire.to.received(0),
        [header.encode().as_slice(), &[3; 60]].concat()
    );
}

#[test]
fn frames_before_a_fault_of_the_receiver_are_delivered() {
    let mut wire = Wire::new(8, 0, MRG);
    wire.to.offer_rx(&[72]);
    wire.to.fault = Some(RingFault::Unmapped);
    wire.send_plain(&pattern(60, 1));
    wire.send_plain(&pattern(60, 2));
    wire.tx.receive(&mut wire.from, &mut wire.burst).unwrap();
    let FrameBurst {
        frames, segments, ..
    } = &mut wire.burst;
    let answer = wire.rx.transmit(&mut wire.to, frames, segments);
    assert_eq!(answer, Err(RingFault::Unmapped));
    assert_eq!(verdicts(&wire.burst), [SENT, RETRY]);
    wire.tx.complete(&mut wire.from, &mut wire.burst);
    assert_eq!(wire.to.received(0), wanted(1, &pattern(60, 1)));
}

#[test]
fn legacy_drivers_have_a_header_without_num_buffers() {
    // Sender and receiver, each legacy (10 bytes) or modern (12), VIRTIO 1.3 §5.1.6.1.
    for (sender, receiver) in [(0, 0), (0, 1), (1, 0)] {
        let features = |modern: u64| modern * feature::VERSION_1;
        let mut wire = Wire::new(8, 0, 0);
        wire.tx = TxHandler::new(features(sender), 1, Arc::default());
        wire.rx = RxHandler::new(features(receiver), 8, Arc::clone(&wire.counters));
        let frame = pattern(60, 3);
        let header = |modern: u64| vec![0; if modern == 1 { 12 } else { 10 }];
        wire.from
            .offer_tx(&[header(sender), frame.clone()].concat(), &[7]);
        wire.to.offer_rx(&[100]);
        assert_eq!(wire.turn(), [SENT]);
        let mut wanted = header(receiver);
        if receiver == 1 {
            wanted[10] = 1;
        }
        wanted.extend(&frame);
        assert_eq!(wire.to.received(0), wanted, "{sender} to {receiver}");
    }
}

#[test]
fn groups_and_all_are_counted_wherever_the_sender_cuts_the_address() {
    let cuts = 0..8;
    let mut wire = Wire::new(64, 0, MRG);
    for cut in cuts.clone() {
        for to in [[0xff; 6], [1, 0, 0x5e, 0, 0, 9], [2, 0, 0, 0, 0, 7]] {
            let frame = [&to[..], &[7; 60]].concat();
            wire.send(VnetHeader::default().encode(), &frame, &[12, 12 + cut]);
            wire.to.offer_rx(&[100]);
        }
    }
    assert!(wire.turn().iter().all(|&verdict| verdict == SENT));
    let each = cuts.len() as u64;
    assert_eq!(wire.counters.rx.casts(), [each; 2]);
    assert_eq!(wire.counters.rx.frames(), 3 * each);
}
