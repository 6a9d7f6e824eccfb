//! How many cache lines of a ring a burst touches: each of them may have to come from the driver's
//! core, and what is written has to go back (docs/performance.md, "Cache lines that change hands").

use crate::memory::watch;

use super::*;

const SIZE: u16 = 256;

/// Lines that a burst touches, and those of them that it writes, when the ring goes round in bursts
/// of this size: taken, used, published, and the driver asked whether it wants a call.
fn lines<D: Driver>(burst: u16, written: u32, in_order: bool) -> (usize, usize) {
    let mut rig = Rig::<D>::with(SIZE, true);
    let memory = rig.driver.memory().clone();
    rig.driver.set_in_order(in_order);
    rig.vq = memory.device_with(&RingConfig {
        in_order,
        event_idx: true,
        ..memory.config::<D::Format>()
    });
    let mut most = (0, 0);
    for _ in 0..3 * SIZE / burst {
        for place in 0..u64::from(burst) {
            let buf = Buf {
                addr: BUFFERS + 4096 * place,
                len: 2048,
                write: written > 0,
            };
            rig.driver.add(&[buf]).unwrap();
        }
        rig.driver.publish();
        let mut singles: Vec<_> = (0..burst).map(|_| Single::EMPTY).collect();
        let seen = watch::lines(|| {
            let taken = rig.vq.pop_singles(written > 0, &mut singles);
            assert_eq!(taken, usize::from(burst));
            // Frames of different sizes, so that no element stands there already.
            let lens = (0..u32::from(burst)).map(|place| written * (place + 1));
            rig.vq.put_used_singles(&singles, lens);
            rig.vq.publish();
        });
        most = (most.0.max(seen.0), most.1.max(seen.1));
        while rig.driver.used().is_some() {}
    }
    most
}

#[test]
fn a_burst_touches_few_lines_of_a_packed_ring() {
    // Four descriptors a line, and the driver's event structure.
    for (burst, descriptors) in [(32, 8), (256, 64)] {
        for in_order in [false, true] {
            let received = lines::<PackedDriver>(burst, 1, in_order);
            assert_eq!(received, (descriptors + 1, descriptors));
        }
        let sent = lines::<PackedDriver>(burst, 0, false);
        assert_eq!(sent, (descriptors + 1, descriptors));
        // One used descriptor for up to 32.
        let sent = lines::<PackedDriver>(burst, 0, true);
        assert_eq!(sent, (descriptors + 1, usize::from(burst / 32)));
    }
}

#[test]
fn a_burst_touches_few_lines_of_a_split_ring() {
    for burst in [32, 256] {
        let frames = usize::from(burst);
        // Four descriptors, 32 available entries or eight used elements a line. Index and event
        // fields lie in lines with entries, which begin at the fifth byte, or in one more.
        let read = frames / 4 + frames / 32 + 3;
        let used = frames / 8 + 2;
        for in_order in [false, true] {
            let received = lines::<SplitDriver>(burst, 1, in_order);
            assert!(
                received.0 <= read + used && received.1 <= used,
                "{received:?}"
            );
        }
        let sent = lines::<SplitDriver>(burst, 0, false);
        assert!(sent.0 <= read + used && sent.1 <= used, "{sent:?}");
        // One used element for all.
        let sent = lines::<SplitDriver>(burst, 0, true);
        assert!(sent.0 <= read + 2 && sent.1 <= 2, "{sent:?}");
    }
}
