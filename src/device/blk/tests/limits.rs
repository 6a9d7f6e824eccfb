//! Limits, on a clock that the tests move.

use core::cell::Cell;
use std::collections::HashMap;
use std::time::Duration;

use super::*;
use crate::host::limit::{DiskRates, LimitSet, Rates};

const STEP: Duration = Duration::from_micros(50);
const SECOND: Duration = Duration::from_secs(1);
/// Requests of each load that are in the ring: three descriptors each.
const DEPTH: u64 = 16;

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(SECOND) };
}

fn clock() -> Duration {
    NOW.get()
}

fn rate(count: u64) -> Rates {
    Rates {
        count: Some(count),
        ..Rates::default()
    }
}

fn bytes(size: u64) -> Rates {
    Rates {
        size: Some(size),
        ..Rates::default()
    }
}

/// A disk with these limits, alone or in the first of `groups`.
fn limited(number: usize, rates: DiskRates, groups: &Arc<[LimitSet]>) -> Rig {
    let limits = DiskLimits::new(number, Arc::clone(groups)).with_clock(clock);
    limits.set(rates);
    limits.join((!groups.is_empty()).then_some(0));
    Rig::with(FLUSH | RANGES, SickPolicy::default(), Arc::new(limits))
}

fn alone(rates: DiskRates) -> Rig {
    let none: Arc<[LimitSet]> = Arc::new([]);
    limited(0, rates, &none)
}

/// Guests that keep requests of one kind each in the ring.
struct Load {
    rig: Rig,
    kinds: Vec<(u32, u32)>,
    /// Whose request is at which place.
    pending: HashMap<u16, (u64, usize)>,
    free: Vec<u64>,
    owed: Vec<usize>,
    done: Vec<u64>,
}

impl Load {
    /// `kinds` are request types with the bytes of each.
    fn new(rig: Rig, kinds: &[(u32, u32)]) -> Load {
        let each = usize::try_from(DEPTH).unwrap() / kinds.len();
        Load {
            rig,
            kinds: kinds.to_vec(),
            pending: HashMap::new(),
            free: (0..DEPTH).collect(),
            owed: (0..each * kinds.len()).map(|at| at % kinds.len()).collect(),
            done: vec![0; kinds.len()],
        }
    }

    /// One turn of the worker, and of a disk that takes no time.
    fn turn(&mut self) {
        for kind in self.owed.drain(..) {
            let place = self.free.pop().unwrap();
            let (request, bytes) = self.kinds[kind];
            let id = self.rig.add(place, request, 0, bytes);
            self.pending.insert(id, (place, kind));
        }
        self.rig.poll();
        self.rig.disk.release();
        self.rig.poll();
        while let Some((id, _)) = self.rig.driver.used() {
            let (place, kind) = self.pending.remove(&id).unwrap();
            assert_eq!(self.rig.status(place), STATUS_OK);
            self.done[kind] += 1;
            self.free.push(place);
            self.owed.push(kind);
        }
    }
}

/// How many requests of each kind each load gets done in a second, when its saved-up burst is gone.
fn rates(loads: &mut [Load], seconds: u32) -> Vec<Vec<u64>> {
    let mut run = |span: Duration| {
        let end = NOW.get() + span;
        while NOW.get() < end {
            loads.iter_mut().for_each(Load::turn);
            NOW.set(NOW.get() + STEP);
        }
        let done = loads.iter().map(|load| load.done.clone());
        done.collect::<Vec<_>>()
    };
    let before = run(SECOND / 4);
    let after = run(SECOND * seconds);
    let both = before.iter().zip(&after);
    let of = |(before, after): (&Vec<u64>, &Vec<u64>)| {
        let gained = before
            .iter()
            .zip(after)
            .map(|(before, after)| after - before);
        gained.map(|count| count / u64::from(seconds)).collect()
    };
    both.map(of).collect()
}

#[track_caller]
fn near(got: u64, want: u64) {
    assert!(got.abs_diff(want) * 100 <= want, "{got} instead of {want}");
}

