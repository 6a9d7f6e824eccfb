//! Drivers that break the rules: each test writes what an honest driver would not.

use super::*;

pub(super) fn too_long<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let count = usize::from(size);
    let mut descs = vec![(Buf::readable(BUFFERS, 8), Desc::NEXT); count];
    descs[count - 1].1 = Desc::NEXT;
    rig.driver.add_raw(&descs).unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::ChainTooLong);
}

pub(super) fn unmapped<D: Driver>(size: u16) {
    for addr in [RAM, RAM - 1, u64::MAX, u64::MAX - 1] {
        let mut rig = Rig::<D>::new(size);
        rig.driver
            .add(&[Buf::readable(BUFFERS, 8), Buf::writable(addr, 2)])
            .unwrap();
        rig.driver.publish();
        assert_eq!(rig.fault(), RingFault::Unmapped);
    }
    let mut rig = Rig::<D>::new(size);
    rig.driver
        .add_raw(&[(Buf::readable(RAM - 8, 32), Desc::INDIRECT)])
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::Unmapped);
}

/// VIRTIO 1.3 §2.7.4.2.
pub(super) fn readable_after_writable<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    rig.driver
        .add(&[Buf::writable(BUFFERS, 8), Buf::readable(BUFFERS, 8)])
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::ReadableAfterWritable);
}

/// VIRTIO 1.3 §2.7.5.3.1: a table names no table, and nothing follows it.
pub(super) fn nested<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let table = Buf::readable(BUFFERS, 16);
    let mut words = D::table(&[Buf::readable(BUFFERS + 64, 16)]);
    let shift = if D::Format::PACKED { 48 } else { 32 };
    words[0][1] |= u64::from(Desc::INDIRECT) << shift;
    let bytes: Vec<u8> = words
        .iter()
        .flatten()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    write_guest(&rig.ram, BUFFERS, &bytes);
    rig.driver.add_raw(&[(table, Desc::INDIRECT)]).unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::IndirectNested);

    let mut rig = Rig::<D>::new(size);
    rig.driver
        .add_raw(&[(table, Desc::INDIRECT | Desc::NEXT)])
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::IndirectNested);
}

/// VIRTIO 1.3 §2.7.5.3.1: a table is no longer than the ring, or than we say.
pub(super) fn odd_table<D: Driver>(size: u16) {
    for len in [0, 8, 17] {
        let mut rig = Rig::<D>::new(size);
        rig.driver
            .add_raw(&[(Buf::readable(BUFFERS, len), Desc::INDIRECT)])
            .unwrap();
        rig.driver.publish();
        assert_eq!(rig.fault(), RingFault::IndirectLength);
    }
    let mut rig = Rig::<D>::new(size);
    let long = vec![Buf::readable(BUFFERS, 1); 1025];
    rig.driver.add_indirect(&long, BUFFERS + 0x1000).unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::IndirectTooLong);
}

pub(super) fn too_many_bytes<D: Driver>(size: u16) {
    // Lengths that only together pass 2^32 - 1: three chunks of a guest with that much memory.
    let gib = 1 << 30;
    let ram = GuestRam::for_test(&[(0, 4 * gib)]);
    let memory = RingMemory::new::<D::Format>(&ram, 0, size);
    let mut vq = memory.device::<D::Format>(true);
    let mut driver = D::new(&memory, true);
    let half = Buf::readable(gib, 0x8000_0000);
    driver.add(&[half, half]).unwrap();
    driver.publish();
    let mut segments = Segments::with_capacity(16);
    assert_eq!(vq.pop(&mut segments), Err(RingFault::ChainBytes));
}

/// VIRTIO 1.3 §2.7.5.3.1.
pub(super) fn not_negotiated<D: Driver>(size: u16) {
    let ram = GuestRam::for_test(&[(0, RAM)]);
    let memory = RingMemory::new::<D::Format>(&ram, 0, size);
    let base = VringBase::fresh(D::Format::PACKED);
    let config = RingConfig {
        size,
        event_idx: false,
        indirect: false,
        in_order: false,
        readable_only: false,
        base,
    };
    let areas = memory.areas::<D::Format>();
    let mut vq = Virtqueue::<D::Format>::new(Arc::clone(&ram), areas, &config).unwrap();
    let mut driver = D::new(&memory, false);
    driver
        .add_indirect(&[Buf::readable(BUFFERS, 8)], BUFFERS + 64)
        .unwrap();
    driver.publish();
    let mut segments = Segments::with_capacity(16);
    assert_eq!(vq.pop(&mut segments), Err(RingFault::IndirectNotNegotiated));
}

