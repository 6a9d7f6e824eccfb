//! One ring breaks; the rings beside it, of the same device and of another, on the same worker, go
//! on with every byte and no slower.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::engine::{Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts};
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, write_guest};

use crate::support::deadline::wait_until;

use super::port::{PATIENCE, Port, SIZE, fresh, model, payload};

/// VIRTIO_RING_F_INDIRECT_DESC.
const INDIRECT: u64 = 1 << 28;
/// Buffers and tables of the one who breaks the ring, where the others have none.
const JUNK: u64 = 0x3f_0000;
/// What the machine's other business may cost: 640 frames take a millisecond or two, and a ring
/// that is only looked at between sleeps would take seconds for them.
const DISTURBED: Duration = Duration::from_millis(200);
const NOWHERE: u64 = 1 << 50;

const TABLE: u64 = JUNK + 0x1000;

/// Flags of descriptors.
const NEXT: u16 = 1;
const IS_TABLE: u16 = 4;

/// A way to break a transmit ring that stands at its beginning.
#[derive(Debug, Clone, Copy)]
enum Defect {
    Unmapped,
    HugeLength,
    EndlessChain,
    ReadableAfterWritable,
    NestedIndirect,
    ChainedIndirect,
    OddTable,
    /// Split only.
    AvailJump,
    /// Split only.
    HeadOutside,
}

impl Defect {
    const BOTH: [Defect; 7] = [
        Defect::Unmapped,
        Defect::HugeLength,
        Defect::EndlessChain,
        Defect::ReadableAfterWritable,
        Defect::NestedIndirect,
        Defect::ChainedIndirect,
        Defect::OddTable,
    ];

    fn all(packed: bool) -> Vec<Defect> {
        let mut all = Defect::BOTH.to_vec();
        if !packed {
            all.extend([Defect::AvailJump, Defect::HeadOutside]);
        }
        all
    }

    fn commit<D: Driver>(self, driver: &mut D) {
        let buf = |addr, len| Buf::readable(addr, len);
        let chain: Vec<(Buf, u16)> = match self {
            Defect::Unmapped => vec![(buf(NOWHERE, 64), 0)],
            Defect::HugeLength => vec![(buf(JUNK, u32::MAX), 0)],
            // The chain takes the whole ring, and its last descriptor says that there is more.
            Defect::EndlessChain => vec![(buf(JUNK, 64), NEXT); usize::from(SIZE)],
            Defect::ReadableAfterWritable => {
                vec![(Buf::writable(JUNK, 64), NEXT), (buf(JUNK, 64), 0)]
            }
            Defect::NestedIndirect => {
                driver.add_indirect(&[buf(JUNK, 64)], TABLE).unwrap();
                let flags_at = if D::Format::PACKED { 14 } else { 12 };
                write_guest(&driver.memory().ram, TABLE + flags_at, &[4, 0]);
                driver.publish();
                return;
            }
            Defect::ChainedIndirect => vec![(buf(JUNK, 16), IS_TABLE | NEXT), (buf(JUNK, 64), 0)],
            Defect::OddTable => vec![(buf(JUNK, 17), IS_TABLE)],
            Defect::AvailJump => {
                let idx = driver.raw().driver.load16(2);
                driver.raw().driver.store16(2, idx.wrapping_add(SIZE + 9));
                return;
            }
            Defect::HeadOutside => {
                let idx = driver.raw().driver.load16(2);
                let place = 4 + 2 * usize::from(idx % SIZE);
                driver.raw().driver.store16(place, SIZE);
                driver.raw().driver.store16(2, idx.wrapping_add(1));
                return;
            }
        };
        driver.add_raw(&chain).unwrap();
        driver.publish();
    }
}

/// Frames there and back on an echo port, every byte compared. Returns how long it took.
pub(super) fn traffic<D: Driver>(port: &mut Port<D>, pair: u16, rounds: u64) -> Duration {
    let start = Instant::now();
    for round in 0..rounds {
        let frame = |number| {
            payload(
                round * 32 + number,
                60 + usize::try_from(number * 37 % 1400).unwrap(),
            )
        };
        port.post(pair, 32);
        (0..32).for_each(|number| port.send(pair, number, &frame(number)));
        for number in 0..32 {
            let got = port.receive(pair, number);
            assert!(got == frame(number), "round {round}, frame {number}");
        }
        (0..32).for_each(|_| port.await_sent(pair));
    }
    start.elapsed()
}

/// The best of five: what else runs on the machine is not asked about.
fn pace<D: Driver>(port: &mut Port<D>, pair: u16) -> Duration {
    let times = (0..5).map(|_| traffic(port, pair, 20));
    times.min().unwrap_or_default()
}

fn ring_faults<D: Driver>(port: &Port<D>) -> u64 {
    let counters = port.handle.counters();
    let found = counters.iter().find(|(name, _)| *name == "ring_faults");
    found.map_or(0, |(_, count)| *count)
}

fn one_broken_ring<D: Driver>() {
    let models = [model("victim", 2), model("neighbour", 1)];
    let members = models.iter().map(|model| Member {
        parts: Parts::Net(Arc::clone(model), LinkSpec::Echo),
        cores: vec![0],
    });
    let options = EngineOptions {
        cores: vec![0],
        idle: IdlePolicy::Adaptive,
        stop_timeout: PATIENCE,
        ..EngineOptions::default()
    };
    let (engine, handles) = Engine::start(&options, members.collect()).unwrap();
    let port = |at: usize| Port::<D>::new(Arc::clone(&handles[at]), Arc::clone(&models[at]));
    let (mut victim, mut neighbour) = (port(0), port(1));
    (0..2).for_each(|index| neighbour.start(index));
    (0..4).for_each(|index| victim.start_with(index, INDIRECT, None));
    let before = [pace(&mut neighbour, 0), pace(&mut victim, 1)];
    for (count, defect) in (1..).zip(Defect::all(D::Format::PACKED)) {
        victim.stop(1);
        victim.drivers[1] = fresh(&victim.rings[1]);
        let err = EventFd::new(EFD_NONBLOCK).unwrap();
        victim.start_with(1, INDIRECT, Some(&err));
        traffic(&mut neighbour, 0, 1);
        defect.commit(&mut victim.drivers[1]);
        let told = wait_until("the err fd is written to", PATIENCE, || err.read().ok());
        assert_eq!(told, 1, "{defect:?}");
        let after = [pace(&mut neighbour, 0), pace(&mut victim, 1)];
        for (before, after) in before.into_iter().zip(after) {
            let most = 8 * before + DISTURBED;
            assert!(after < most, "{defect:?}: {before:?}, then {after:?}");
        }
        assert_eq!(ring_faults(&victim), count, "{defect:?}");
        assert!(err.read().is_err(), "{defect:?}: told once");
        assert_eq!(ring_faults(&neighbour), 0);
        assert_eq!(victim.drivers[1].used(), None, "{defect:?}");
    }
    // The one that was broken works again once it is made anew.
    for index in [0, 1] {
        victim.stop(index);
        victim.drivers[usize::from(index)] = fresh(&victim.rings[usize::from(index)]);
        victim.start_with(index, INDIRECT, None);
    }
    traffic(&mut victim, 0, 2);
    for port in [&mut victim, &mut neighbour] {
        for index in port.started.clone() {
            port.stop(index);
        }
    }
    engine.stop();
}

#[test]
fn one_broken_split_ring_disturbs_nobody() {
    one_broken_ring::<SplitDriver>();
}

#[test]
fn one_broken_packed_ring_disturbs_nobody() {
    one_broken_ring::<PackedDriver>();
}
