//! Vrings of a disk that go from one worker to another while requests are in flight: none is lost,
//! none is answered twice, and each moves the right bytes.

use std::sync::Arc;
use std::time::Duration;

use vringd::device::blk::BlkSetup;
use vringd::engine::{Backing, VringRunner};
use vringd::host::fault::{FaultPlan, Faults};
use vringd::host::limit::{DiskLimits, DiskRates};
use vringd::memory::Store;
use vringd::sys::disk::{DiskFile, DiskOptions};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver, read_guest, write_guest};

use super::engine::{DATA, DISK, Fds, Machine, eventfd};

/// Requests that a ring of 16 descriptors has room for.
const DEPTH: u64 = 5;

fn ram() -> Backing {
    Backing::Ram(Arc::new(Store::new(DISK).unwrap()))
}

/// What a request in place `number` writes in a round.
fn pattern(round: u64, number: u64) -> Vec<u8> {
    (0..512u64)
        .map(|at| u8::try_from((round * 31 + number * 7 + at) % 251).unwrap())
        .collect()
}

/// Requests on both rings, the first five places for one, the others for the other.
fn post<D: Driver>(machine: &mut Machine<D>, round: u64, write: bool) -> [Vec<u16>; 2] {
    [0u16, 1].map(|index| {
        let first = u64::from(index) * DEPTH;
        let place = |number| {
            let bytes = if write {
                pattern(round, number)
            } else {
                vec![0; 512]
            };
            write_guest(&machine.ram, DATA + number * 1024, &bytes);
            machine.post(index, number, write)
        };
        (first..first + DEPTH).map(place).collect()
    })
}

/// Each request is answered, once, and a read has what was written last.
fn collect<D: Driver>(machine: &mut Machine<D>, mut ids: [Vec<u16>; 2], read: Option<u64>) {
    for index in [0u16, 1] {
        let ids = &mut ids[usize::from(index)];
        while !ids.is_empty() {
            let (id, _) = machine.await_used(index);
            let at = ids.iter().position(|posted| *posted == id);
            ids.swap_remove(at.expect("an answer to what was posted"));
        }
        assert_eq!(machine.drivers[usize::from(index)].used(), None);
    }
    for number in 0..2 * DEPTH {
        assert_eq!(machine.status(number), 0, "request {number}");
        if let Some(round) = read {
            let got = read_guest(&machine.ram, DATA + number * 1024, 512);
            assert!(got == pattern(round, number), "round {round}, {number}");
        }
    }
}

fn back_and_forth<D: Driver>(backing: Backing, more: BlkSetup, rounds: u64) {
    let mut machine = Machine::<D>::with(vec![0, 1], backing, more);
    let kicks = [eventfd(), eventfd()];
    for (index, kick) in (0..).zip(&kicks) {
        let kick = Some(kick);
        machine.start(
            index,
            &Fds {
                kick,
                ..Fds::default()
            },
        );
    }
    for round in 0..rounds {
        // All to one, to the other, one to each, which leaves one where it is.
        for (cores, write) in [(&[1][..], true), (&[0][..], false), (&[0, 1][..], false)] {
            let ids = post(&mut machine, round, write);
            kicks.iter().for_each(|kick| kick.write(1).unwrap());
            machine.handle.allow(cores);
            machine.handle.settle();
            collect(&mut machine, ids, (!write).then_some(round));
        }
    }
    assert!(machine.counter("vrings_moved") >= 4 * rounds - 1);
    assert_eq!(machine.counter("errors"), 0);
}

#[test]
fn queues_move_with_requests_that_are_late_and_out_of_order() {
    let setup = || {
        let faults = Faults::default();
        faults.set(Some(FaultPlan {
            delay: Duration::from_millis(1),
            reorder: 3,
            short: 2,
            ..FaultPlan::default()
        }));
        BlkSetup {
            faults: Arc::new(faults),
            ..BlkSetup::default()
        }
    };
    back_and_forth::<SplitDriver>(ram(), setup(), 60);
    back_and_forth::<PackedDriver>(ram(), setup(), 60);
}

#[test]
fn queues_move_with_requests_that_wait_for_a_limit() {
    let limits = DiskLimits::new(0, Arc::default());
    let mut rates = DiskRates::default();
    rates.total.count = Some(2000);
    rates.total.burst = Duration::from_millis(1);
    limits.set(rates);
    let setup = BlkSetup {
        limits: Arc::new(limits),
        ..BlkSetup::default()
    };
    back_and_forth::<PackedDriver>(ram(), setup, 30);
}

#[test]
fn queues_move_between_two_rings_of_the_kernel() {
    let file = vmm_sys_util::tempfile::TempFile::new_in("/var/tmp".as_ref()).unwrap();
    file.as_file().set_len(DISK).unwrap();
    let options = DiskOptions {
        read_only: false,
        direct: None,
        block_size: 512,
        lock: false,
    };
    let open = || Backing::File(Arc::new(DiskFile::open(file.as_path(), options).unwrap()));
    back_and_forth::<SplitDriver>(open(), BlkSetup::default(), 100);
    back_and_forth::<PackedDriver>(open(), BlkSetup::default(), 100);
}

#[test]
fn a_disabled_queue_moves_and_stays_disabled() {
    let mut machine = Machine::<SplitDriver>::with(vec![0, 1], ram(), BlkSetup::default());
    let kick = eventfd();
    for index in [0, 1] {
        let kick = Some(&kick);
        machine.start(
            index,
            &Fds {
                kick,
                ..Fds::default()
            },
        );
    }
    machine.handle.pause(0, true).unwrap();
    let waits = machine.post(0, 0, true);
    machine.handle.allow(&[1]);
    machine.handle.settle();
    assert_eq!(machine.counter("vrings_moved"), 2);
    // The same worker serves the other one, again and again.
    for _ in 0..100 {
        machine.post(1, 1, true);
        kick.write(1).unwrap();
        machine.await_used(1);
    }
    assert_eq!(machine.drivers[0].used(), None);
    machine.handle.pause(0, false).unwrap();
    assert_eq!(machine.await_used(0).0, waits);
    // What is stopped and started again is where it was last allowed.
    machine.handle.stop(0).unwrap();
    machine.handle.settle();
    assert_eq!(machine.counter("vrings_moved"), 2);
}
