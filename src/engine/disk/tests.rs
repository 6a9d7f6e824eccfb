//! A request queue on a worker, with disks in memory.

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::device::blk::{BlkModel, BlkSetup};
use crate::engine::runner::{VringAddr, VringSetup};
use crate::engine::telling::{Blocking, Teller};
use crate::host::blk::{BlkOp, Token};
use crate::host::fault::{FaultPlan, Faults};
use crate::memory::{Segments, Store};
use crate::ring::{Packed, Split};
use crate::sys::disk::{DiskFile, DiskOptions};
use crate::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;

fn queue<F: RingFormat>(memory: &RingMemory, counters: &Arc<VringCounters>) -> DiskQueue<F> {
    let model = BlkModel::new(BlkSetup {
        rings: crate::device::RingOptions::default(),
        name: "disk0".into(),
        capacity_bytes: 1 << 20,
        block_size: 512,
        queues: 1,
        read_only: false,
        serial: "disk0".into(),
        ..BlkSetup::default()
    });
    let setup = VringSetup {
        index: 0,
        size: memory.size,
        features: 0,
        base: None,
        addr: VringAddr {
            desc: memory.at[0],
            driver: memory.at[1],
            device: memory.at[2],
        },
        ram: Arc::clone(&memory.ram),
        kick: None,
        call: None,
        err: None,
    };
    let areas = memory.areas::<F>();
    let teller = Teller::new(0, Arc::new(Blocking::new().unwrap()));
    let vring = Vring::new(
        setup,
        teller,
        areas,
        "disk0".into(),
        Arc::clone(counters),
        false,
        None,
    );
    let store = Arc::new(Store::new(1 << 20).unwrap());
    DiskQueue::new(
        vring.unwrap(),
        BlkHandler::new(&model, 0, memory.size, 0).unwrap(),
        HostDisk::Ram(RamDisk::new(store, IN_FLIGHT_MAX.into())),
        FaultDisk::new(Arc::default(), 512),
        Arc::clone(counters),
        Arc::clone(model.queue_counters(0).unwrap()),
    )
}

fn answers_come_through<F: RingFormat>(
    memory: &RingMemory,
    mut driver: impl Driver,
    ram: &GuestRam,
) {
    let counters = Arc::new(VringCounters::default());
    let mut queue = queue::<F>(memory, &counters);
    let (retired, _unmapped) = crossbeam::channel::bounded(1);
    let mut cx = WorkerCx {
        uring: None,
        scratch: Segments::with_capacity(64),
        retired,
        mailbox: Arc::new(Mailbox::new().unwrap()),
    };
    write_guest(ram, DATA, &[0xee; 513]);
    let good = [Buf::readable(HEADER, 16), Buf::writable(DATA, 513)];
    let good = driver.add(&good).unwrap();
    let nowhere = [Buf::readable(1 << 40, 16), Buf::writable(DATA, 513)];
    driver.add(&nowhere).unwrap();
    driver.publish();
    for _ in 0..2 {
        queue.poll(&mut cx, 64);
    }
    assert_eq!(counters.faults.get(), 1);
    assert_eq!(driver.used(), Some((good, 513)));
    assert_eq!(driver.used(), None);
    assert_eq!(read_guest(ram, DATA, 513), [0; 513]);
    assert_eq!(counters.in_flight.get(), 0);
    assert!(queue.drain(&mut cx));
}

#[test]
fn a_ring_that_breaks_still_shows_what_was_answered() {
    let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
    let memory = RingMemory::new::<Split>(&ram, 0, 16);
    let driver = SplitDriver::new(&memory, false);
    answers_come_through::<Split>(&memory, driver, &ram);
    let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
    let memory = RingMemory::new::<Packed>(&ram, 0, 16);
    let driver = PackedDriver::new(&memory, false);
    answers_come_through::<Packed>(&memory, driver, &ram);
}

