//! Chains of one descriptor, taken and used many at once.

use super::*;

/// Bursts that begin and end anywhere in the ring, over many laps.
pub(super) fn laps<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let mut out: Vec<_> = (0..usize::from(size)).map(|_| Single::EMPTY).collect();
    for round in 0..6 * u32::from(size) {
        let count = 1 + round % u32::from(size);
        let posted: Vec<_> = (0..count)
            .map(|i| {
                let buf = Buf::writable(BUFFERS + 4096 * u64::from(i), 100 + i);
                (rig.driver.add(&[buf]).unwrap(), buf)
            })
            .collect();
        rig.driver.publish();
        assert_eq!(rig.vq.pop_singles(false, &mut out), 0, "these are writable");
        let taken = rig.vq.pop_singles(true, &mut out);
        assert_eq!((taken, rig.vq.in_flight()), (posted.len(), count));
        for ((id, buf), single) in posted.iter().zip(&out) {
            let at = rig.ram.gpa_of(&single.segment);
            let seen = (single.id().id(), at, single.segment.len());
            assert_eq!(seen, (*id, Some(buf.addr), buf.len as usize));
        }
        // The last one goes back and comes again.
        rig.vq.unpop(out[taken - 1].take_id());
        assert_eq!(rig.vq.pop_singles(true, &mut out[taken - 1..]), 1);
        rig.vq.put_used_singles(&out[..taken], round..);
        assert_eq!(rig.driver.used(), None, "nothing is visible before publish");
        rig.vq.publish();
        for ((id, _), len) in posted.iter().zip(round..) {
            assert_eq!(rig.driver.used(), Some((*id, len)));
        }
        assert_eq!((rig.driver.used(), rig.vq.in_flight()), (None, 0));
    }
}

/// Only what is simple is taken, and no more than the caller and the ring have room for.
pub(super) fn limits<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let one = Buf::readable(BUFFERS, 64);
    for bufs in [&[one][..], &[one], &[one], &[one, one], &[one]] {
        rig.driver.add(bufs).unwrap();
    }
    rig.driver.publish();
    let mut out: Vec<_> = (0..8).map(|_| Single::EMPTY).collect();
    assert_eq!(rig.vq.pop_singles(false, &mut out[..2]), 2);
    assert_eq!(rig.vq.pop_singles(false, &mut out[2..]), 1, "then a chain");
    assert_eq!(rig.vq.pop_singles(false, &mut out[3..]), 0);
    let chain = rig.pop().expect("a chain of two");
    assert_eq!(rig.vq.pop_singles(false, &mut out[3..]), 1);
    assert_eq!(rig.vq.pop_singles(false, &mut out[4..]), 0, "no more");
    rig.vq.put_used_singles(&out[..3], core::iter::repeat(0));
    rig.use_chain(chain, 0);
    rig.vq.put_used_singles(&out[3..4], core::iter::repeat(0));
    rig.vq.publish();
    for _ in 0..5 {
        assert_eq!(rig.driver.used().map(|used| used.1), Some(0));
    }
    // A buffer over two regions, an empty one, one that is not mapped: not simple.
    for buf in [
        Buf::readable(RAM / 2 - 32, 64),
        Buf::readable(BUFFERS, 0),
        Buf::readable(RAM - 32, 64),
    ] {
        let mut rig = Rig::<D>::new(size);
        rig.driver.add(&[one]).unwrap();
        rig.driver.add(&[buf]).unwrap();
        rig.driver.publish();
        assert_eq!(rig.vq.pop_singles(false, &mut out), 1);
        assert_eq!((rig.vq.in_flight(), rig.vq.fault()), (1, None));
    }
}

#[test]
fn a_head_outside_the_table_is_not_taken_and_the_pop_says_so() {
    let mut rig = Rig::<SplitDriver>::new(4);
    // A good chain stands where the head would be if the table began again after its end.
    rig.driver.add(&[Buf::readable(BUFFERS, 8)]).unwrap();
    rig.driver.raw().driver.store16(4, 4);
    rig.driver.publish();
    let mut out = [const { Single::EMPTY }; 4];
    assert_eq!(rig.vq.pop_singles(false, &mut out), 0);
    assert_eq!(rig.fault(), RingFault::DescIndex);
}
