//! What both formats must do, written once per behaviour and run for each.
//!
//! The driver side is `testing::driver`. Tests named for a fault write what an honest driver would
//! not, and also show that the latch holds.

mod batches;
mod faults;
mod in_order;
mod lines;
mod resume;
mod singles;
mod stores;
mod walks;

use std::sync::Arc;

use super::*;
use crate::memory::{GuestRam, Segment, Segments, copy};
use crate::testing::driver::{
    Buf, Calls, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

/// Where buffers begin, behind every ring of these tests.
const BUFFERS: u64 = 0x10_0000;
const RAM: u64 = 0x40_0000;

struct Rig<D: Driver> {
    ram: Arc<GuestRam>,
    driver: D,
    vq: Virtqueue<D::Format>,
    segments: Segments,
}

impl<D: Driver> Rig<D> {
    fn new(size: u16) -> Rig<D> {
        Rig::with(size, true)
    }

    fn with(size: u16, event_idx: bool) -> Rig<D> {
        // Two regions that meet in the middle of the buffers.
        let ram = GuestRam::for_test(&[(0, RAM / 2), (RAM / 2, RAM / 2)]);
        let memory = RingMemory::new::<D::Format>(&ram, 0, size);
        let vq = memory.device::<D::Format>(event_idx);
        let driver = D::new(&memory, event_idx);
        Rig {
            ram,
            driver,
            vq,
            segments: Segments::with_capacity(4096),
        }
    }

    fn pop(&mut self) -> Option<Chain> {
        self.segments.clear();
        match self.vq.pop(&mut self.segments).unwrap() {
            Popped::Chain(chain) => Some(chain),
            Popped::Empty => None,
            Popped::Wait => panic!("nothing to wait for"),
        }
    }

    fn fault(&mut self) -> RingFault {
        let singles = [false, true].map(|write| self.vq.pop_single(write).is_some());
        assert_eq!(singles, [false; 2], "what is at fault is not simple");
        self.segments.clear();
        let fault = self.vq.pop(&mut self.segments).unwrap_err();
        assert!(
            self.segments.is_empty(),
            "a fault leaves no segments behind"
        );
        assert_eq!(self.vq.fault(), Some(fault));
        assert_eq!(
            self.vq.pop(&mut self.segments),
            Err(fault),
            "the latch holds"
        );
        assert_eq!(self.vq.has_available(), Err(fault));
        assert!(!self.vq.set_kicks(true), "a broken ring never reports work");
        fault
    }

    fn use_chain(&mut self, chain: Chain, written: u32) {
        let writable: Vec<Segment> = chain.writable(&self.segments).to_vec();
        self.vq.put_used(chain.id, written, &writable);
    }
}

/// One test body for both formats (and for a packed ring whose size is no power of two).
macro_rules! both {
    ($($name:ident($size:expr, $packed_size:expr) = $($body:ident)::+;)*) => {
        mod split {
            $(#[test] fn $name() { super::$($body)::+::<super::SplitDriver>($size); })*
        }
        mod packed {
            $(#[test] fn $name() { super::$($body)::+::<super::PackedDriver>($packed_size); })*
        }
    };
}

both! {
    chains_go_round_many_laps(8, 7) = laps;
    indirect_and_direct_give_the_same_buffers(8, 5) = indirect;
    a_direct_descriptor_may_precede_an_indirect_one(8, 5) = mixed;
    a_buffer_may_span_two_regions(8, 5) = spanning;
    nothing_is_visible_before_publish(8, 7) = invisible;
    out_of_order_completion_is_kept_apart(8, 7) = out_of_order;
    unpop_gives_the_same_chain_again(4, 3) = unpop;
    a_full_list_of_segments_waits_and_loses_nothing(8, 7) = full_list;
    zero_length_buffers_are_legal(8, 7) = zero_length;
    the_largest_ring_works(32768, 32768) = largest;
    a_ring_of_the_smallest_size_works(2, 1) = smallest;
    calls_follow_the_event_index(16, 13) = event_index;
    calls_follow_the_flags(16, 13) = call_flags;
    kicks_are_off_while_polling_and_on_when_asked(16, 13) = kicks;
    simple_chains_go_round_many_at_once(8, 7) = singles::laps;
    only_simple_chains_are_taken_many_at_once(8, 7) = singles::limits;
    long_tables_take_turns(512, 511) = walks::long_tables;
    a_chain_longer_than_a_turn_has_one_of_its_own(32768, 32768) = walks::longer_than_all;
    chains_of_one_descriptor_take_no_turns(32768, 32768) = walks::singles_are_free;
    what_was_given_back_was_walked(8, 7) = walks::unpop_is_no_way_round;
    a_chain_longer_than_the_ring_is_a_fault(4, 3) = faults::too_long;
    an_unmapped_buffer_is_a_fault(4, 3) = faults::unmapped;
    a_readable_after_a_writable_is_a_fault(4, 3) = faults::readable_after_writable;
    nested_indirect_is_a_fault(4, 3) = faults::nested;
    an_indirect_table_of_odd_length_is_a_fault(4, 3) = faults::odd_table;
    a_chain_of_too_many_bytes_is_a_fault(4, 3) = faults::too_many_bytes;
    indirect_without_negotiation_is_a_fault(4, 3) = faults::not_negotiated;
    a_swap_keeps_the_ring_and_changes_the_buffers(8, 7) = swap;
    a_stopped_ring_resumes_at_its_base(8, 7) = resume;
    the_dirty_log_marks_what_was_written(8, 7) = dirty;
    the_journal_sees_every_step_in_order(8, 7) = journal;
}

/// What the driver makes available is used, lap after lap (VIRTIO 1.3 §2.6, §2.8.1).
fn laps<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for round in 0..10 * u32::from(size) {
        let count = round % 3 + 1;
        let mut bufs = vec![Buf::readable(BUFFERS + u64::from(round) * 8, 8)];
        for i in 1..count {
            bufs.push(Buf::writable(BUFFERS + 0x1000 * u64::from(i), 100 + i));
        }
        write_guest(&rig.ram, bufs[0].addr, &u64::from(round).to_le_bytes());
        let id = rig.driver.add(&bufs).unwrap();
        assert!(rig.pop().is_none(), "not published yet");
        rig.driver.publish();
        let chain = rig.pop().expect("published");
        assert_eq!(chain.readable, 1);
        assert_eq!(chain.writable, count - 1);
        let mut bytes = [0; 8];
        copy::read(chain.readable(&rig.segments), 0, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), u64::from(round));
        assert_eq!(
            chain.writable_bytes,
            (1..count).map(|i| 100 + i).sum::<u32>()
        );
        rig.use_chain(chain, round);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), Some((id, round)));
        assert_eq!(rig.driver.used(), None);
        assert_eq!(rig.vq.in_flight(), 0);
    }
}

