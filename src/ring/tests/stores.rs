//! What the device side stores to the ring for a burst with VIRTIO_F_IN_ORDER, word by word: what
//! lets the driver go on comes once and last, whatever the format and the direction
//! (docs/decisions/0015).

use crate::memory::watch;

use super::*;

const SIZE: u16 = 256;
const BURST: usize = 100;
/// Bytes of the first frame of a burst that was received; each has one more.
const FIRST: u32 = 64;

/// Ring, and what is stored for a burst of simple chains, used with `lens` one by one or at once.
fn stores<D: Driver>(rig: &mut Rig<D>, lens: &[u32], at_once: bool) -> Vec<usize> {
    let write = lens[0] > 0;
    let ids: Vec<_> = (0..lens.len() as u64)
        .map(|i| Buf {
            addr: BUFFERS + 4096 * i,
            len: 2048,
            write,
        })
        .map(|buf| rig.driver.add(&[buf]).unwrap())
        .collect();
    rig.driver.publish();
    let mut singles: Vec<_> = lens.iter().map(|_| Single::EMPTY).collect();
    assert_eq!(rig.vq.pop_singles(write, &mut singles), lens.len());
    let ((), stored) = watch::stores(|| {
        if at_once {
            rig.vq.put_used_singles(&singles, lens.iter().copied());
        } else {
            for (single, &len) in singles.iter_mut().zip(lens) {
                rig.vq.put_used(single.take_id(), len, &[]);
            }
        }
        rig.vq.publish();
    });
    for (&id, &len) in ids.iter().zip(lens) {
        assert_eq!(rig.driver.used(), Some((id, len)));
    }
    assert_eq!(rig.driver.used(), None);
    stored
}

fn rig<D: Driver>() -> Rig<D> {
    let mut rig = Rig::<D>::with(SIZE, false);
    let memory = rig.driver.memory().clone();
    rig.driver.set_in_order(true);
    rig.vq = memory.device_with(&RingConfig {
        in_order: true,
        ..memory.config::<D::Format>()
    });
    rig
}

/// Lengths of a burst that was sent, and of one that was received.
fn sent() -> Vec<u32> {
    vec![0; BURST]
}

fn received() -> Vec<u32> {
    (FIRST..).take(BURST).collect()
}

/// Offsets in the used ring; nothing else was stored to.
fn in_used_ring(rig: &Rig<SplitDriver>, stored: &[usize]) -> Vec<usize> {
    let offset = |&at: &usize| rig.driver.raw().device.offset_of(at);
    stored.iter().map(|at| offset(at).expect("there")).collect()
}

/// Slots of the ring, where the word with the flags was stored; nothing else was.
fn slots(rig: &Rig<PackedDriver>, stored: &[usize]) -> Vec<usize> {
    let slot = |&at: &usize| {
        let offset = rig.driver.raw().desc.offset_of(at).expect("there");
        assert_eq!(offset % 16, 8, "the second word");
        offset / 16
    };
    stored.iter().map(slot).collect()
}

const INDEX: usize = 2;

#[test]
fn what_was_sent_is_one_element_and_the_index_on_a_split_ring() {
    for at_once in [false, true] {
        let mut rig = rig();
        for burst in 0..10 {
            let stored = stores(&mut rig, &sent(), at_once);
            let stored = in_used_ring(&rig, &stored);
            let element = 4 + 8 * (burst * BURST % usize::from(SIZE));
            let (elements, index) = stored.split_at(stored.len() - 1);
            assert_eq!(index, [INDEX], "once and last");
            // The length was 0 before.
            assert_eq!(elements, [element], "burst {burst}");
        }
    }
}

#[test]
fn what_was_received_is_an_element_each_and_the_index_once_on_a_split_ring() {
    for at_once in [false, true] {
        let mut rig = rig();
        let stored = stores(&mut rig, &received(), at_once);
        let mut stored = in_used_ring(&rig, &stored);
        assert_eq!(stored.pop(), Some(INDEX));
        // The head of the first is 0, which was there.
        let words = (1..2 * BURST).map(|word| 4 + 4 * word);
        assert_eq!(stored, words.collect::<Vec<_>>(), "heads and lengths");
    }
}

#[test]
fn what_was_received_costs_the_index_alone_where_the_elements_stand_already() {
    // Frames of the same size, on a split ring that goes round in bursts of the same size.
    let mut rig = rig();
    let burst = vec![1514; usize::from(SIZE / 4)];
    for lap in 0..3 {
        for _ in 0..4 {
            let stored = stores(&mut rig, &burst, true);
            let stored = in_used_ring(&rig, &stored);
            assert_eq!(stored.last(), Some(&INDEX));
            assert_eq!(stored.len() == 1, lap > 0, "{stored:?} in lap {lap}");
        }
    }
}

#[test]
fn what_was_sent_is_one_descriptor_for_32_on_a_packed_ring_the_first_last() {
    for at_once in [false, true] {
        let mut rig = rig();
        for burst in 0..10 {
            let stored = stores(&mut rig, &sent(), at_once);
            let stored = slots(&rig, &stored);
            let runs = [32, 64, 96, 0].map(|slot| (burst * BURST + slot) % usize::from(SIZE));
            assert_eq!(stored, runs, "burst {burst}");
        }
    }
}

#[test]
fn what_was_received_is_a_descriptor_each_the_first_last_on_a_packed_ring() {
    for at_once in [false, true] {
        let mut rig = rig();
        for burst in 0..10 {
            let stored = stores(&mut rig, &received(), at_once);
            let stored = slots(&rig, &stored);
            let slot = |place| (burst * BURST + place) % usize::from(SIZE);
            let expected = (1..BURST).chain([0]).map(slot);
            assert_eq!(stored, expected.collect::<Vec<_>>(), "burst {burst}");
        }
    }
}
