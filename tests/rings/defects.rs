//! Mistakes that other back-ends were found to make, one test for each.
//!
//! More of them stand beside the code: `src/ring/tests/faults.rs` has every `RingFault` (indices
//! out of bounds, chains without an end, nested tables, impossible lengths).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vringd::memory::{GuestRam, Segments};
use vringd::ring::{
    Chain, ChainQueue, Desc, Packed, Popped, RingConfig, RingFault, RingFormat, Virtqueue,
};
use vringd::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

use super::hostile::check_inside;

const BUFFERS: u64 = 0x10_0000;
const TABLE: u64 = 0x18_0000;
const RAM: u64 = 0x40_0000;

struct Rig<D: Driver> {
    ram: Arc<GuestRam>,
    ring: RingMemory,
    driver: D,
    vq: Virtqueue<D::Format>,
    segments: Segments,
}

impl<D: Driver> Rig<D> {
    fn new(size: u16) -> Rig<D> {
        Rig::within(&GuestRam::for_test(&[(0, RAM)]), size)
    }

    fn within(ram: &Arc<GuestRam>, size: u16) -> Rig<D> {
        let ring = RingMemory::new::<D::Format>(ram, 0, size);
        Rig {
            ram: Arc::clone(ram),
            driver: D::new(&ring, true),
            vq: ring.device::<D::Format>(true),
            segments: Segments::with_capacity(70_000),
            ring,
        }
    }

    /// Goes over to the same memory, mapped once more: at another address of ours.
    fn map_again(&mut self) {
        let ram = Arc::new(GuestRam::map(self.ram.specs(), None).unwrap());
        let ring = RingMemory {
            ram: Arc::clone(&ram),
            ..self.ring.clone()
        };
        drop(self.vq.swap(ram, ring.areas::<D::Format>()));
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingFault> {
        self.segments.clear();
        Ok(match self.vq.pop(&mut self.segments)? {
            Popped::Chain(chain) => Some(chain),
            Popped::Empty => None,
            Popped::Wait => panic!("nothing to wait for"),
        })
    }
}

/// A test for each format, on rings of its own sizes.
macro_rules! both {
    ($($name:ident($split:expr, $packed:expr);)*) => {
        mod split {
            $(#[test] fn $name() {
                for size in $split { super::$name::<super::SplitDriver>(size); }
            })*
        }
        mod packed {
            $(#[test] fn $name() {
                for size in $packed { super::$name::<super::PackedDriver>(size); }
            })*
        }
    };
}

both! {
    a_chain_as_long_as_the_ring_is_legal([2, 8, 32768], [1, 7, 32768]);
    a_chain_without_an_end_is_a_fault_soon([2, 8, 32768], [1, 7, 32768]);
    a_chain_of_nothing_but_empty_buffers_is_legal([8], [7]);
    a_huge_length_is_a_fault([8], [7]);
    sums_that_wrap_are_faults([8], [7]);
    sums_that_wrap_in_a_table_are_faults([8], [7]);
    a_table_at_the_end_of_the_address_space_is_a_fault([8], [7]);
    a_table_named_from_within_itself_is_a_fault([8], [7]);
    a_descriptor_rewritten_meanwhile_never_leaves_memory([8], [7]);
    what_is_staged_before_a_swap_is_shown_after_it([8], [7]);
    a_batch_is_shown_after_a_swap_in_the_middle_of_it([8], [7]);
    writable_before_readable_in_a_table_is_a_fault([8], [7]);
    a_ring_latched_from_outside_gives_out_nothing_in_any_way([8], [7]);
}

fn a_chain_as_long_as_the_ring_is_legal<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for lap in 0..3 {
        let bufs: Vec<_> = (0..u64::from(size))
            .map(|i| Buf::writable(BUFFERS + i, 1))
            .collect();
        let id = rig.driver.add(&bufs).unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap().unwrap();
        assert_eq!(
            (chain.writable, chain.writable_bytes),
            (size.into(), size.into())
        );
        rig.vq.put_used(chain.id, lap, &[]);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), Some((id, lap)));
    }
}