/// The buffers of an indirect table (VIRTIO 1.3 §2.7.5.3, §2.8.7).
fn indirect<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let bufs: Vec<_> = (0..100u32)
        .map(|i| Buf {
            addr: BUFFERS + u64::from(i) * 64,
            len: i + 1,
            write: i >= 50,
        })
        .collect();
    // Not aligned: an indirect table may lie anywhere.
    rig.driver.add_indirect(&bufs, BUFFERS + 0x2_0003).unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap();
    let lens: Vec<_> = rig.segments.as_slice().iter().map(Segment::len).collect();
    assert_eq!(lens, (1..=100).collect::<Vec<_>>());
    assert_eq!((chain.readable, chain.writable), (50, 50));
    assert_eq!(chain.id.slots(), 1);
    rig.use_chain(chain, 7);
    rig.vq.publish();
    assert_eq!(rig.driver.used().map(|used| used.1), Some(7));
}

/// A table may be the last descriptor of a chain (VIRTIO 1.3 §2.7.5.3, §2.8.7).
fn mixed<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let table = [Buf::writable(BUFFERS, 10), Buf::writable(BUFFERS + 64, 20)];
    let words = D::table(&table);
    let bytes: Vec<u8> = words
        .iter()
        .flatten()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    write_guest(&rig.ram, BUFFERS + 0x1000, &bytes);
    let direct = (Buf::readable(BUFFERS + 128, 30), 0);
    let indirect = (Buf::readable(BUFFERS + 0x1000, 32), Desc::INDIRECT);
    rig.driver.add_raw(&[direct, indirect]).unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap();
    assert_eq!((chain.readable_bytes, chain.writable_bytes), (30, 30));
    rig.use_chain(chain, 0);
    rig.vq.publish();
    assert!(rig.driver.used().is_some());
}

fn spanning<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    rig.driver
        .add(&[Buf::writable(RAM / 2 - 100, 300)])
        .unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap();
    assert_eq!((chain.writable, chain.writable_bytes), (2, 300));
    let data: Vec<u8> = (0..=255).chain(0..44).collect();
    assert_eq!(copy::write(chain.writable(&rig.segments), 0, &data), 300);
    assert_eq!(read_guest(&rig.ram, RAM / 2 - 100, 300), data);
    rig.use_chain(chain, 300);
}

