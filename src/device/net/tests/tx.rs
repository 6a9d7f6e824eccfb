//! The transmit queue.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::{FRAME_BYTES_MAX, QueueCounters, TxHandler, feature};
use super::script::{Script, pattern, payload, verdicts};
use crate::host::net::{
    BURST_BYTES_MAX, BURST_FRAMES_MAX, DropReason, FrameBurst, Verdict, VnetHeader,
};
use crate::ring::{ChainQueue, RingFault};

const CSUM_TSO: u64 = feature::CSUM | feature::HOST_TSO4;

fn handler(features: u64) -> (TxHandler, Arc<QueueCounters>) {
    let counters = Arc::new(QueueCounters::default());
    (
        TxHandler::new(features | feature::VERSION_1, 1, Arc::clone(&counters)),
        counters,
    )
}

fn tso() -> VnetHeader {
    VnetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 100,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

fn chain_bytes(header: &VnetHeader, frame: &[u8]) -> Vec<u8> {
    [header.encode().as_slice(), frame].concat()
}

proptest! {
    /// VIRTIO 1.3 §5.1.6.2.
    #[test]
    fn header_and_payload_survive_any_cut(
        len in 60usize..4000,
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
        early in proptest::collection::vec(0usize..20, 0..3),
        offloads in any::<bool>(),
    ) {
        let (mut tx, _) = handler(if offloads { CSUM_TSO } else { 0 });
        let mut vq = Script::new(16);
        let frame = pattern(len, 1);
        let cuts = [cuts, early].concat();
        vq.offer_tx(&chain_bytes(&tso(), &frame), &cuts);
        let mut burst = FrameBurst::new();
        prop_assert_eq!(tx.receive(&mut vq, &mut burst), Ok(1));
        let got = burst.frames[0];
        let want = if offloads { tso() } else { VnetHeader::default() };
        prop_assert_eq!(got.header, want);
        prop_assert_eq!(got.verdict, Verdict::Retry);
        prop_assert_eq!(payload(&burst, &got), frame);
        tx.complete(&mut vq, &mut burst);
    }
}

/// Frames of 64 KiB take a while to copy, and others wait.
#[test]
fn a_burst_is_bounded_in_bytes_and_the_rest_comes_next() {
    const FRAMES: usize = 40;
    // In one descriptor each, or in two.
    for cuts in [&[][..], &[30000]] {
        let (mut tx, counters) = handler(0);
        let mut vq = Script::new(256);
        let frames: Vec<_> = (0..FRAMES)
            .map(|number| pattern(60000, u8::try_from(number).unwrap()))
            .collect();
        for frame in &frames {
            vq.offer_tx(&chain_bytes(&VnetHeader::PLAIN, frame), cuts);
        }
        let fits = BURST_BYTES_MAX.div_ceil(60000);
        let mut burst = FrameBurst::new();
        let mut left = &frames[..];
        while !left.is_empty() {
            let count = tx.receive(&mut vq, &mut burst).unwrap();
            assert_eq!(count, fits.min(left.len()), "{cuts:?}");
            for (frame, want) in burst.frames.clone().iter().zip(left) {
                assert!(payload(&burst, frame) == *want, "{cuts:?}");
            }
            // The last frame of each waits once more.
            let sent = count.saturating_sub(1).max(1);
            for frame in &mut burst.frames[..sent] {
                frame.verdict = Verdict::Sent;
            }
            tx.complete(&mut vq, &mut burst);
            left = &left[sent..];
        }
        assert_eq!(vq.used.len(), FRAMES);
        assert_eq!(counters.tx.frames(), FRAMES as u64);
    }
}

#[test]
fn a_burst_is_bounded_and_the_rest_comes_next() {
    let (mut tx, counters) = handler(0);
    let mut vq = Script::new(1024);
    for _ in 0..BURST_FRAMES_MAX + 3 {
        vq.offer_tx(&[0; 72], &[12]);
    }
    let mut burst = FrameBurst::new();
    for want in [BURST_FRAMES_MAX, 3, 0] {
        assert_eq!(tx.receive(&mut vq, &mut burst), Ok(want));
        burst
            .frames
            .iter_mut()
            .for_each(|frame| frame.verdict = Verdict::Sent);
        tx.complete(&mut vq, &mut burst);
    }
    assert_eq!(vq.used.len(), BURST_FRAMES_MAX + 3);
    assert_eq!(counters.tx.frames(), 259);
    assert_eq!(counters.tx.bytes(), 259 * 60);
}

#[test]
fn bad_chains_stay_in_the_burst_and_go_back_in_their_turn() {
    let (mut tx, counters) = handler(CSUM_TSO);
    let mut vq = Script::new(16);
    let good = chain_bytes(&VnetHeader::default(), &[7; 60]);
    vq.offer_tx(&good, &[]);
    vq.offer_tx(&good[..12], &[5]);
    vq.offer_tx(&good[..3], &[]);
    vq.offer(&[(100, false), (100, true)]);
    vq.offer(&[(100, true)]);
    vq.offer(&[(12, false), (FRAME_BYTES_MAX + 1, false)]);
    vq.offer_tx(
        &chain_bytes(
            &VnetHeader {
                gso_size: 0,
                ..tso()
            },
            &[7; 60],
        ),
        &[],
    );
    vq.offer_tx(&good, &[]);
    let mut burst = FrameBurst::new();
    assert_eq!(tx.receive(&mut vq, &mut burst), Ok(8));
    let chain = Verdict::Dropped(DropReason::BadChain);
    let header = Verdict::Dropped(DropReason::BadVnetHeader);
    let big = Verdict::Dropped(DropReason::TooBig);
    let retry = Verdict::Retry;
    assert_eq!(
        verdicts(&burst),
        [retry, chain, chain, chain, chain, big, header, retry]
    );
    for frame in burst
        .frames
        .iter_mut()
        .filter(|frame| frame.verdict == Verdict::Retry)
    {
        frame.verdict = Verdict::Sent;
    }
    tx.complete(&mut vq, &mut burst);
    assert_eq!(vq.used_ids(), (0..8).collect::<Vec<_>>());
    assert!(vq.used.iter().all(|used| used.written == 0));
    assert_eq!(counters.tx.frames(), 2);
    assert_eq!(counters.tx.dropped(DropReason::BadChain), 4);
    assert_eq!(counters.tx.dropped(DropReason::BadVnetHeader), 1);
    assert_eq!(counters.tx.dropped(DropReason::TooBig), 1);
}

#[test]
fn frames_to_be_tried_again_come_again_and_count_once() {
    let (mut tx, counters) = handler(0);
    let mut vq = Script::new(16);
    for seed in 0..3 {
        vq.offer_tx(
            &chain_bytes(&VnetHeader::default(), &pattern(60, seed)),
            &[],
        );
    }
    vq.offer_tx(&[0; 5], &[]);
    let mut burst = FrameBurst::new();
    assert_eq!(tx.receive(&mut vq, &mut burst), Ok(4));
    burst.frames[0].verdict = Verdict::Sent;
    tx.complete(&mut vq, &mut burst);
    assert_eq!((vq.used_ids(), vq.in_flight()), (vec![0], 0));

    assert_eq!(tx.receive(&mut vq, &mut burst), Ok(3));
    assert_eq!(payload(&burst, &burst.frames[0]), pattern(60, 1));
    burst.frames[0].verdict = Verdict::Sent;
    burst.frames[1].verdict = Verdict::Sent;
    tx.complete(&mut vq, &mut burst);
    assert_eq!(vq.used_ids(), [0, 1, 2, 3]);
    assert_eq!(counters.tx.frames(), 3);
    assert_eq!(counters.tx.dropped(DropReason::BadChain), 1);
}

#[test]
fn frames_before_a_fault_are_delivered_first() {
    let (mut tx, _) = handler(0);
    let mut vq = Script::new(16);
    vq.offer_tx(&[0; 72], &[]);
    vq.fault = Some(RingFault::DescIndex);
    let mut burst = FrameBurst::new();
    assert_eq!(tx.receive(&mut vq, &mut burst), Ok(1));
    burst.frames[0].verdict = Verdict::Sent;
    tx.complete(&mut vq, &mut burst);
    assert_eq!(tx.receive(&mut vq, &mut burst), Err(RingFault::DescIndex));
    assert_eq!(vq.used_ids(), [0]);
}
