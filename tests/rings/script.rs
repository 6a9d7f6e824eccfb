//! Random sessions for the model of `vringd::testing::session`.

use proptest::prelude::*;
use vringd::ring::VringBase;
use vringd::testing::driver::Calls;
use vringd::testing::session::{Layout, Script, Shape, Step};

pub fn shape() -> impl Strategy<Value = Shape> {
    let layout = prop_oneof![
        4 => Just(Layout::Direct),
        2 => Just(Layout::Indirect),
        1 => Just(Layout::Mixed),
    ];
    let length = || prop_oneof![1 => Just(0u32), 8 => 1u32..3000, 1 => 100_000u32..300_000];
    let lengths = || prop::collection::vec(length(), 0..5);
    (layout, lengths(), lengths())
        .prop_map(|(layout, readable, writable)| Shape {
            layout,
            readable,
            writable,
        })
        .prop_filter("a chain has a buffer", |shape| {
            shape.readable.len() + shape.writable.len() > usize::from(shape.layout == Layout::Mixed)
        })
}

fn step() -> impl Strategy<Value = Step> {
    let calls = prop_oneof![
        Just(Calls::On),
        Just(Calls::Off),
        (0u16..12).prop_map(Calls::After),
    ];
    let few = || prop_oneof![6 => 1u16..6, 1 => Just(u16::MAX)];
    prop_oneof![
        60 => shape().prop_map(Step::Add),
        1 => Just(Step::Fill),
        30 => Just(Step::Publish),
        40 => (few(), any::<bool>()).prop_map(|(count, short)| Step::Pop { count, short }),
        8 => Just(Step::Unpop),
        40 => (few(), any::<u16>(), prop_oneof![Just(0), any::<u32>()])
            .prop_map(|(count, which, written)| Step::Use { count, which, written }),
        25 => Just(Step::PublishUsed),
        25 => few().prop_map(Step::Reap),
        12 => calls.prop_map(Step::Calls),
        12 => any::<bool>().prop_map(Step::Kicks),
        30 => prop::collection::vec(1usize..4, 1..4).prop_map(Step::Round),
    ]
}

/// Where a ring may stand: everywhere, mostly just before something wraps.
fn base(packed: bool, size: u16) -> impl Strategy<Value = VringBase> {
    let back = (0u16..5).prop_map(move |back| back.min(size - 1));
    (back, any::<u16>(), 0u8..4, any::<bool>()).prop_map(move |(back, anywhere, kind, wrap)| {
        let at = match (packed, kind) {
            (_, 0) => return VringBase::fresh(packed),
            (true, 1) => (anywhere % size) | (u16::from(wrap) << 15),
            (true, _) => (size - 1 - back) | (u16::from(wrap) << 15),
            (false, 1) => anywhere,
            (false, _) => 65535 - back,
        };
        VringBase {
            avail: at,
            used: at,
        }
    })
}

/// Sessions on rings of the given sizes.
pub fn script(packed: bool, sizes: &'static [u16]) -> impl Strategy<Value = Script> {
    prop::sample::select(sizes)
        .prop_flat_map(move |size| (Just(size), base(packed, size)))
        .prop_flat_map(|(size, base)| {
            let steps = prop::collection::vec(step(), 1..120);
            (Just((size, base)), any::<[bool; 3]>(), steps)
        })
        .prop_map(
            |((size, base), [event_idx, in_order, restarts], steps)| Script {
                size,
                event_idx,
                in_order,
                restarts,
                base,
                steps,
            },
        )
}