fn invisible<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let ids: Vec<_> = (0..3)
        .map(|i| {
            rig.driver
                .add(&[Buf::writable(BUFFERS + i * 64, 64)])
                .unwrap()
        })
        .collect();
    rig.driver.publish();
    for written in 1..=3 {
        let chain = rig.pop().unwrap();
        rig.use_chain(chain, written);
        assert_eq!(rig.driver.used(), None, "staged, not published");
    }
    rig.vq.publish();
    for (id, written) in ids.into_iter().zip(1..) {
        assert_eq!(rig.driver.used(), Some((id, written)));
    }
    assert!(!rig.vq.publish(), "nothing staged");
}

fn out_of_order<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for lap in 0..20u32 {
        let ids: Vec<_> = (0..3)
            .map(|i| {
                let two = [Buf::readable(BUFFERS, 8), Buf::writable(BUFFERS + 64, 8)];
                rig.driver.add(&two[..1 + usize::from(i == 1)]).unwrap()
            })
            .collect();
        rig.driver.publish();
        let mut chains: Vec<_> = (0..3).map(|_| rig.pop().unwrap()).collect();
        let (c, b, a) = (
            chains.pop().unwrap(),
            chains.pop().unwrap(),
            chains.pop().unwrap(),
        );
        for (chain, written) in [(c, 3), (a, 1), (b, 2)] {
            rig.vq.put_used(chain.id, lap * 10 + written, &[]);
            rig.vq.publish();
        }
        let used: Vec<_> = core::iter::from_fn(|| rig.driver.used()).collect();
        assert_eq!(
            used,
            [
                (ids[2], lap * 10 + 3),
                (ids[0], lap * 10 + 1),
                (ids[1], lap * 10 + 2)
            ]
        );
    }
}

fn unpop<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for round in 0..20u32 {
        let id = rig
            .driver
            .add(&[Buf::writable(BUFFERS, 8), Buf::writable(BUFFERS, 8)])
            .unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap();
        let base = rig.vq.base();
        rig.vq.unpop(chain.id);
        assert_ne!(rig.vq.base(), base);
        assert_eq!(rig.vq.in_flight(), 0);
        let chain = rig.pop().unwrap();
        assert_eq!(rig.vq.base(), base);
        rig.use_chain(chain, round);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), Some((id, round)));
    }
}

fn full_list<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    rig.segments = Segments::with_capacity(4);
    for _ in 0..2 {
        let bufs = [1, 2, 3].map(|i| Buf::writable(BUFFERS + i * 64, 8));
        rig.driver.add(&bufs).unwrap();
    }
    rig.driver.publish();
    let Popped::Chain(first) = rig.vq.pop(&mut rig.segments).unwrap() else {
        panic!("a chain")
    };
    assert_eq!(rig.vq.pop(&mut rig.segments), Ok(Popped::Wait));
    assert_eq!(rig.segments.len(), 3, "the waiting chain left nothing");
    rig.vq.put_used(first.id, 0, &[]);
    let second = rig.pop().expect("there is room now");
    assert_eq!(second.writable, 3);
    rig.use_chain(second, 0);
    // A chain that can never fit is a fault, not a wait for ever.
    rig.segments = Segments::with_capacity(2);
    rig.vq.publish();
    while rig.driver.used().is_some() {}
    rig.driver
        .add(&[1, 2, 3].map(|i| Buf::writable(BUFFERS + i * 64, 8)))
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::TooManySegments);
}

fn zero_length<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    // Not even the address counts then.
    rig.driver
        .add(&[Buf::readable(u64::MAX, 0), Buf::writable(BUFFERS, 5)])
        .unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap();
    assert_eq!((chain.readable, chain.writable_bytes), (0, 5));
    rig.use_chain(chain, 5);
}

fn largest<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for lap in 0..2u32 {
        for i in 0..u64::from(size) {
            rig.driver.add(&[Buf::writable(BUFFERS + i, 1)]).unwrap();
        }
        rig.driver.publish();
        for i in 0..u32::from(size) {
            let chain = rig.pop().unwrap();
            rig.use_chain(chain, i ^ lap);
        }
        assert!(rig.pop().is_none());
        rig.vq.publish();
        for i in 0..u32::from(size) {
            assert_eq!(rig.driver.used().map(|used| used.1), Some(i ^ lap));
        }
    }
}

