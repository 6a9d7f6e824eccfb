//! The read window, filled by a reader that behaves like a tap.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::header::DATA_VALID;
use super::super::{QueueCounters, Refill, RxWindow, feature, need_bytes};
use super::script::{Script, pattern};
use crate::host::net::{DropReason, VnetHeader};
use crate::memory::{Segment, copy};
use crate::ring::{ChainQueue, RingFault};

const MRG: u64 = feature::MRG_RXBUF;
const TSO: u64 = MRG | feature::GUEST_CSUM | feature::GUEST_TSO4;

struct Port {
    vq: Script,
    window: RxWindow,
    counters: Arc<QueueCounters>,
}

impl Port {
    fn new(size: u16, features: u64) -> Port {
        let counters = Arc::new(QueueCounters::default());
        let window = RxWindow::new(
            features | feature::VERSION_1,
            size,
            None,
            Arc::clone(&counters),
        );
        Port {
            vq: Script::new(size),
            window,
            counters,
        }
    }

    fn refill(&mut self) -> Refill {
        let refill = self.window.refill(&mut self.vq).unwrap();
        self.window.count();
        refill
    }

    /// Does as a tap: ten bytes of header, two that it leaves alone, the frame; cut to the window.
    fn read(&mut self, header: &VnetHeader, frame: &[u8]) {
        let window = self.window.segments();
        assert!(window.len() <= 1024);
        assert_eq!(copy::write(window, 0, &header.encode()[..10]), 10);
        let done = copy::write(window, 12, frame);
        assert_eq!(done, frame.len(), "the window cut a frame");
        self.window.commit(&mut self.vq, 12 + done);
        self.window.count();
    }

    fn read_plain(&mut self, frame: &[u8]) {
        self.read(&VnetHeader::default(), frame);
    }
}

fn wanted(num_buffers: u16, frame: &[u8]) -> Vec<u8> {
    let header = VnetHeader {
        num_buffers,
        ..VnetHeader::default()
    };
    [header.encode().as_slice(), frame].concat()
}

#[test]
fn the_window_is_sized_by_what_the_driver_takes() {
    assert_eq!(need_bytes(feature::VERSION_1, None), 12 + 1518);
    assert_eq!(need_bytes(feature::MRG_RXBUF, None), 12 + 1518);
    assert_eq!(need_bytes(0, None), 10 + 1518, "a legacy header");
    assert_eq!(need_bytes(feature::VERSION_1, Some(9000)), 12 + 9018);
    for bit in [
        feature::GUEST_TSO4,
        feature::GUEST_TSO6,
        feature::GUEST_USO4,
    ] {
        assert_eq!(need_bytes(bit | feature::VERSION_1, Some(9000)), 12 + 65550);
    }
}

#[test]
fn frames_land_in_the_next_chains_and_unused_ones_are_kept() {
    let mut port = Port::new(64, TSO);
    for _ in 0..50 {
        port.vq.offer_rx(&[1500, 36]);
    }
    assert_eq!(port.refill(), Refill::Ready);
    // As many as the largest frame takes, and no more.
    assert_eq!(port.vq.in_flight(), 43);
    let total: usize = port.window.segments().iter().map(Segment::len).sum();
    assert!(total >= need_bytes(TSO | feature::VERSION_1, None));
    port.read_plain(&pattern(60, 1));
    port.refill();
    port.read_plain(&pattern(3000, 2));
    assert_eq!(port.vq.used_ids(), [0, 1, 2]);
    assert_eq!(
        port.vq.received(0),
        [wanted(1, &pattern(60, 1)), wanted(2, &pattern(3000, 2))].concat()
    );
    assert_eq!(
        (port.counters.rx.frames(), port.counters.rx.bytes()),
        (2, 3060)
    );
    assert_eq!(port.counters.rx.bounced(), 0);
}

#[test]
fn without_a_chain_nothing_is_to_be_read() {
    let mut port = Port::new(64, TSO);
    assert_eq!(port.refill(), Refill::Empty);
    assert!(port.window.segments().is_empty());
}