fn a_chain_without_an_end_is_a_fault_soon<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let descs = vec![(Buf::readable(BUFFERS, 1), Desc::NEXT); usize::from(size)];
    rig.driver.add_raw(&descs).unwrap();
    rig.driver.publish();
    let start = Instant::now();
    assert_eq!(rig.pop(), Err(RingFault::ChainTooLong));
    assert!(start.elapsed() < Duration::from_secs(1));
    // A table that never ends, as long as a table can be.
    let mut rig = Rig::<D>::new(size);
    let table = Buf::readable(TABLE, 0x10_0000);
    let mut entries = D::table(&vec![Buf::readable(BUFFERS, 1); 0x1_0000]);
    if !D::Format::PACKED {
        let last = entries.last_mut().unwrap();
        last[1] |= u64::from(Desc::NEXT) << 32;
    }
    write_entries(&rig.ram, TABLE, &entries);
    rig.driver.add_raw(&[(table, Desc::INDIRECT)]).unwrap();
    rig.driver.publish();
    let fault = RingFault::IndirectTooLong;
    assert_eq!(rig.pop(), Err(fault));
}

fn write_entries(ram: &GuestRam, gpa: u64, entries: &[[u64; 2]]) {
    let words = entries.iter().flatten();
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    write_guest(ram, gpa, &bytes);
}

fn a_chain_of_nothing_but_empty_buffers_is_legal<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let empty = [Buf::readable(0, 0), Buf::writable(u64::MAX, 0)];
    for indirect in [false, true] {
        let id = if indirect {
            rig.driver.add_indirect(&empty, TABLE)
        } else {
            rig.driver.add(&empty)
        };
        rig.driver.publish();
        assert!(rig.vq.pop_single(false).is_none() && rig.vq.pop_single(true).is_none());
        let chain = rig.pop().unwrap().unwrap();
        assert_eq!((chain.readable, chain.writable), (0, 0));
        rig.vq.put_used(chain.id, 0, &[]);
        rig.vq.publish();
        assert_eq!(rig.driver.used(), id.map(|id| (id, 0)));
    }
}

fn a_huge_length_is_a_fault<D: Driver>(size: u16) {
    for write in [false, true] {
        for len in [u32::MAX, 1 << 31, u32::try_from(RAM - BUFFERS + 1).unwrap()] {
            let huge = Buf {
                addr: BUFFERS,
                len,
                write,
            };
            let mut rig = Rig::<D>::new(size);
            rig.driver.add(&[huge]).unwrap();
            rig.driver.publish();
            assert!(rig.vq.pop_single(false).is_none() && rig.vq.pop_single(true).is_none());
            assert_eq!(rig.pop(), Err(RingFault::Unmapped));
        }
    }
}

/// Chains whose sums pass what their words hold, each with the fault that names it.
fn wrapping() -> Vec<(Vec<Buf>, RingFault)> {
    let small = Buf::readable(BUFFERS, 0x1000);
    vec![
        (vec![Buf::readable(u64::MAX - 7, 16)], RingFault::Unmapped),
        (vec![Buf::writable(u64::MAX, 2)], RingFault::Unmapped),
        (
            vec![small, Buf::readable(0, u32::MAX)],
            RingFault::ChainBytes,
        ),
        (
            vec![small, Buf::writable(0, u32::MAX)],
            RingFault::ChainBytes,
        ),
    ]
}

fn sums_that_wrap_are_faults<D: Driver>(size: u16) {
    for (bufs, fault) in wrapping() {
        let mut rig = Rig::<D>::new(size);
        rig.driver.add(&bufs).unwrap();
        rig.driver.publish();
        assert_eq!(rig.pop(), Err(fault), "{bufs:?}");
    }
}