#[test]
fn nobody_sleeps_over_a_disk_in_memory_that_is_tried_again() {
    let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
    let memory = RingMemory::new::<Split>(&ram, 0, 16);
    let mut driver = SplitDriver::new(&memory, false);
    let mut queue = queue::<Split>(&memory, &Arc::default());
    let faults = Arc::new(Faults::default());
    faults.set(Some(FaultPlan {
        eagain: 2,
        ..FaultPlan::default()
    }));
    queue.faults = FaultDisk::new(faults, 512);
    let mut cx = WorkerCx {
        uring: None,
        scratch: Segments::with_capacity(64),
        retired: crossbeam::channel::bounded(1).0,
        mailbox: Arc::new(Mailbox::new().unwrap()),
    };
    for _ in 0..20 {
        let read = [Buf::readable(HEADER, 16), Buf::writable(DATA, 513)];
        let id = driver.add(&read).unwrap();
        driver.publish();
        // As a worker does that sleeps whenever a turn found nothing.
        while queue.poll(&mut cx, 64) > 0 || queue.arm(true) == Armed::Work {
            queue.disarm();
        }
        assert_eq!(driver.used(), Some((id, 513)));
    }
}

/// A disk of so many bytes in a file in memory.
fn in_memory(bytes: u64) -> (TempFile, Arc<DiskFile>) {
    let file = TempFile::new_in("/dev/shm".as_ref()).unwrap();
    file.as_file().set_len(bytes).unwrap();
    let options = DiskOptions {
        read_only: false,
        direct: None,
        block_size: 512,
        lock: false,
    };
    let disk = DiskFile::open(file.as_path(), options).unwrap();
    (file, Arc::new(disk))
}

#[test]
fn nobody_sleeps_over_what_was_done_at_once() {
    let (_file, disk) = in_memory(4096);
    let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
    let memory = RingMemory::new::<Split>(&ram, 0, 16);
    let mut queue = queue::<Split>(&memory, &Arc::default());
    let mut ring = Uring::new().unwrap();
    queue.host = HostDisk::Uring(UringDisk::new(disk));
    let mailbox = Arc::new(Mailbox::new().unwrap());
    queue.host.attach(Some(&mut ring), &mailbox).unwrap();
    assert_eq!(queue.arm(true), Armed::Sleep);
    let HostDisk::Uring(disk) = &mut queue.host else {
        unreachable!("it was just put there");
    };
    let token = Token {
        slot: 0,
        generation: 0,
    };
    disk.lend(&mut ring).submit(token, BlkOp::Flush).unwrap();
    assert!(!ring.has_work(), "only the next turn finds it");
    assert_eq!(queue.arm(true), Armed::Work);
}

/// A large one is mapped and written past the caches.
#[test]
fn what_was_written_to_a_file_in_memory_is_settled_before_the_driver_is_told() {
    let (file, disk) = in_memory(33 << 20);
    let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
    let memory = RingMemory::new::<Split>(&ram, 0, 16);
    let mut driver = SplitDriver::new(&memory, false);
    let mut queue = queue::<Split>(&memory, &Arc::default());
    let (retired, _unmapped) = crossbeam::channel::bounded(1);
    let mut cx = WorkerCx {
        uring: Some(Uring::new().unwrap()),
        scratch: Segments::with_capacity(64),
        retired,
        mailbox: Arc::new(Mailbox::new().unwrap()),
    };
    queue.host = HostDisk::Uring(UringDisk::new(disk));
    let mailbox = Arc::clone(&cx.mailbox);
    queue.host.attach(cx.uring.as_mut(), &mailbox).unwrap();
    write_guest(&ram, HEADER, &[1, 0, 0, 0]);
    for round in 1..4u8 {
        write_guest(&ram, DATA, &[round; 512]);
        let write = [
            Buf::readable(HEADER, 16),
            Buf::readable(DATA, 512),
            Buf::writable(DATA + 4096, 1),
        ];
        let id = driver.add(&write).unwrap();
        driver.publish();
        // As `poll` does it, but for the last steps.
        while queue.run(&mut cx, 64).unwrap() == 0 {}
        let HostDisk::Uring(disk) = &mut queue.host else {
            unreachable!("it was just put there");
        };
        // The first one makes the page.
        assert_eq!(disk.is_unsettled(), round > 1, "{round}");
        queue.host.settle();
        queue.vring.publish();
        let HostDisk::Uring(disk) = &mut queue.host else {
            unreachable!("it was just put there");
        };
        assert!(!disk.is_unsettled());
        assert_eq!(driver.used(), Some((id, 1)));
        let stored = std::fs::read(file.as_path()).unwrap();
        assert!(stored[..512] == [round; 512]);
    }
}