#[test]
fn a_missing_translation_is_waited_for_and_the_chain_comes_later() {
    let regions = [(0, RAM)];
    let ram = GuestRam::for_test(&regions).asking_for(RAM..2 * RAM);
    let memory = RingMemory::new::<Packed>(&ram, 0, 4);
    let mut vq = memory.device::<Packed>(true);
    let mut driver = PackedDriver::new(&memory, true);
    driver
        .add(&[Buf::readable(BUFFERS, 8), Buf::writable(RAM + 64, 8)])
        .unwrap();
    driver.publish();
    let mut segments = Segments::with_capacity(16);
    let base = vq.base();
    // More often than a burst may walk descriptors: nothing is published meanwhile.
    for _ in 0..20_000 {
        assert_eq!(vq.pop(&mut segments), Ok(Popped::Wait));
    }
    assert!(segments.is_empty());
    assert_eq!(
        (vq.base(), vq.fault()),
        (base, None),
        "the cursor has not moved"
    );
    // The translation comes, as another table.
    let first = ram.specs().remove(0);
    let second = GuestRam::for_test(&[(RAM, RAM)]).specs().remove(0);
    let whole = Arc::new(GuestRam::map(vec![first, second], Some(&ram)).unwrap());
    let areas = RingMemory {
        ram: Arc::clone(&whole),
        ..memory
    }
    .areas::<Packed>();
    drop(vq.swap(whole, areas));
    assert!(matches!(vq.pop(&mut segments), Ok(Popped::Chain(_))));
    // What nobody asked for is a fault as ever.
    driver.add(&[Buf::readable(2 * RAM, 8)]).unwrap();
    driver.publish();
    assert_eq!(vq.pop(&mut segments), Err(RingFault::Unmapped));
}

#[test]
fn a_write_flag_on_a_packed_transmit_header_is_ignored() {
    // What DPDK's virtio-user sends for a frame of several buffers (docs/decisions/0006).
    let table = [Buf::writable(BUFFERS, 12), Buf::readable(BUFFERS + 64, 100)];
    for readable_only in [true, false] {
        let mut rig = Rig::<PackedDriver>::new(4);
        let base = VringBase::fresh(true);
        let config = RingConfig {
            in_order: false,
            size: 4,
            event_idx: true,
            indirect: true,
            readable_only,
            base,
        };
        let areas = rig.driver.memory().areas::<Packed>();
        rig.vq = Virtqueue::new(Arc::clone(&rig.ram), areas, &config).unwrap();
        rig.driver.add_indirect(&table, BUFFERS + 0x1000).unwrap();
        rig.driver.publish();
        if readable_only {
            let chain = rig.pop().unwrap();
            assert_eq!((chain.readable_bytes, chain.writable_bytes), (112, 0));
            rig.use_chain(chain, 0);
        } else {
            assert_eq!(rig.fault(), RingFault::ReadableAfterWritable);
        }
    }
}

#[test]
fn an_avail_index_that_jumps_is_a_fault() {
    let mut rig = Rig::<SplitDriver>::new(4);
    rig.driver.raw().driver.store16(2, 5);
    assert_eq!(rig.fault(), RingFault::AvailIndexJump);

    // Seen first by somebody who only looks: the pop after it must not walk on with that index.
    for look in [
        |vq: &mut Virtqueue<Split>| assert!(vq.set_kicks(true), "counts as work"),
        |vq: &mut Virtqueue<Split>| assert_eq!(vq.backlog(8), 8, "ends a wait"),
    ] {
        let mut rig = Rig::<SplitDriver>::new(4);
        rig.driver.raw().driver.store16(2, 5);
        look(&mut rig.vq);
        assert_eq!(rig.fault(), RingFault::AvailIndexJump);
    }
}

/// VIRTIO 1.3 §2.7.5: `next` is an index into the table.
#[test]
fn a_head_or_next_outside_the_table_is_a_fault() {
    let mut rig = Rig::<SplitDriver>::new(4);
    rig.driver.raw().driver.store16(4, 4);
    rig.driver.raw().driver.store16(2, 1);
    assert_eq!(rig.fault(), RingFault::DescIndex);

    let mut rig = Rig::<SplitDriver>::new(4);
    let head = rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    let next = 8 | (u64::from(Desc::NEXT) << 32) | (4 << 48);
    rig.driver
        .raw()
        .desc
        .store64(usize::from(head) * 16 + 8, next);
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::DescIndex);
}