fn sums_that_wrap_in_a_table_are_faults<D: Driver>(size: u16) {
    for (bufs, fault) in wrapping() {
        let mut rig = Rig::<D>::new(size);
        rig.driver.add_indirect(&bufs, TABLE).unwrap();
        rig.driver.publish();
        assert_eq!(rig.pop(), Err(fault), "{bufs:?}");
    }
}

fn a_table_at_the_end_of_the_address_space_is_a_fault<D: Driver>(size: u16) {
    for addr in [u64::MAX, u64::MAX - 15, u64::MAX - 31, RAM - 16, RAM - 8] {
        let mut rig = Rig::<D>::new(size);
        if addr == RAM - 16 {
            // The first entry is in memory still, the second is not.
            let more = D::table(&[Buf::readable(BUFFERS, 8); 2]);
            write_entries(&rig.ram, addr, &more[..1]);
        }
        let table = (Buf::readable(addr, 32), Desc::INDIRECT);
        rig.driver.add_raw(&[table]).unwrap();
        rig.driver.publish();
        assert_eq!(rig.pop(), Err(RingFault::Unmapped), "{addr:#x}");
    }
}

fn a_table_named_from_within_itself_is_a_fault<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let shift = if D::Format::PACKED { 48 } else { 32 };
    let mut entries = D::table(&[Buf::readable(TABLE, 16)]);
    entries[0][1] |= u64::from(Desc::INDIRECT) << shift;
    write_entries(&rig.ram, TABLE, &entries);
    let table = (Buf::readable(TABLE, 16), Desc::INDIRECT);
    rig.driver.add_raw(&[table]).unwrap();
    rig.driver.publish();
    assert_eq!(rig.pop(), Err(RingFault::IndirectNested));
}

/// VIRTIO 1.3 §2.7.4.2.
fn writable_before_readable_in_a_table_is_a_fault<D: Driver>(size: u16) {
    let bufs = [Buf::writable(BUFFERS, 8), Buf::readable(BUFFERS, 8)];
    let mut rig = Rig::<D>::new(size);
    rig.driver.add_indirect(&bufs, TABLE).unwrap();
    rig.driver.publish();
    assert_eq!(rig.pop(), Err(RingFault::ReadableAfterWritable));
    // An empty one counts as well: the order is that of descriptors.
    let mut rig = Rig::<D>::new(size);
    let bufs = [Buf::writable(BUFFERS, 0), Buf::readable(BUFFERS, 8)];
    rig.driver.add(&bufs).unwrap();
    rig.driver.publish();
    assert_eq!(rig.pop(), Err(RingFault::ReadableAfterWritable));
}