proptest! {
    #[test]
    fn a_frame_beyond_the_window_waits_and_arrives_byte_exact(
        frames in proptest::collection::vec(14usize..8000, 1..6),
        lens in proptest::collection::vec(proptest::collection::vec(1u32..1200, 1..4), 1..80),
        step in 1usize..5,
    ) {
        let mut port = Port::new(256, TSO);
        let mut offers = lens.iter().map(|lens| {
            let mut lens = lens.clone();
            lens[0] += 12;
            lens
        });
        let mut frames = frames.iter().enumerate();
        let mut expected = Vec::new();
        // Buffers come a few at a time; a frame is read whenever the window says so.
        loop {
            let mut more = false;
            for lens in offers.by_ref().take(step) {
                port.vq.offer_rx(&lens);
                more = true;
            }
            while port.refill() == Refill::Ready {
                let Some((seed, &len)) = frames.next() else { break };
                let frame = pattern(len, u8::try_from(seed).unwrap());
                port.read_plain(&frame);
                expected.push(frame);
            }
            if !more {
                break;
            }
        }
        let pending = port.window.is_pending();
        let done = expected.len() - usize::from(pending);
        let mut at = 0;
        for frame in &expected[..done] {
            let first = port.vq.written(port.vq.used[at].id, 12);
            let count = VnetHeader::decode(&first.try_into().unwrap()).num_buffers;
            let next = at + usize::from(count);
            let got: Vec<u8> = port.vq.used[at..next]
                .iter()
                .flat_map(|used| port.vq.written(used.id, used.written as usize))
                .collect();
            prop_assert_eq!(got, wanted(count, frame));
            at = next;
        }
        prop_assert_eq!(at, port.vq.used.len());
        port.window.give_back(&mut port.vq);
        prop_assert_eq!(port.vq.in_flight(), 0);
        prop_assert_eq!(port.window.is_pending(), pending);
        prop_assert_eq!(port.counters.rx.dropped(DropReason::RxRingTooSmall), 0);
        prop_assert_eq!(port.counters.rx.frames(), done as u64);
    }
}

#[test]
fn a_frame_that_the_whole_ring_can_not_hold_is_dropped_and_the_next_arrives() {
    let mut port = Port::new(2, TSO);
    port.vq.offer_rx(&[100]);
    port.vq.offer_rx(&[100]);
    port.refill();
    port.read_plain(&pattern(300, 1));
    assert!(port.window.is_pending());
    assert_eq!(port.refill(), Refill::Ready);
    assert!(!port.window.is_pending());
    port.read_plain(&pattern(150, 2));
    assert_eq!(port.vq.received(0), wanted(2, &pattern(150, 2)));
    assert_eq!(port.counters.rx.dropped(DropReason::RxRingTooSmall), 1);
}

/// Its first bytes lay in buffers that are elsewhere now.
#[test]
fn a_frame_that_waits_outlives_that_its_buffers_are_given_back() {
    let mut port = Port::new(8, TSO);
    let frame = pattern(300, 1);
    let first = port.vq.offer_rx(&[100]);
    port.refill();
    port.read_plain(&frame);
    assert_eq!(port.refill(), Refill::Empty);
    port.window.give_back(&mut port.vq);
    copy::zero(port.vq.segments(&first).as_slice(), 0, 100);
    assert_eq!(port.refill(), Refill::Empty);
    port.vq.offer_rx(&[100]);
    port.window.give_back(&mut port.vq);
    port.vq.offer_rx(&[150]);
    assert_eq!(port.refill(), Refill::Empty, "but for the next one");
    assert_eq!(port.vq.received(0), wanted(3, &frame));
}