#[test]
fn requests_and_bytes_pass_at_their_rates_reads_and_writes_apart() {
    const READ: (u32, u32) = (0, 512);
    const WRITE: (u32, u32) = (1, 512);
    let none = DiskRates::default();
    let of = |read, write, total| DiskRates { read, write, total };
    for (limits, kinds, want) in [
        (of(rate(300), none.write, none.total), vec![READ], vec![300]),
        (of(none.read, rate(300), none.total), vec![WRITE], vec![300]),
        (of(none.read, none.write, rate(300)), vec![WRITE], vec![300]),
        (
            of(rate(300), rate(70), none.total),
            vec![READ, WRITE],
            vec![300, 70],
        ),
        (
            of(bytes(512_000), none.write, none.total),
            vec![READ],
            vec![1000],
        ),
        (
            of(bytes(512_000), bytes(51_200), none.total),
            vec![READ, WRITE],
            vec![1000, 100],
        ),
        (
            of(rate(50), none.write, rate(400)),
            vec![READ, WRITE],
            vec![50, 350],
        ),
        (
            of(none.read, rate(50), bytes(512_000)),
            vec![READ, WRITE],
            vec![950, 50],
        ),
        (
            of(rate(4000), none.write, bytes(512_000)),
            vec![READ],
            vec![1000],
        ),
        (of(rate(1), none.write, none.total), vec![READ], vec![1]),
    ] {
        let mut load = [Load::new(alone(limits), &kinds)];
        let got = rates(&mut load, 10).remove(0);
        got.iter()
            .zip(&want)
            .for_each(|(&got, &want)| near(got, want));
    }
}

#[test]
fn the_kind_without_a_limit_is_not_held_up_and_neither_is_a_flush() {
    let limits = DiskRates {
        write: rate(1),
        ..DiskRates::default()
    };
    let mut rig = alone(limits);
    for number in 0..8 {
        rig.add(number, 1, number, 512);
    }
    let read = rig.add(8, 0, 3, 512);
    let flush = rig.add(9, 4, 0, 0);
    rig.poll();
    rig.disk.release();
    rig.poll();
    let used: Vec<_> = core::iter::from_fn(|| rig.driver.used()).collect();
    assert!(used.contains(&(read, 513)) && used.contains(&(flush, 1)));
    assert_eq!(used.len(), 3, "and one write");
    assert!(rig.handler.has_room());
    assert_eq!(rig.handler.in_flight(), 7);
    assert_eq!(rig.counter("throttled"), 7);
}

#[test]
fn what_may_not_pass_stays_in_the_ring_and_says_when_it_may() {
    let mut rig = alone(DiskRates {
        total: rate(10),
        ..DiskRates::default()
    });
    for number in 0..10 {
        rig.add(number, 0, number, 512);
    }
    rig.poll();
    assert_eq!(rig.handler.in_flight(), 2, "one passes, one waits");
    assert!(!rig.handler.has_room());
    assert_eq!(rig.handler.wait(), Some(SECOND / 10));
    assert_eq!(rig.poll(), 0);
    NOW.set(NOW.get() + SECOND / 20);
    assert_eq!(rig.handler.wait(), Some(SECOND / 20));
    NOW.set(NOW.get() + SECOND / 20);
    assert_eq!(rig.handler.wait(), Some(Duration::ZERO));
    assert_eq!(rig.poll(), 2, "one passes, another waits");
    assert_eq!(rig.counter("throttled_us"), 100_000);
}

#[test]
fn a_stop_does_not_wait_for_a_limit_and_what_passed_is_owed() {
    let mut rig = alone(DiskRates {
        write: rate(2),
        ..DiskRates::default()
    });
    for number in 0..5 {
        rig.add(number, 1, number, 512);
    }
    rig.poll();
    assert_eq!(rig.handler.in_flight(), 5);
    let Rig {
        handler,
        vq,
        disk,
        scratch,
        ..
    } = &mut rig;
    assert_eq!(
        handler.poll(vq, disk, scratch, 0),
        Ok(0),
        "a pause is no stop"
    );
    handler.stop_holding();
    assert_eq!(handler.poll(vq, disk, scratch, 0), Ok(4));
    disk.release();
    handler.poll(vq, disk, scratch, 0).unwrap();
    vq.publish();
    assert_eq!(handler.in_flight(), 0);
    assert_eq!(core::iter::from_fn(|| rig.driver.used()).count(), 5);
    rig.add(5, 1, 0, 512);
    rig.poll();
    assert_eq!(rig.handler.wait(), Some(SECOND * 5 / 2));
}

#[test]
fn what_waits_for_a_limit_fails_when_the_disk_ends_before_it() {
    let mut rig = alone(DiskRates {
        write: rate(2),
        ..DiskRates::default()
    });
    rig.add(0, 1, 100, 512);
    rig.add(1, 1, 101, 512);
    rig.add(2, 1, 20, 512);
    rig.poll();
    assert_eq!(rig.handler.in_flight(), 3);
    assert!(!rig.model.size().set(101 * 512, true));
    let before = rig.disk.bytes.clone();
    for _ in 0..3 {
        NOW.set(NOW.get() + SECOND);
        rig.poll();
        rig.disk.release();
    }
    rig.poll();
    let statuses = [0, 1, 2].map(|number| rig.status(number));
    assert_eq!(statuses, [STATUS_OK, STATUS_IOERR, STATUS_OK]);
    assert!(rig.disk.bytes[101 * 512..] == before[101 * 512..]);
}