/// A thread changes both words of a descriptor, and of a table's entry, back and forth between
/// something harmless and something that reaches out of memory, while the device pops it.
fn a_descriptor_rewritten_meanwhile_never_leaves_memory<D: Driver>(size: u16) {
    const HARMLESS: u64 = BUFFERS;
    let out = [RAM - 4, u64::MAX - 3, RAM];
    let stop = AtomicBool::new(false);
    let ram = GuestRam::for_test(&[(0, RAM)]);
    // The descriptor in slot 0 names itself or a table; what is in the table changes too.
    let ring = RingMemory::new::<D::Format>(&ram, 0, size);
    let rewriter = || {
        let areas = ring.areas::<D::Format>();
        let long = RAM - BUFFERS;
        let mut turn = 0;
        while !stop.load(Ordering::Relaxed) {
            let bad = turn % 2 == 1;
            let addr = if bad { out[turn / 2 % 3] } else { HARMLESS };
            for slot in 0..usize::from(size) {
                let word = areas.desc.load64(slot * 16 + 8) & !0xffff_ffff;
                let len = if turn % 4 < 2 { 8 } else { long + 8 };
                areas.desc.store64(slot * 16, addr);
                areas.desc.store64(slot * 16 + 8, word | len);
            }
            write_guest(&ram, TABLE, &addr.to_le_bytes());
            turn += 1;
        }
    };
    let (mut good, mut bad, mut attempts) = (0, 0, 0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(rewriter);
        // At least so long, and longer on a machine that gives the other thread no time.
        while start.elapsed() < Duration::from_millis(200)
            || ((good == 0 || bad == 0) && start.elapsed() < Duration::from_secs(10))
        {
            match attacked_pop::<D>(&ram, size, attempts) {
                Some(true) => good += 1,
                Some(false) => bad += 1,
                None => {}
            }
            attempts += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
}

/// Pops one chain of a fresh ring under attack. Whether it came, or the ring broke instead; the
/// attacker may also have overwritten that it is available.
fn attacked_pop<D: Driver>(ram: &Arc<GuestRam>, size: u16, number: u32) -> Option<bool> {
    let ring = RingMemory::new::<D::Format>(ram, 0, size);
    // What the last attempt left is cleared, as a driver does that sets its ring up again.
    for area in 0..3 {
        let bytes = D::Format::area_bytes(size)[area];
        write_guest(ram, ring.at[area], &vec![0; bytes]);
    }
    let mut rig = Rig::<D>::within(ram, size);
    let buf = Buf::writable(BUFFERS, 8);
    if number.is_multiple_of(2) {
        rig.driver.add(&[buf]).unwrap();
    } else {
        rig.driver.add_indirect(&[buf, buf], TABLE).unwrap();
    }
    rig.driver.publish();
    let came = if number.is_multiple_of(4) {
        let single = rig.vq.pop_single(true);
        single.is_some_and(|single| rig.segments.push(single.segment))
    } else {
        matches!(rig.vq.pop(&mut rig.segments), Ok(Popped::Chain(_)))
    };
    for segment in rig.segments.as_slice() {
        check_inside(ram, segment);
    }
    match (came, rig.vq.fault()) {
        (true, None) => Some(true),
        (false, Some(_)) => Some(false),
        (false, None) => None,
        (true, Some(fault)) => panic!("a chain and a fault: {fault}"),
    }
}

fn a_ring_latched_from_outside_gives_out_nothing_in_any_way<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for _ in 0..2 {
        rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    }
    rig.driver.publish();
    let before = rig.pop().unwrap().unwrap();
    rig.vq.latch(RingFault::Memory);
    assert!(rig.vq.pop_single(false).is_none() && rig.vq.pop_single(true).is_none());
    assert_eq!(rig.pop(), Err(RingFault::Memory));
    assert_eq!(rig.vq.has_available(), Err(RingFault::Memory));
    assert_eq!((rig.vq.backlog(2), rig.vq.set_kicks(true)), (0, false));
    // What was taken before is answered all the same.
    rig.vq.put_used(before.id, 1, &[]);
    rig.vq.publish();
    assert_eq!(rig.driver.used().map(|used| used.1), Some(1));
}

fn what_is_staged_before_a_swap_is_shown_after_it<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap());
    }
    rig.driver.publish();
    for turn in 0..3 {
        let chain = rig.pop().unwrap().unwrap();
        rig.vq.put_used(chain.id, turn, &[]);
        rig.map_again();
        assert_eq!(rig.driver.used(), None);
    }
    rig.vq.publish();
    for (turn, id) in (0..).zip(ids) {
        assert_eq!(rig.driver.used(), Some((id, turn)));
    }
}

/// With IN_ORDER one used element stands for a batch, and is not written before it is published
/// (VIRTIO 1.3 §2.7.9, §2.8.8): who goes over to another memory table must not lose it.
fn a_batch_is_shown_after_a_swap_in_the_middle_of_it<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    rig.vq = rig.ring.device_with(&RingConfig {
        in_order: true,
        ..rig.ring.config::<D::Format>()
    });
    rig.driver.set_in_order(true);
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap());
    }
    rig.driver.publish();
    for _ in 0..3 {
        let chain = rig.pop().unwrap().unwrap();
        rig.vq.put_used(chain.id, 0, &[]);
        rig.map_again();
        assert_eq!(rig.driver.used(), None);
    }
    rig.vq.publish();
    for id in ids {
        assert_eq!(rig.driver.used(), Some((id, 0)));
    }
    assert_eq!(rig.driver.used(), None);
}

