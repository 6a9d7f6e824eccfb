//! VIRTIO_F_IN_ORDER on split rings: one used element for a batch of chains that nothing was
//! written to (VIRTIO 1.3 §2.7.9).

use super::*;

const SIZE: u16 = 64;
/// What stands in every place of the used ring at first.
const NOTHING: (u32, u32) = (0xdead_beef, 0xdead_beef);

/// A ring on which chains are used in order, standing at `base`.
fn rig_at(size: u16, event_idx: bool, base: u16) -> Rig<SplitDriver> {
    let mut rig = Rig::<SplitDriver>::with(size, event_idx);
    let memory = rig.driver.memory().clone();
    let base = VringBase {
        avail: base,
        used: base,
    };
    rig.driver = SplitDriver::standing_at(&memory, event_idx, base);
    rig.driver.set_in_order(true);
    for place in 0..usize::from(size) {
        rig.driver.raw().device.store32(4 + 8 * place, NOTHING.0);
        rig.driver.raw().device.store32(8 + 8 * place, NOTHING.1);
    }
    rig.vq = go_on(&rig, event_idx, base);
    rig
}

fn go_on(rig: &Rig<SplitDriver>, event_idx: bool, base: VringBase) -> Virtqueue<Split> {
    let memory = rig.driver.memory();
    memory.device_with(&RingConfig {
        event_idx,
        in_order: true,
        base,
        ..memory.config::<Split>()
    })
}

/// The element in a place of the used ring.
fn element(rig: &Rig<SplitDriver>, place: u16) -> (u32, u32) {
    let at = 4 + 8 * usize::from(place);
    let device = &rig.driver.raw().device;
    (device.load32(at), device.load32(at + 4))
}

fn index(rig: &Rig<SplitDriver>) -> u16 {
    rig.driver.raw().device.load16(2)
}

/// Gives a chain of one buffer for each length: one that is read for 0, else one of that length
/// that is written. Returns their heads.
fn give(rig: &mut Rig<SplitDriver>, lens: &[u32]) -> Vec<u16> {
    let buf = |&len: &u32| match len {
        0 => Buf::readable(BUFFERS, 8),
        len => Buf::writable(BUFFERS, len),
    };
    let heads = lens.iter().map(|len| rig.driver.add(&[buf(len)]).unwrap());
    let heads = heads.collect();
    rig.driver.publish();
    heads
}

/// Takes as many chains as there are lengths and uses them with these.
fn use_all(rig: &mut Rig<SplitDriver>, lens: &[u32]) {
    let chains: Vec<_> = lens.iter().map(|_| rig.pop().expect("a chain")).collect();
    for (chain, &len) in chains.into_iter().zip(lens) {
        rig.vq.put_used(chain.id, len, &[]);
    }
}

fn reap(rig: &mut Rig<SplitDriver>, heads: &[u16], lens: &[u32]) {
    for (&head, &len) in heads.iter().zip(lens) {
        assert_eq!(rig.driver.used(), Some((head, len)));
    }
    assert_eq!(rig.driver.used(), None);
}

#[test]
fn a_batch_of_chains_that_were_only_read_is_one_used_element() {
    for count in [1, 2, 40, SIZE] {
        let mut rig = rig_at(SIZE, false, 0);
        let lens = vec![0; usize::from(count)];
        let heads = give(&mut rig, &lens);
        use_all(&mut rig, &lens);
        assert_eq!((index(&rig), rig.driver.used()), (0, None));
        assert_eq!(rig.vq.base().used, count);
        rig.vq.publish();
        // In the place of the first, with the head of the last.
        let last = u32::from(heads[heads.len() - 1]);
        assert_eq!(element(&rig, 0), (last, 0));
        for place in 1..SIZE {
            assert_eq!(element(&rig, place), NOTHING, "place {place} of {count}");
        }
        assert_eq!((index(&rig), rig.vq.in_flight()), (count, 0));
        reap(&mut rig, &heads, &lens);
    }
}

