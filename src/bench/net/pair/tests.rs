//! A pair's rings as a back-end sees them.

use super::*;
use crate::bench::ring::{PackedLoad, SplitLoad};
use crate::config::{BenchNetGiven, load_bench_net};
use crate::memory::{Segments, copy};
use crate::ring::{Areas, ChainQueue, Popped, RingConfig, RingFormat, Virtqueue, VringBase};

fn device<F: RingFormat>(ram: &Arc<GuestRam>, place: Place, size: u16) -> Virtqueue<F> {
    let [desc, driver, device] = place.rings_at();
    let areas = Areas::find::<F>(ram, size, desc, driver, device).unwrap();
    let config = RingConfig {
        size,
        event_idx: false,
        indirect: true,
        in_order: false,
        readable_only: false,
        base: VringBase::fresh(F::PACKED),
    };
    Virtqueue::new(Arc::clone(ram), areas, &config).unwrap()
}

fn lens(segments: &Segments) -> Vec<usize> {
    segments.as_slice().iter().map(|it| it.len()).collect()
}

/// Sends every frame back, lap after lap; each is cut as `chains` says, and so is each buffer that
/// it goes to.
fn sends_back<R: LoadRing>(chains: &str, size: u16) {
    let some = |text: &str| Some(text.to_owned());
    let given = BenchNetGiven {
        size: some("mix"),
        format: some(if R::Format::PACKED { "packed" } else { "split" }),
        chains: some(chains),
        ring_size: Some(size.to_string()),
        ..BenchNetGiven::default()
    };
    let config = load_bench_net(&given, &[0]).unwrap();
    let layout = Layout::new::<R::Format>(&config);
    let ram = layout.memory().unwrap().ram;
    let mut pair = Pair::<R>::new(&config, &ram, &layout, 0, 0, Instant::now()).unwrap();
    let mut rx = device::<R::Format>(&ram, layout.place(0), size);
    let mut tx = device::<R::Format>(&ram, layout.place(1), size);
    let head = usize::from(FRAME_AT);
    let cut = |bytes: u16| match chains {
        "indirect" => vec![head, bytes.into()],
        _ => vec![head + usize::from(bytes)],
    };
    let mut tally = Tally::default();
    let (mut from, mut to) = (Segments::with_capacity(4), Segments::with_capacity(4));
    for _ in 0..10 {
        pair.send(&mut tally).unwrap();
        from.clear();
        while let Popped::Chain(sent) = tx.pop(&mut from).unwrap() {
            let expected = MIX[number_of(&from) % MIX.len()];
            assert_eq!(lens(&from), cut(expected));
            to.clear();
            let Popped::Chain(got) = rx.pop(&mut to).unwrap() else {
                panic!("a receive buffer for each frame");
            };
            assert_eq!(lens(&to), cut(1518));
            let bytes = head + usize::from(expected);
            copy::between(from.as_slice(), 0, to.as_slice(), 0, bytes);
            rx.put_used(got.id, u32::try_from(bytes).unwrap(), &[]);
            tx.put_used(sent.id, 0, &[]);
            from.clear();
        }
        tx.publish();
        rx.publish();
        pair.receive(&mut tally).unwrap();
    }
    assert_eq!(
        (tally.sent, tally.received),
        (10 * u64::from(size), tally.sent)
    );
    assert_eq!(tally.mismatched, 0);
}

/// The number in a frame that was sent.
fn number_of(frame: &Segments) -> usize {
    let mut number = [0; 8];
    copy::read(frame.as_slice(), NUMBER_AT, &mut number);
    usize::try_from(u64::from_le_bytes(number)).unwrap()
}

#[test]
fn frames_are_cut_as_was_asked_on_rings_of_any_size() {
    for chains in ["direct", "indirect"] {
        sends_back::<SplitLoad>(chains, 8);
        for size in [8, 7, 5, 31] {
            sends_back::<PackedLoad>(chains, size);
        }
    }
}
