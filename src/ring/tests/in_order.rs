//! VIRTIO_F_IN_ORDER on packed rings: one used descriptor for a run of chains (VIRTIO 1.3
//! §2.8.8).

use super::*;

/// A ring of 64 on which chains are used in order.
fn ring(rig: &Rig<PackedDriver>) -> Virtqueue<Packed> {
    let config = RingConfig {
        size: 64,
        event_idx: false,
        indirect: true,
        in_order: true,
        readable_only: false,
        base: VringBase::fresh(true),
    };
    let areas = rig.driver.memory().areas::<Packed>();
    Virtqueue::new(Arc::clone(&rig.ram), areas, &config).unwrap()
}

/// (id, len) of the slot when it is used in the first lap.
/// VIRTIO 1.3 §2.8.13: the id in bits 32 to 47 of the second word, the flags behind it.
fn used(rig: &Rig<PackedDriver>, slot: usize) -> Option<(u64, u64)> {
    let word = rig.driver.raw().desc.load64(slot * 16 + 8);
    let flags = word >> 48;
    // AVAIL and USED, both as the wrap counter of the first lap.
    (flags & 0x8080 == 0x8080).then_some(((word >> 32) & 0xffff, word & 0xffff_ffff))
}

fn take(rig: &mut Rig<PackedDriver>) -> Chain {
    rig.pop().expect("a chain")
}

#[test]
fn a_run_of_chains_that_were_only_read_is_one_used_descriptor() {
    let mut rig = Rig::<PackedDriver>::new(64);
    rig.vq = ring(&rig);
    let sent: Vec<u16> = (0..40)
        .map(|i| {
            // Every fourth chain has two descriptors.
            let bufs = vec![Buf::readable(BUFFERS, 8); if i % 4 == 3 { 2 } else { 1 }];
            rig.driver.add(&bufs).unwrap()
        })
        .collect();
    rig.driver.publish();
    let chains: Vec<_> = (0..40).map(|_| take(&mut rig)).collect();
    for chain in chains {
        rig.vq.put_used(chain.id, 0, &[]);
    }
    rig.vq.publish();
    // 32 chains in 40 slots, then 8 in 10: one descriptor each, with the id of the last.
    assert_eq!(used(&rig, 0), Some((u64::from(sent[31]), 0)));
    assert_eq!(used(&rig, 40), Some((u64::from(sent[39]), 0)));
    for slot in (1..40).chain(41..50) {
        assert_eq!(used(&rig, slot), None, "slot {slot} was not written");
    }
    assert_eq!(rig.vq.base().used, 50 | 0x8000);
    assert_eq!(rig.vq.in_flight(), 0);
}

#[test]
fn a_chain_that_was_written_ends_the_run_and_has_a_descriptor_of_its_own() {
    let mut rig = Rig::<PackedDriver>::new(64);
    rig.vq = ring(&rig);
    let ids: Vec<u16> = [false, false, true, true, false]
        .into_iter()
        .map(|write| {
            let buf = if write {
                Buf::writable(BUFFERS, 8)
            } else {
                Buf::readable(BUFFERS, 8)
            };
            rig.driver.add(&[buf]).unwrap()
        })
        .collect();
    rig.driver.publish();
    let chains: Vec<_> = (0..5).map(|_| take(&mut rig)).collect();
    for (chain, written) in chains.into_iter().zip([0, 0, 5, 8, 0]) {
        rig.vq.put_used(chain.id, written, &[]);
    }
    assert_eq!(used(&rig, 0), None, "nothing is visible before publish");
    rig.vq.publish();
    let id = |at: usize| u64::from(ids[at]);
    assert_eq!(used(&rig, 0), Some((id(1), 0)));
    assert_eq!(used(&rig, 1), None);
    assert_eq!(used(&rig, 2), Some((id(2), 5)));
    assert_eq!(used(&rig, 3), Some((id(3), 8)));
    assert_eq!(used(&rig, 4), Some((id(4), 0)));
}

/// WRITE in a used descriptor says that its length counts (VIRTIO 1.3 §2.8.4), in that of one chain
/// and in that of a run.
#[test]
fn a_used_descriptor_says_whether_its_length_counts() {
    let mut rig = Rig::<PackedDriver>::new(64);
    rig.vq = ring(&rig);
    let lens = [0, 0, 5, u32::MAX, 0];
    for _ in lens {
        rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
    }
    rig.driver.publish();
    for written in lens {
        let chain = take(&mut rig);
        rig.use_chain(chain, written);
    }
    rig.vq.publish();
    let says = |slot: usize| {
        let flags = rig.driver.raw().desc.load64(slot * 16 + 8) >> 48;
        used(&rig, slot).map(|(_, len)| (flags & u64::from(Desc::WRITE) != 0, len))
    };
    assert_eq!(says(0), Some((false, 0)), "the run of the first two");
    assert_eq!(says(2), Some((true, 5)));
    assert_eq!(says(3), Some((true, u64::from(u32::MAX))));
    assert_eq!(says(4), Some((false, 0)));
}

#[test]
fn a_run_is_never_longer_than_the_ring() {
    let mut rig = Rig::<PackedDriver>::new(1);
    let config = RingConfig {
        in_order: true,
        ..rig.driver.memory().config::<Packed>()
    };
    rig.vq = rig.driver.memory().device_with(&config);
    // The driver gives the one descriptor again before it was told that it is used.
    let flags = [0x80, 0x8000, 0x80, 0x8000];
    for (lap, flags) in flags.into_iter().enumerate() {
        let areas = rig.driver.raw();
        areas.desc.store64(0, BUFFERS);
        areas.desc.store64(8, 8 | (flags << 48));
        let chain = take(&mut rig);
        rig.use_chain(chain, 0);
        let wrap = if lap % 2 == 0 { 0 } else { 0x8000 };
        assert_eq!(rig.vq.base().used, wrap, "lap {lap}");
    }
    rig.vq.publish();
    assert_eq!(rig.vq.base().used, 0x8000);
    assert_eq!((rig.vq.in_flight(), rig.vq.fault()), (0, None));
    rig.driver.add(&[Buf::writable(BUFFERS, 8)]).unwrap();
    rig.driver.publish();
    let chain = take(&mut rig);
    rig.use_chain(chain, 5);
    rig.vq.publish();
    assert_eq!(used(&rig, 0), Some((0, 5)));
}