#[test]
fn chains_of_several_descriptors_are_batched_by_their_heads() {
    let mut rig = rig_at(SIZE, false, 0);
    let heads: Vec<u16> = (1..=5)
        .map(|count| rig.driver.add(&vec![Buf::readable(BUFFERS, 8); count]))
        .map(Option::unwrap)
        .collect();
    assert_eq!(heads, [0, 1, 3, 6, 10], "in ring order");
    rig.driver.publish();
    use_all(&mut rig, &[0; 5]);
    rig.vq.publish();
    assert_eq!((element(&rig, 0), element(&rig, 1)), ((10, 0), NOTHING));
    assert_eq!(index(&rig), 5, "by chains, not by descriptors");
    reap(&mut rig, &heads, &[0; 5]);
}

#[test]
fn a_chain_that_was_written_ends_the_batch_and_has_an_element_of_its_own() {
    let mut rig = rig_at(SIZE, false, 0);
    let lens = [0, 0, 5, 8, 0, 0, 0, 7];
    let heads = give(&mut rig, &lens);
    use_all(&mut rig, &lens);
    assert_eq!(index(&rig), 0, "nothing is visible before publish");
    rig.vq.publish();
    let head = |at: usize| u32::from(heads[at]);
    let found = [0, 1, 2, 3, 4, 5, 6, 7, 8].map(|place| element(&rig, place));
    let (batch, other) = ((head(1), 0), (head(6), 0));
    let (five, eight, seven) = ((head(2), 5), (head(3), 8), (head(7), 7));
    let expected = [
        batch, NOTHING, five, eight, other, NOTHING, NOTHING, seven, NOTHING,
    ];
    assert_eq!(found, expected);
    assert_eq!(index(&rig), 8);
    reap(&mut rig, &heads, &lens);
}

#[test]
fn simple_chains_are_batched_with_the_others() {
    let mut rig = rig_at(SIZE, false, 0);
    let lens = [0, 0, 0, 9, 0, 0];
    let heads = give(&mut rig, &lens);
    let first = rig.pop().expect("a chain");
    let mut singles = [const { Single::EMPTY }; 5];
    assert_eq!(rig.vq.pop_singles(false, &mut singles), 2);
    assert_eq!(rig.vq.pop_singles(true, &mut singles[2..]), 1);
    assert_eq!(rig.vq.pop_singles(false, &mut singles[3..]), 2);
    rig.vq.put_used(first.id, 0, &[]);
    rig.vq.put_used_singles(&singles, lens[1..].iter().copied());
    rig.vq.publish();
    let places = [0, 1, 2, 3, 4, 5].map(|place| element(&rig, place));
    let head = |at: usize, len| (u32::from(heads[at]), len);
    let expected = [
        head(2, 0),
        NOTHING,
        NOTHING,
        head(3, 9),
        head(5, 0),
        NOTHING,
    ];
    assert_eq!(places, expected);
    reap(&mut rig, &heads, &lens);
}

#[test]
fn a_batch_goes_over_the_end_of_the_ring_and_of_the_index() {
    for base in [SIZE - 3, u16::MAX - 2] {
        let mut rig = rig_at(SIZE, false, base);
        let heads = give(&mut rig, &[0; 10]);
        use_all(&mut rig, &[0; 10]);
        rig.vq.publish();
        assert_eq!(element(&rig, SIZE - 3), (u32::from(heads[9]), 0));
        for place in (0..SIZE - 3).chain(SIZE - 2..SIZE) {
            assert_eq!(element(&rig, place), NOTHING, "place {place}");
        }
        assert_eq!(index(&rig), base.wrapping_add(10));
        reap(&mut rig, &heads, &[0; 10]);
    }
}

