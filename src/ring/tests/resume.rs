//! Where a ring goes on: when a split ring's base and indexes in memory differ, and when base 0 of
//! a packed ring is the truth.

use super::*;

const SIZE: u16 = 8;

/// A ring with nothing in flight whose indexes stand at `used`, and three chains available. They
/// are taken by a device side that is told `base`: how many it finds, each of which comes back
/// to the driver with its own id.
fn found(used: u16, base: u16) -> u16 {
    let mut rig = Rig::<SplitDriver>::new(SIZE);
    let stands = |avail| VringBase { avail, used: avail };
    let memory = rig.driver.memory().clone();
    rig.driver = SplitDriver::standing_at(&memory, true, stands(used));
    let ids: Vec<_> = (0..3)
        .map(|_| rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap())
        .collect();
    rig.driver.publish();
    rig.vq = memory.device_at::<Split>(true, stands(base));
    let mut chains = 0;
    while let Some(chain) = rig.pop() {
        rig.use_chain(chain, 0);
        chains += 1;
    }
    rig.vq.publish();
    for &id in ids.iter().take(usize::from(chains)) {
        assert_eq!(rig.driver.used(), Some((id, 0)));
    }
    assert_eq!(rig.driver.used(), None);
    chains
}

#[test]
fn a_base_of_a_front_end_that_lost_count_gives_way_to_the_used_index() {
    // A whole lap and more behind, then less than a lap: the old entries look available again.
    for used in [SIZE, 300, 40_000, 2, 5] {
        assert_eq!(found(used, 0), 3, "used index {used}");
    }
    // Just before the index wraps, 0 looks like buffers in flight.
    assert_eq!(found(65_534, 0), 3);
    assert_eq!(found(301, 300), 3);
}

#[test]
fn a_base_that_is_the_used_index_or_ahead_of_it_counts() {
    assert_eq!(found(0, 0), 3);
    assert_eq!(found(300, 300), 3);
    // One was in flight when the back-end before this one ended.
    let mut rig = Rig::<SplitDriver>::new(SIZE);
    let first = rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    let second = rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    rig.driver.publish();
    let base = VringBase { avail: 1, used: 1 };
    rig.vq = rig.driver.memory().device_at::<Split>(true, base);
    let chain = rig.pop().expect("the one that was not taken");
    rig.use_chain(chain, 0);
    rig.vq.publish();
    assert_eq!(rig.driver.used(), Some((second, 0)));
    assert!(rig.pop().is_none());
    assert_ne!(first, second);
}

#[test]
fn a_base_counts_when_the_indexes_in_memory_contradict_each_other() {
    let mut rig = Rig::<SplitDriver>::new(SIZE);
    let memory = rig.driver.memory().clone();
    let base = VringBase {
        avail: 500,
        used: 500,
    };
    rig.driver = SplitDriver::standing_at(&memory, true, base);
    // The used index of a ring that was there before.
    rig.driver.raw().device.store16(2, 100);
    rig.vq = memory.device_at::<Split>(true, base);
    rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    rig.driver.publish();
    let chain = rig.pop().expect("a chain");
    rig.use_chain(chain, 0);
    rig.vq.publish();
    assert_eq!(rig.driver.raw().device.load16(2), 501);
}

/// A packed ring of 4 on which bursts of chains, of so many descriptors each, were used; it then
/// stands, drained, at its first slot in the second lap.
fn packed_at_zero(in_order: bool, bursts: &[&[usize]]) {
    let mut rig = Rig::<PackedDriver>::new(4);
    let memory = rig.driver.memory().clone();
    let config = RingConfig {
        event_idx: true,
        in_order,
        ..memory.config::<Packed>()
    };
    rig.driver.set_in_order(in_order);
    rig.vq = memory.device_with(&config);
    for burst in bursts {
        go_round(&mut rig, burst);
    }
    let base = rig.vq.base().to_u32(true);
    assert_eq!(base, 0, "drained at the first slot");
    let base = VringBase::from_u32(true, base);
    rig.vq = memory.device_with(&RingConfig { base, ..config });
    assert!(rig.pop().is_none(), "the driver made nothing available");
    for _ in 0..3 {
        go_round(&mut rig, &[1, 2]);
    }
}

/// Chains there and back.
fn go_round(rig: &mut Rig<PackedDriver>, chains: &[usize]) {
    let ids: Vec<_> = chains
        .iter()
        .map(|&count| rig.driver.add(&vec![Buf::readable(BUFFERS, 8); count]))
        .collect();
    rig.driver.publish();
    let popped: Vec<_> = ids.iter().map(|_| rig.pop().expect("a chain")).collect();
    assert!(rig.pop().is_none());
    for chain in popped {
        rig.vq.put_used(chain.id, 0, &[]);
    }
    rig.vq.publish();
    for id in ids {
        assert_eq!(rig.driver.used().map(|used| used.0), id);
    }
    assert_eq!(rig.driver.used(), None);
}

#[test]
fn base_zero_is_the_truth_after_a_chain_over_the_end_of_the_ring() {
    // The third chain of the second lap ends in slot 0, which nobody writes to in the third.
    packed_at_zero(false, &[&[2], &[2], &[2], &[1], &[2], &[1], &[1], &[1]]);
    packed_at_zero(true, &[&[2], &[2], &[2], &[1], &[2], &[1], &[1], &[1]]);
}

#[test]
fn base_zero_is_the_truth_after_a_run_over_the_end_of_the_ring() {
    packed_at_zero(true, &[&[1; 4], &[1; 2], &[1; 3], &[1; 3]]);
    // One used descriptor for a whole lap is in the first slot, or the lap does not end with it.
    packed_at_zero(true, &[&[1; 4]]);
    packed_at_zero(true, &[&[4]]);
    packed_at_zero(false, &[&[4], &[4], &[4]]);
}