#[test]
fn a_packed_buffer_id_beyond_the_ring_is_given_back_as_it_came() {
    // Ids are the driver's own (VIRTIO 1.3 §2.8.6): nothing may be looked up by them.
    let mut rig = Rig::<PackedDriver>::new(4);
    for slot in 0..4 {
        rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
        let word = 8 | (0xffff - slot) << 32 | 0x80 << 48;
        let at = usize::try_from(slot).unwrap() * 16 + 8;
        rig.driver.publish();
        rig.driver.raw().desc.store64(at, word);
        let chain = rig.pop().unwrap().unwrap();
        assert_eq!(u64::from(chain.id.id()), 0xffff - slot);
        rig.vq.put_used(chain.id, 0, &[]);
        rig.vq.publish();
        let used = rig.driver.raw().desc.load64(at);
        assert_eq!(used >> 32 & 0xffff, 0xffff - slot);
    }
}

#[test]
fn an_avail_index_that_jumps_in_either_direction_is_a_fault() {
    for (in_flight, jump) in [(0, 5), (2, 5), (4, 5), (0, 65535), (2, 65535), (3, 0x8000)] {
        let mut rig = Rig::<SplitDriver>::new(4);
        for _ in 0..in_flight {
            rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
        }
        rig.driver.publish();
        let held: Vec<_> = core::iter::from_fn(|| rig.pop().unwrap()).collect();
        let avail = u16::try_from(held.len()).unwrap().wrapping_add(jump);
        rig.driver.raw().driver.store16(2, avail);
        assert_eq!(rig.pop(), Err(RingFault::AvailIndexJump));
        // What was popped before can still be answered.
        for chain in held {
            rig.vq.put_used(chain.id, 0, &[]);
        }
        rig.vq.publish();
        assert_eq!(rig.driver.raw().device.load16(2), in_flight);
    }
}

#[test]
fn an_avail_index_that_moves_back_over_known_chains_gives_each_out_once() {
    let mut rig = Rig::<SplitDriver>::new(4);
    for _ in 0..4 {
        rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    }
    rig.driver.publish();
    let first = rig.pop().unwrap().unwrap();
    // All four were seen; taking two of them back comes too late, and does no harm.
    rig.driver.raw().driver.store16(2, 2);
    let more = core::iter::from_fn(|| rig.pop().ok().flatten());
    let ids: Vec<_> = more.map(|chain| chain.id.id()).collect();
    assert_eq!(ids.len(), 3);
    assert!(!ids.contains(&first.id.id()));
    assert_eq!(rig.vq.fault(), Some(RingFault::AvailIndexJump));
}

#[test]
fn a_used_element_never_reaches_beyond_its_ring() {
    // The device area lies between two areas of other bytes, which stay as they are.
    let ram = GuestRam::for_test(&[(0, RAM)]);
    let mut ring = RingMemory::new::<Packed>(&ram, 0x1000, 7);
    ring.at = [0x1000, 0x2000, 0x3000];
    let mut driver = PackedDriver::new(&ring, false);
    let mut vq = ring.device::<Packed>(false);
    write_guest(&ram, 0x1000 + 7 * 16, &[0xee; 64]);
    write_guest(&ram, 0xfc0, &[0xee; 64]);
    let mut segments = Segments::with_capacity(8);
    for _ in 0..30 {
        driver.add(&[Buf::readable(BUFFERS, 8); 3]).unwrap();
        driver.publish();
        segments.clear();
        let Ok(Popped::Chain(chain)) = vq.pop(&mut segments) else {
            panic!("a chain is there");
        };
        vq.put_used(chain.id, u32::MAX, &[]);
        vq.publish();
        driver.used().unwrap();
    }
    assert_eq!(read_guest(&ram, 0x1000 + 7 * 16, 64), [0xee; 64]);
    assert_eq!(read_guest(&ram, 0xfc0, 64), [0xee; 64]);
}