#[test]
fn a_batch_ends_where_it_is_published() {
    let mut rig = rig_at(SIZE, false, 0);
    let heads = give(&mut rig, &[0; 7]);
    use_all(&mut rig, &[0; 3]);
    rig.vq.publish();
    use_all(&mut rig, &[0; 4]);
    rig.vq.publish();
    let places = [0, 1, 2, 3, 4].map(|place| element(&rig, place));
    let (first, second) = (u32::from(heads[2]), u32::from(heads[6]));
    let expected = [(first, 0), NOTHING, NOTHING, (second, 0), NOTHING];
    assert_eq!((places, index(&rig)), (expected, 7));
    reap(&mut rig, &heads, &[0; 7]);
}

#[test]
fn a_batch_passes_the_event_index_wherever_in_it_that_is() {
    // VIRTIO 1.3 §2.7.7.2: as if the index had gone from chain to chain.
    for (base, count) in [(0, 5), (SIZE - 2, 5), (65_534, 5), (7, SIZE)] {
        for ahead in 0..SIZE + 3 {
            let mut rig = rig_at(SIZE, true, base);
            rig.driver.set_calls(Calls::After(ahead));
            let lens = vec![0; usize::from(count)];
            give(&mut rig, &lens);
            use_all(&mut rig, &lens);
            let call = rig.vq.publish();
            assert_eq!(call, ahead < count, "{count} from {base}, event {ahead} on");
            assert!(!rig.vq.publish(), "nothing more to tell");
        }
    }
}

#[test]
fn a_ring_goes_on_after_a_batch_where_the_index_says() {
    let mut rig = rig_at(SIZE, false, 0);
    for round in 0..40 {
        let count = 1 + round % 11;
        let lens = vec![0; count];
        let heads = give(&mut rig, &lens);
        use_all(&mut rig, &lens);
        rig.vq.publish();
        // The driver reads the batch after the device side was started anew, at the base that it
        // gave or, by a front-end that lost count, at 0.
        let base = VringBase::from_u32(false, rig.vq.base().to_u32(false));
        let lost = VringBase::fresh(false);
        rig.vq = go_on(&rig, false, if round % 2 == 0 { base } else { lost });
        assert_eq!(rig.vq.base(), base);
        assert!(rig.pop().is_none(), "nothing comes twice");
        reap(&mut rig, &heads, &lens);
    }
}

#[test]
fn a_batch_that_was_not_published_comes_again_after_a_crash() {
    let mut rig = rig_at(SIZE, false, 0);
    let lens = [0, 0, 3, 0];
    let heads = give(&mut rig, &lens);
    use_all(&mut rig, &lens);
    // The process ends here: elements are written, the index is not.
    rig.vq = go_on(&rig, false, VringBase::fresh(false));
    assert_eq!(rig.driver.used(), None);
    use_all(&mut rig, &lens);
    rig.vq.publish();
    reap(&mut rig, &heads, &lens);
}

#[test]
fn a_batch_is_never_longer_than_the_ring() {
    let mut rig = rig_at(2, false, 0);
    // The driver gives descriptor 0 again and again before it was told that it is used, then 1.
    let areas = rig.driver.raw();
    areas.desc.store64(0, BUFFERS);
    areas.desc.store64(8, 8);
    areas.desc.store64(16, BUFFERS);
    areas.desc.store64(24, 8);
    for given in 1..=3 {
        let areas = rig.driver.raw();
        let slot = if given == 3 { 1 } else { 0 };
        areas
            .driver
            .store16(4 + 2 * usize::from((given + 1) % 2), slot);
        areas.driver.store16(2, given);
        let chain = rig.pop().expect("a chain");
        rig.vq.put_used(chain.id, 0, &[]);
    }
    // A batch of two, whose element the batch of one behind it has taken the place of.
    assert_eq!(element(&rig, 0), (0, 0), "the first batch is written");
    rig.vq.publish();
    assert_eq!((index(&rig), rig.vq.base().used), (3, 3));
    assert_eq!((element(&rig, 0), element(&rig, 1)), ((1, 0), NOTHING));
    assert_eq!((rig.vq.in_flight(), rig.vq.fault()), (0, None));
}
