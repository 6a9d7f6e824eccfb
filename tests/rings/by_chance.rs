//! Front-ends one after another at a port that sends every frame back: with any features, on rings
//! of any size, in each of the three idle modes. They stop their vrings and go on, with buffers
//! posted and without, or break a ring and begin anew. Every byte of every frame is compared.
//!
//! `scripts/soak rings` runs this and the models for longer.

use proptest::prelude::*;
use vringd::device::net::feature;
use vringd::engine::IdlePolicy;
use vringd::testing::driver::{Driver, PackedDriver, RingMemory, SplitDriver};

use super::features::{
    ANY_LAYOUT, EVENT_IDX, Guest, IN_ORDER, INDIRECT, NOTIFICATION_DATA, ORDER_PLATFORM,
};
use super::neighbour::Defect;
use super::port::{Alone, Port};
use crate::support::cases::cases;

const BITS: [u64; 8] = [
    feature::VERSION_1,
    feature::MRG_RXBUF,
    INDIRECT,
    EVENT_IDX,
    IN_ORDER,
    NOTIFICATION_DATA,
    ANY_LAYOUT,
    ORDER_PLATFORM,
];

/// What a front-end does.
#[derive(Debug, Clone)]
enum Deed {
    /// So many bursts go there and back.
    Bursts(u64),
    /// The vrings stop and go on, with buffers of a burst posted or with none.
    Restart { posted: bool },
}

#[derive(Debug, Clone)]
struct FrontEnd {
    features: u64,
    sizes: [u16; 2],
    deeds: Vec<Deed>,
    /// What it breaks its transmit ring with in the end.
    defect: Option<Defect>,
}

#[derive(Debug, Clone)]
struct Lives {
    idle: IdlePolicy,
    front_ends: Vec<FrontEnd>,
}

fn size(packed: bool) -> BoxedStrategy<u16> {
    if packed {
        prop_oneof![3u16..20, 3u16..=16384].boxed()
    } else {
        (2u32..=14).prop_map(|power| 1 << power).boxed()
    }
}

fn front_end(packed: bool) -> impl Strategy<Value = FrontEnd> {
    let bits = any::<[bool; BITS.len()]>().prop_map(|taken| {
        let taken = BITS.iter().zip(taken).filter(|(_, taken)| *taken);
        taken.map(|(bit, _)| bit).sum()
    });
    let deed = prop_oneof![
        (1u64..6).prop_map(Deed::Bursts),
        any::<bool>().prop_map(|posted| Deed::Restart { posted }),
    ];
    let deeds = prop::collection::vec(deed, 1..8);
    let defect = prop::option::of(prop::sample::select(Defect::all(packed)));
    let sizes = [size(packed), size(packed)];
    (bits, sizes, deeds, defect).prop_map(|(features, sizes, deeds, defect)| FrontEnd {
        features,
        sizes,
        deeds,
        defect,
    })
}

fn lives(packed: bool) -> impl Strategy<Value = Lives> {
    let idle = prop::sample::select(vec![
        IdlePolicy::Spin,
        IdlePolicy::Adaptive,
        IdlePolicy::Interrupt,
    ]);
    let front_ends = prop::collection::vec(front_end(packed), 1..6);
    (idle, front_ends).prop_map(|(idle, front_ends)| Lives { idle, front_ends })
}

/// Lays the rings of a front-end out where those of the one before it were.
fn lay_out<D: Driver>(port: &mut Port<D>, sizes: [u16; 2]) {
    let mut at = 0;
    for (ring, size) in port.rings.iter_mut().zip(sizes) {
        *ring = RingMemory::new::<D::Format>(&port.ram, at, size);
        at = ring.end::<D::Format>().next_multiple_of(4096);
    }
    assert!(at <= Port::<D>::buffer(0, 0), "rings end before buffers");
}

fn live<D: Driver>(lives: &Lives) {
    let mut alone = Alone::<D>::echo(1, &[0], lives.idle);
    let port = &mut alone.port;
    let mut round = 0;
    for front_end in &lives.front_ends {
        lay_out(port, front_end.sizes);
        let mut guest = Guest::new(port, front_end.features);
        let mut bursts = |guest: &mut Guest<'_, D>, count| {
            for at in 0..count {
                if at > 0 {
                    guest.post();
                }
                round += 1;
                guest.send(round);
            }
        };
        for deed in &front_end.deeds {
            match *deed {
                Deed::Bursts(count) => {
                    guest.post();
                    bursts(&mut guest, count);
                }
                Deed::Restart { posted: false } => guest.restart(),
                Deed::Restart { posted: true } => {
                    guest.post();
                    guest.restart();
                    bursts(&mut guest, 1);
                }
            }
        }
        if let Some(defect) = front_end.defect {
            guest.break_ring(|driver| defect.commit(driver));
        }
        guest.stop();
    }
    let broken = lives.front_ends.iter().filter_map(|f| f.defect).count();
    let counters = port.handle.counters();
    let faults = counters.iter().find(|(name, _)| *name == "ring_faults");
    assert_eq!(faults.unwrap().1, broken as u64);
}

proptest! {
    #![proptest_config(ProptestConfig {
        // A front-end that is not served is waited for, in each case that is looked at.
        max_shrink_time: 60_000,
        ..cases(12)
    })]

    #[test]
    fn any_front_end_is_served_on_split_rings(lives in lives(false)) {
        live::<SplitDriver>(&lives);
    }

    #[test]
    fn any_front_end_is_served_on_packed_rings(lives in lives(true)) {
        live::<PackedDriver>(&lives);
    }
}