#[test]
fn a_frame_that_waits_for_too_long_can_be_dropped() {
    let mut port = Port::new(8, TSO);
    port.vq.offer_rx(&[100]);
    port.refill();
    port.read_plain(&pattern(300, 1));
    assert_eq!(port.refill(), Refill::Empty);
    port.window.drop_pending(DropReason::RxRingTooSmall);
    assert_eq!(port.refill(), Refill::Ready);
    port.read_plain(&pattern(60, 2));
    assert_eq!(port.vq.received(0), wanted(1, &pattern(60, 2)));
    assert_eq!(port.counters.rx.dropped(DropReason::RxRingTooSmall), 1);
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain_or_is_dropped() {
    let mut port = Port::new(8, 0);
    port.vq.offer_rx(&[12, 60]);
    port.vq.offer_rx(&[12, 60]);
    port.refill();
    assert_eq!(port.vq.in_flight(), 1);
    port.read_plain(&pattern(61, 1));
    assert_eq!(port.refill(), Refill::Ready);
    port.read_plain(&pattern(60, 2));
    assert_eq!(port.vq.used_ids(), [0]);
    assert_eq!(port.vq.received(0), wanted(1, &pattern(60, 2)));
    assert_eq!(port.counters.rx.dropped(DropReason::RxTooSmall), 1);
}

#[test]
fn a_chain_of_more_segments_than_a_call_takes_is_filled_whole() {
    let mut port = Port::new(8, MRG);
    port.vq.offer_rx(&[1; 3000]);
    port.vq.offer_rx(&[1; 50]);
    assert_eq!(port.refill(), Refill::Ready);
    assert_eq!(port.window.segments().len(), 1024);
    port.read_plain(&pattern(1400, 1));
    port.refill();
    port.read_plain(&pattern(30, 2));
    assert_eq!(
        port.vq.received(0),
        [wanted(1, &pattern(1400, 1)), wanted(1, &pattern(30, 2))].concat()
    );
    assert_eq!(port.counters.rx.bounced(), 1);
}

#[test]
fn giving_back_leaves_every_chain_to_be_popped_again_in_order() {
    let mut port = Port::new(64, TSO);
    for _ in 0..5 {
        port.vq.offer_rx(&[200]);
    }
    port.refill();
    port.read_plain(&pattern(60, 1));
    port.refill();
    port.window.give_back(&mut port.vq);
    assert_eq!((port.vq.in_flight(), port.vq.used.len()), (0, 1));
    port.refill();
    port.read_plain(&pattern(60, 2));
    assert_eq!(port.vq.used_ids(), [0, 1]);
}

#[test]
fn a_driver_sees_only_what_it_acknowledged() {
    let mut port = Port::new(8, MRG);
    port.vq.offer_rx(&[200]);
    port.refill();
    // The kernel says so whether it was asked or not.
    let valid = VnetHeader {
        flags: DATA_VALID,
        ..VnetHeader::default()
    };
    port.read(&valid, &pattern(60, 1));
    assert_eq!(port.vq.received(0), wanted(1, &pattern(60, 1)));

    // Queued in the tap while another guest was here.
    port.vq.offer_rx(&[200]);
    port.refill();
    let csum = VnetHeader {
        flags: 1,
        csum_start: 34,
        csum_offset: 6,
        ..valid
    };
    port.read(&csum, &pattern(60, 2));
    assert_eq!(port.vq.used.len(), 1);
    assert_eq!(port.counters.rx.dropped(DropReason::NoOffload), 1);

    let mut port = Port::new(8, TSO);
    port.vq.offer_rx(&[200]);
    port.refill();
    port.read(&csum, &pattern(60, 2));
    let header = VnetHeader {
        num_buffers: 1,
        ..csum
    };
    assert_eq!(
        port.vq.received(0),
        [header.encode().as_slice(), &pattern(60, 2)].concat()
    );
}

#[test]
fn groups_and_all_are_counted_wherever_the_address_lies() {
    let mut port = Port::new(64, MRG);
    for to in [[0xff; 6], [1, 0, 0x5e, 0, 0, 9], [2, 0, 0, 0, 0, 7]] {
        // The address in three buffers.
        for bytes in [14, 3, 2000] {
            port.vq.offer_rx(&[bytes]);
        }
        assert_eq!(port.refill(), Refill::Ready);
        port.read_plain(&[&to[..], &[7; 100]].concat());
    }
    assert_eq!(port.counters.rx.casts(), [1, 1]);
    assert_eq!(port.counters.rx.frames(), 3);
}

#[test]
fn a_fault_ends_the_window() {
    let mut port = Port::new(8, TSO);
    port.vq.offer_rx(&[200]);
    port.vq.fault = Some(RingFault::Unmapped);
    assert_eq!(port.window.refill(&mut port.vq), Err(RingFault::Unmapped));
    port.window.give_back(&mut port.vq);
    assert_eq!(port.vq.in_flight(), 0);
}