#[test]
fn an_indirect_next_outside_its_table_is_a_fault() {
    let mut rig = Rig::<SplitDriver>::new(4);
    let entry = [BUFFERS, 8 | (u64::from(Desc::NEXT) << 32) | (1 << 48)];
    let bytes: Vec<u8> = entry.iter().flat_map(|w| w.to_le_bytes()).collect();
    write_guest(&rig.ram, BUFFERS + 64, &bytes);
    rig.driver
        .add_raw(&[(Buf::readable(BUFFERS + 64, 16), Desc::INDIRECT)])
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::DescIndex);
}

#[test]
fn an_indirect_table_that_loops_is_a_fault() {
    let mut rig = Rig::<SplitDriver>::new(4);
    let entry = [BUFFERS, 8 | (u64::from(Desc::NEXT) << 32)];
    let bytes: Vec<u8> = entry.iter().flat_map(|w| w.to_le_bytes()).collect();
    write_guest(&rig.ram, BUFFERS + 64, &bytes);
    rig.driver
        .add_raw(&[(Buf::readable(BUFFERS + 64, 16), Desc::INDIRECT)])
        .unwrap();
    rig.driver.publish();
    assert_eq!(rig.fault(), RingFault::IndirectTooLong);
}

#[test]
fn the_same_head_made_available_for_ever_is_a_fault() {
    // Split: nothing is ever used, the index only moves on.
    let mut rig = Rig::<SplitDriver>::new(4);
    rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    rig.driver.publish();
    let mut faulted = false;
    for idx in 1..=8u16 {
        rig.driver.raw().driver.store16(2, idx);
        rig.segments.clear();
        match rig.vq.pop(&mut rig.segments) {
            Ok(Popped::Chain(_)) => assert!(idx <= 4),
            Err(fault) => {
                assert_eq!(fault, RingFault::TooManyInFlight);
                faulted = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(faulted);
}

#[test]
fn a_packed_driver_that_overruns_its_ring_is_a_fault() {
    let mut rig = Rig::<PackedDriver>::new(2);
    for _ in 0..2 {
        rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    }
    rig.driver.publish();
    let held = [rig.pop().unwrap(), rig.pop().unwrap()];
    // Second lap (wrap counter 0) over slots that are still ours.
    let word = 8 | (u64::from(1u16 << 15) << 48);
    rig.driver.raw().desc.store64(8, word);
    assert_eq!(rig.fault(), RingFault::TooManyInFlight);
    assert_eq!(held.map(|chain| chain.id.id()), [0, 1]);
}

/// VIRTIO 1.3 §2.7, §2.8.10.1: powers of two on split rings, any size on packed ones.
#[test]
fn impossible_sizes_and_bases_are_refused() {
    let ram = GuestRam::for_test(&[(0, RAM)]);
    let base = VringBase::default();
    let config = |size, base| RingConfig {
        size,
        event_idx: true,
        indirect: true,
        in_order: false,
        readable_only: false,
        base,
    };
    let split = RingMemory::new::<Split>(&ram, 0, 8);
    for size in [0, 3, 24] {
        let error = Split::new(split.areas::<Split>(), &config(size, base)).unwrap_err();
        assert_eq!(error, RingFault::Size);
    }
    let error = Split::new(split.areas::<Split>(), &config(16, base)).unwrap_err();
    assert_eq!(error, RingFault::Areas);
    let packed = RingMemory::new::<Packed>(&ram, 0, 8);
    let error = Packed::new(packed.areas::<Packed>(), &config(0, base)).unwrap_err();
    assert_eq!(error, RingFault::Size);
    let error = Packed::new(packed.areas::<Packed>(), &config(9, base)).unwrap_err();
    assert_eq!(error, RingFault::Areas);
    for (avail, used) in [(8, 0), (0, 8), (0x8008, 0)] {
        let base = VringBase { avail, used };
        let error = Packed::new(packed.areas::<Packed>(), &config(8, base)).unwrap_err();
        assert_eq!(error, RingFault::Base);
    }
}

#[test]
fn the_base_keeps_all_32_bits() {
    for num in [0u32, 0x8000_8000, 0x8046_804d, 0x0046_004d] {
        assert_eq!(VringBase::from_u32(true, num).to_u32(true), num);
    }
    // DPDK's virtio-user knows only the low half.
    let half = VringBase::from_u32(true, 0x8000);
    assert_eq!(half, VringBase::fresh(true));
    assert_eq!(VringBase::from_u32(false, 0xffff).to_u32(false), 0xffff);
}

#[test]
fn a_latched_fault_from_outside_stops_the_ring() {
    let mut rig = Rig::<PackedDriver>::new(4);
    rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    rig.driver.publish();
    rig.vq.latch(RingFault::Memory);
    assert_eq!(rig.fault(), RingFault::Memory);
}