fn smallest<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for round in 0..10 {
        let id = rig.driver.add(&[Buf::writable(BUFFERS, 16)]).unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap();
        rig.use_chain(chain, round);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), Some((id, round)));
    }
}

/// Uses `count` chains in one burst; whether the device would call.
fn burst<D: Driver>(rig: &mut Rig<D>, count: usize) -> bool {
    for _ in 0..count {
        rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
    }
    rig.driver.publish();
    for _ in 0..count {
        let chain = rig.pop().unwrap();
        rig.use_chain(chain, 1);
    }
    let call = rig.vq.publish();
    for _ in 0..count {
        rig.driver.used().unwrap();
    }
    call
}

/// By `used_event`, behind the available ring (VIRTIO 1.3 §2.7.6), or by the event area.
fn event_index<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for _ in 0..200 {
        rig.driver.set_calls(Calls::After(0));
        assert!(burst(&mut rig, 1), "the next element was asked for");
        rig.driver.set_calls(Calls::After(3));
        assert!(!burst(&mut rig, 3), "the fourth was asked for, three came");
        assert!(burst(&mut rig, 2), "now it came, in the middle of a burst");
        assert!(!burst(&mut rig, 2), "and is over");
    }
}

/// By the flags of either format (VIRTIO 1.3 §2.7.6, §2.8.10).
fn call_flags<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::with(size, false);
    for _ in 0..50 {
        rig.driver.set_calls(Calls::On);
        assert!(burst(&mut rig, 3));
        rig.driver.set_calls(Calls::Off);
        assert!(!burst(&mut rig, 3));
    }
}

/// By `avail_event`, behind the used ring (VIRTIO 1.3 §2.7.8), by the event area, or by flags.
fn kicks<D: Driver>(size: u16) {
    for event_idx in [false, true] {
        let mut rig = Rig::<D>::with(size, event_idx);
        for _ in 0..50 {
            rig.vq.set_kicks(false);
            rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
            let first_ever = rig.vq.base() == VringBase::fresh(D::Format::PACKED);
            // A fresh split ring has avail_event 0: the very first chain may kick.
            assert!(
                !rig.driver.publish() || (event_idx && first_ever),
                "kicks are off"
            );
            assert!(rig.vq.set_kicks(true), "a chain is there already");
            let chain = rig.pop().unwrap();
            assert!(!rig.vq.set_kicks(true), "nothing more is there");
            rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
            assert!(rig.driver.publish(), "kicks are on");
            rig.use_chain(chain, 0);
            let chain = rig.pop().unwrap();
            rig.use_chain(chain, 0);
            rig.vq.publish();
            while rig.driver.used().is_some() {}
        }
    }
}

#[test]
fn a_fresh_packed_ring_with_base_zero_starts_in_its_first_lap() {
    let mut rig = Rig::<PackedDriver>::new(3);
    let config = |num| RingConfig {
        size: 3,
        event_idx: true,
        indirect: true,
        in_order: false,
        readable_only: false,
        base: VringBase::from_u32(true, num),
    };
    let areas = |rig: &Rig<PackedDriver>| rig.driver.memory().areas::<Packed>();
    rig.vq = Virtqueue::new(Arc::clone(&rig.ram), areas(&rig), &config(0)).unwrap();
    for _ in 0..3 {
        rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
        rig.driver.publish();
        let chain = rig
            .pop()
            .expect("what libblkio's driver makes available first");
        rig.use_chain(chain, 0);
        rig.vq.publish();
        rig.driver.used().unwrap();
    }
    // Now base 0 is the truth, before and after the driver made the first descriptor available.
    assert_eq!(rig.vq.base().to_u32(true), 0);
    for available in [false, true] {
        if available {
            rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
            rig.driver.publish();
        }
        rig.vq = Virtqueue::new(Arc::clone(&rig.ram), areas(&rig), &config(0)).unwrap();
        assert_eq!(rig.pop().is_some(), available);
    }
}

fn swap<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
    rig.driver.add(&[Buf::writable(RAM - 8, 8)]).unwrap();
    rig.driver.publish();
    let before = rig.pop().unwrap();
    let held: Vec<_> = before.writable(&rig.segments).to_vec();
    // The new table shares the first region and has lost the second.
    let first = rig.ram.specs().remove(0);
    let less = Arc::new(GuestRam::map(vec![first], Some(&rig.ram)).unwrap());
    let memory = RingMemory {
        ram: Arc::clone(&less),
        ..rig.driver.memory().clone()
    };
    let old = rig.vq.swap(less, memory.areas::<D::Format>());
    // A chain popped before still points into memory that the old table keeps.
    assert_eq!(copy::write(&held, 0, b"survives"), 8);
    rig.vq.put_used(before.id, 8, &held);
    drop(old);
    rig.vq.publish();
    assert_eq!(read_guest(&rig.ram, BUFFERS, 8), b"survives");
    assert!(rig.driver.used().is_some(), "the same ring goes on");
    assert_eq!(rig.fault(), RingFault::Unmapped);
}