#[test]
fn a_request_larger_than_the_burst_passes_and_is_paid_for_later() {
    let mut rig = alone(DiskRates {
        write: bytes(1024),
        ..DiskRates::default()
    });
    rig.add(0, 1, 0, 4096);
    rig.finish();
    rig.add(1, 1, 0, 512);
    rig.poll();
    assert_eq!(rig.handler.wait(), Some(SECOND * 4));
    NOW.set(NOW.get() + SECOND * 4);
    rig.finish();
}

#[test]
fn zeroed_bytes_count_and_discarded_ones_do_not() {
    for (kind, owed) in [(13, 16.0 * 512.0 / 1000.0), (11, 0.0)] {
        let mut rig = alone(DiskRates {
            write: bytes(1000),
            ..DiskRates::default()
        });
        // Two ranges of eight sectors.
        for at in [0, 16] {
            let range = [
                &(at / 2_u64).to_le_bytes()[..],
                &8_u32.to_le_bytes(),
                &[0; 4],
            ]
            .concat();
            write_guest(&rig.ram, DATA + at, &range);
        }
        rig.add(0, kind, 0, 32);
        rig.finish();
        rig.add(1, 1, 0, 512);
        rig.poll();
        let waits = rig.handler.wait().unwrap_or_default().as_secs_f64();
        assert!((waits - owed).abs() < 0.001, "{waits} instead of {owed}");
    }
}

#[test]
fn a_changed_limit_holds_at_once_and_what_was_owed_is_forgotten() {
    let limits = Arc::new(DiskLimits::default().with_clock(clock));
    let mut load = [Load::new(
        Rig::with(FLUSH, SickPolicy::default(), Arc::clone(&limits)),
        &[(0, 512)],
    )];
    for count in [100, 3000, 1, 500, 20, 700, 90, 1000, 10, 2000] {
        limits.set(DiskRates {
            total: rate(count),
            ..DiskRates::default()
        });
        near(rates(&mut load, 2)[0][0], count);
    }
    limits.set(DiskRates::default());
    let every_turn = DEPTH * u64::try_from(SECOND.as_micros() / STEP.as_micros()).unwrap();
    assert!(rates(&mut load, 1)[0][0] >= every_turn);
    assert_eq!(load[0].rig.handler.wait(), None);
}

#[test]
fn a_group_is_shared_in_turns_and_leaves_nothing_unused() {
    let groups: Arc<[LimitSet]> = Arc::new([LimitSet::new(3)]);
    groups[0].set_on(
        clock,
        DiskRates {
            total: rate(900),
            ..DiskRates::default()
        },
    );
    let own = |rates| DiskRates {
        read: rates,
        ..DiskRates::default()
    };
    // The third has a limit of its own below its share.
    let disks = [DiskRates::default(), DiskRates::default(), own(rate(100))];
    let mut loads: Vec<_> = (0..)
        .zip(disks)
        .map(|(number, own)| Load::new(limited(number, own, &groups), &[(0, 512)]))
        .collect();
    let got = rates(&mut loads, 10);
    let got: Vec<_> = got.into_iter().flatten().collect();
    near(got[2], 100);
    near(got[0], 400);
    near(got[1], 400);
    // One that wants nothing leaves all to the others.
    let got = rates(&mut loads[1..2], 10);
    near(got[0][0], 900);
}

#[test]
fn a_disk_changes_its_group_while_it_is_in_use() {
    let groups: Arc<[LimitSet]> = Arc::new([LimitSet::new(2), LimitSet::new(2)]);
    for (group, count) in groups.iter().zip([100, 600]) {
        let total = rate(count);
        group.set_on(
            clock,
            DiskRates {
                total,
                ..DiskRates::default()
            },
        );
    }
    let mut loads: Vec<_> = (0..2)
        .map(|number| Load::new(limited(number, DiskRates::default(), &groups), &[(1, 512)]))
        .collect();
    let both: Vec<_> = rates(&mut loads, 5).into_iter().flatten().collect();
    near(both[0] + both[1], 100);
    loads[1].rig.model.setup().limits.join(Some(1));
    let both: Vec<_> = rates(&mut loads, 5).into_iter().flatten().collect();
    near(both[0], 100);
    near(both[1], 600);
    loads[1].rig.model.setup().limits.join(None);
    let both: Vec<_> = rates(&mut loads, 5).into_iter().flatten().collect();
    near(both[0], 100);
    assert!(both[1] > 100_000);
}