fn resume<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for round in 0..5 * u32::from(size) {
        let id = rig.driver.add(&[Buf::writable(BUFFERS, 8); 2]).unwrap();
        rig.driver.publish();
        // Stop and start again between any two chains, over the 32-bit value of the protocol.
        let base = VringBase::from_u32(D::Format::PACKED, rig.vq.base().to_u32(D::Format::PACKED));
        let config = RingConfig {
            size,
            event_idx: true,
            indirect: true,
            in_order: false,
            readable_only: false,
            base,
        };
        let areas = rig.driver.memory().areas::<D::Format>();
        rig.vq = Virtqueue::new(Arc::clone(&rig.ram), areas, &config).unwrap();
        let chain = rig.pop().unwrap();
        rig.use_chain(chain, round);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), Some((id, round)));
    }
}

fn dirty<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let log = Arc::new(crate::memory::DirtyLog::new(RAM));
    rig.vq.set_log(Some(Arc::clone(&log)));
    rig.driver
        .add(&[
            Buf::readable(BUFFERS, 8),
            Buf::writable(BUFFERS + 0x2ff0, 0x2000),
        ])
        .unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap();
    assert!(
        !log.is_marked(BUFFERS + 0x3000),
        "marked when it completes, not when it is popped"
    );
    let written: Vec<_> = chain
        .writable(&rig.segments)
        .iter()
        .map(|s| s.take(0x20))
        .collect();
    rig.vq.put_used(chain.id, 0x20, &written);
    assert!(
        log.is_marked(BUFFERS + 0x2000),
        "the page of the first byte"
    );
    assert!(log.is_marked(BUFFERS + 0x3000), "the page of the last byte");
    assert!(
        !log.is_marked(BUFFERS + 0x4000),
        "not what was only offered"
    );
    assert!(!log.is_marked(BUFFERS), "not what was read");
}

fn journal<D: Driver>(size: u16) {
    use std::sync::mpsc::{Sender, channel};

    struct Recorder(Sender<String>, u16);
    impl Journal for Recorder {
        fn took(&mut self, id: &ChainId) -> u16 {
            self.1 += 1;
            self.0.send(format!("took {}", id.id())).unwrap();
            self.1
        }
        fn gave_back(&mut self, entry: u16) {
            self.0.send(format!("gave back {entry}")).unwrap();
        }
        fn staged(&mut self, entry: u16) {
            self.0.send(format!("staged {entry}")).unwrap();
        }
        fn commit_begin(&mut self) {
            self.0.send("begin".into()).unwrap();
        }
        fn commit_end(&mut self) {
            self.0.send("end".into()).unwrap();
        }
    }

    let rig = Rig::<D>::new(size);
    let (mut driver, mut segments) = (rig.driver, rig.segments);
    let (send, steps) = channel();
    let base = VringBase::fresh(D::Format::PACKED);
    let config = RingConfig {
        size,
        event_idx: true,
        indirect: true,
        in_order: false,
        readable_only: false,
        base,
    };
    let areas = driver.memory().areas::<D::Format>();
    let journal = Recorder(send, 40);
    let mut vq = Virtqueue::<D::Format, _>::with_journal(rig.ram, areas, &config, journal).unwrap();
    let ids: Vec<_> = (0..2)
        .map(|_| driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap())
        .collect();
    driver.publish();
    let mut pop = || match vq.pop(&mut segments).unwrap() {
        Popped::Chain(chain) => chain,
        other => panic!("{other:?}"),
    };
    let (first, second) = (pop(), pop());
    assert_eq!((first.id.entry(), second.id.entry()), (41, 42));
    vq.unpop(second.id);
    vq.put_used(first.id, 8, &[]);
    vq.publish();
    let expected = [
        format!("took {}", ids[0]),
        format!("took {}", ids[1]),
        "gave back 42".into(),
        "staged 41".into(),
        "begin".into(),
        "end".into(),
    ];
    assert_eq!(steps.try_iter().collect::<Vec<_>>(), expected);
}
