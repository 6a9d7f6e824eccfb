//! Rings as a worker serves them: kicks, calls and memory tables that come when they like.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::device::DeviceModel;
use vringd::device::blk::{BlkModel, BlkSetup};
use vringd::engine::{
    Backing, BlockingFd, DeviceHandle, Engine, EngineOptions, FdKind, IdlePolicy, Member, Parts,
    VringAddr, VringRunner, VringSetup,
};
use vringd::memory::{GuestRam, Store};
use vringd::ring::RingFormat;
use vringd::sys::eventfd::make_blocking;
use vringd::testing::driver::{
    Buf, Calls, Driver, PackedDriver, RingMemory, SplitDriver, UVA, read_guest, write_guest,
};

use super::port::fresh;
use crate::support::deadline::wait_until;

const RAM: u64 = 0x20_0000;
const HEADERS: u64 = 0x10_0000;
pub const DATA: u64 = 0x11_0000;
const SIZE: u16 = 16;
pub const DISK: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VIRTIO_BLK_F_FLUSH; VIRTIO_F_RING_PACKED.
const FEATURES: u64 = 1 << 28 | 1 << 32 | 1 << 9;
const PACKED: u64 = 1 << 34;

/// A disk with two queues of a guest, served by a worker.
pub struct Machine<D: Driver> {
    engine: Option<Engine>,
    pub handle: Arc<DeviceHandle>,
    model: Arc<BlkModel>,
    pub ram: Arc<GuestRam>,
    rings: [RingMemory; 2],
    pub drivers: [D; 2],
    started: Vec<u16>,
}

/// What a vring is given to tell and to be told.
#[derive(Default)]
pub struct Fds<'a> {
    pub kick: Option<&'a EventFd>,
    pub call: Option<&'a EventFd>,
    pub err: Option<&'a EventFd>,
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

impl<D: Driver> Machine<D> {
    fn new() -> Machine<D> {
        let store = Arc::new(Store::new(DISK).unwrap());
        Machine::with(vec![0], Backing::Ram(store), BlkSetup::default())
    }

    /// With a worker on each of `cores`, of which the first may serve the disk; of `more`, what a
    /// disk always has is not looked at.
    pub fn with(cores: Vec<usize>, backing: Backing, more: BlkSetup) -> Machine<D> {
        let model = Arc::new(BlkModel::new(BlkSetup {
            name: "disk0".into(),
            capacity_bytes: DISK,
            block_size: 512,
            queues: 2,
            read_only: false,
            serial: "disk0".into(),
            ..more
        }));
        let options = EngineOptions {
            cores,
            idle: IdlePolicy::Interrupt,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let parts = Parts::Blk(Arc::clone(&model), backing);
        let member = Member {
            parts,
            cores: vec![options.cores[0]],
        };
        let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let first = RingMemory::new::<D::Format>(&ram, 0, SIZE);
        let at = first.end::<D::Format>().next_multiple_of(4096);
        let rings = [first, RingMemory::new::<D::Format>(&ram, at, SIZE)];
        Machine {
            engine: Some(engine),
            handle: handles.remove(0),
            model,
            drivers: [D::new(&rings[0], false), D::new(&rings[1], false)],
            rings,
            ram,
            started: Vec::new(),
        }
    }

    fn addr(&self, index: u16) -> VringAddr {
        let [desc, driver, device] = self.rings[usize::from(index)].at.map(|gpa| gpa + UVA);
        VringAddr {
            desc,
            driver,
            device,
        }
    }

    pub fn start(&mut self, index: u16, fds: &Fds<'_>) {
        self.start_at(index, None, fds);
    }

    fn start_at(&mut self, index: u16, base: Option<u32>, fds: &Fds<'_>) {
        let copy = |fd: Option<&EventFd>| fd.map(|fd| fd.try_clone().unwrap());
        let packed = if D::Format::PACKED { PACKED } else { 0 };
        self.handle
            .start(VringSetup {
                index,
                size: SIZE,
                features: FEATURES | packed,
                base,
                addr: self.addr(index),
                ram: Arc::clone(&self.ram),
                kick: copy(fds.kick),
                call: copy(fds.call),
                err: copy(fds.err),
            })
            .unwrap();
        self.started.push(index);
    }

    /// Posts a request in place `number`: 512 bytes to (`write`) or from sector `number`.
    pub fn post(&mut self, index: u16, number: u64, write: bool) -> u16 {
        let (header, data) = (HEADERS + number * 32, DATA + number * 1024);
        write_guest(&self.ram, header, &u32::from(write).to_le_bytes());
        write_guest(&self.ram, header + 8, &number.to_le_bytes());
        write_guest(&self.ram, header + 16, &[0xee]);
        let data = Buf {
            addr: data,
            len: 512,
            write: !write,
        };
        let bufs = [
            Buf::readable(header, 16),
            data,
            Buf::writable(header + 16, 1),
        ];
        let driver = &mut self.drivers[usize::from(index)];
        let id = driver.add(&bufs).unwrap();
        driver.publish();
        id
    }

    pub fn await_used(&mut self, index: u16) -> (u16, u32) {
        let driver = &mut self.drivers[usize::from(index)];
        wait_until("the request comes back", PATIENCE, || driver.used())
    }

    pub fn status(&self, number: u64) -> u8 {
        read_guest(&self.ram, HEADERS + number * 32 + 16, 1)[0]
    }

    pub fn counter(&self, name: &str) -> u64 {
        let device = DeviceModel::counters(self.model.as_ref());
        let vrings = self.handle.counters();
        let found = device.iter().chain(&vrings).find(|(n, _)| *n == name);
        found.unwrap().1
    }
}

impl<D: Driver> Drop for Machine<D> {
    fn drop(&mut self) {
        for index in self.started.drain(..) {
            let _ = self.handle.stop(index);
        }
        // A worker that does not end must not keep the test from ending.
        if let Some(engine) = self.engine.take() {
            let ending = std::thread::spawn(move || engine.stop());
            let is_over = || ending.is_finished().then_some(());
            if !std::thread::panicking() {
                wait_until("the worker ends", PATIENCE, is_over);
            }
        }
    }
}

#[test]
fn a_sleeping_worker_ends_when_it_is_told() {
    for idle in [IdlePolicy::Interrupt, IdlePolicy::Adaptive] {
        let options = EngineOptions {
            cores: vec![0],
            idle,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let (engine, _) = Engine::start(&options, Vec::new()).unwrap();
        let parks = || {
            let counters = engine.counters().remove(0);
            counters
                .into_iter()
                .find(|counter| *counter == ("parks", 1))
        };
        wait_until("the worker sleeps", PATIENCE, parks);
        let ending = std::thread::spawn(move || engine.stop());
        let is_over = || ending.is_finished().then_some(());
        wait_until("the worker ends", PATIENCE, is_over);
    }
}

macro_rules! both {
    ($($name:ident)*) => {
        mod split { $(#[test] fn $name() { super::$name::<super::SplitDriver>(); })* }
        mod packed { $(#[test] fn $name() { super::$name::<super::PackedDriver>(); })* }
    };
}

both! {
    kicks_too_many_and_kicks_for_nothing_change_nothing
    a_vring_without_a_call_fd_works_and_gets_one_later
    a_vring_without_a_kick_fd_is_polled
    a_call_fd_that_is_full_stops_nobody
    a_call_fd_that_blocks_and_is_full_stops_nobody
    an_err_fd_that_blocks_and_is_full_stops_nobody
    a_ring_that_breaks_tells_its_err_fd_once_and_the_other_goes_on
    the_memory_table_is_exchanged_under_load
    who_takes_over_a_ring_calls_a_driver_that_may_have_been_told_nothing
}

fn kicks_too_many_and_kicks_for_nothing_change_nothing<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, call) = (eventfd(), eventfd());
    machine.start(
        0,
        &Fds {
            kick: Some(&kick),
            call: Some(&call),
            err: None,
        },
    );
    for round in 0..20 {
        let id = machine.post(0, round, false);
        for _ in 0..2 {
            kick.write(1).unwrap();
        }
        assert_eq!(machine.await_used(0), (id, 513));
        // Nothing is there to be found.
        for count in [1, 1, u64::MAX - 1] {
            let _ = kick.write(count);
        }
        assert_eq!(machine.drivers[0].used(), None);
    }
    assert_eq!(
        machine.handle.stop(0).is_ok(),
        machine.started.pop().is_some()
    );
    assert_eq!(machine.drivers[0].used(), None);
    assert_eq!(machine.counter("reads"), 20, "each request is done once");
    assert_eq!(machine.counter("ring_faults"), 0);
    assert_eq!(call.read().unwrap(), 20, "one call for each");
}

fn a_vring_without_a_call_fd_works_and_gets_one_later<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, call) = (eventfd(), eventfd());
    let kicked = Fds {
        kick: Some(&kick),
        ..Fds::default()
    };
    machine.start(0, &kicked);
    machine.drivers[0].set_calls(Calls::On);
    let id = machine.post(0, 0, false);
    kick.write(1).unwrap();
    assert_eq!(machine.await_used(0), (id, 513));
    assert_eq!(machine.counter("calls"), 0);
    let later = Some(call.try_clone().unwrap());
    machine.handle.set_call(0, later, None).unwrap();
    let id = machine.post(0, 1, false);
    kick.write(1).unwrap();
    assert_eq!(machine.await_used(0), (id, 513));
    wait_until("the driver is called", PATIENCE, || call.read().ok());
    // And none again.
    machine.handle.set_call(0, None, None).unwrap();
    let id = machine.post(0, 2, false);
    kick.write(1).unwrap();
    assert_eq!(machine.await_used(0), (id, 513));
}

fn a_vring_without_a_kick_fd_is_polled<D: Driver>() {
    let mut machine = Machine::<D>::new();
    machine.start(1, &Fds::default());
    for number in 0..5 {
        let id = machine.post(1, number, false);
        assert_eq!(machine.await_used(1), (id, 513));
        assert_eq!(machine.status(number), 0);
    }
}

fn a_call_fd_that_is_full_stops_nobody<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, full) = (eventfd(), eventfd());
    full.write(u64::MAX - 1).unwrap();
    machine.start(
        0,
        &Fds {
            kick: Some(&kick),
            call: Some(&full),
            err: None,
        },
    );
    for number in 0..5 {
        let id = machine.post(0, number, false);
        kick.write(1).unwrap();
        assert_eq!(machine.await_used(0), (id, 513));
    }
    assert_eq!(full.read().unwrap(), u64::MAX - 1);
}

/// The worker before may have ended between a publish and its call, and a position that the driver
/// asked to be called at is passed only once.
fn who_takes_over_a_ring_calls_a_driver_that_may_have_been_told_nothing<D: Driver>() {
    let mut machine = Machine::<D>::new();
    machine.drivers[0].set_calls(Calls::On);
    let call = eventfd();
    let (deaf, hears) = (
        Fds::default(),
        Fds {
            call: Some(&call),
            ..Fds::default()
        },
    );
    let mut base = None;
    for number in 0..2 * u64::from(SIZE) {
        machine.start_at(0, base, &deaf);
        let id = machine.post(0, number % 16, false);
        assert_eq!(machine.await_used(0), (id, 513));
        for fds in [&hears, &deaf] {
            machine.started.pop();
            base = Some(machine.handle.stop(0).unwrap());
            machine.start_at(0, base, fds);
            if fds.call.is_some() {
                wait_until("the driver is called", PATIENCE, || call.read().ok());
            }
        }
        machine.started.pop();
        base = Some(machine.handle.stop(0).unwrap());
    }
    assert_eq!(machine.counter("calls"), 2 * u64::from(SIZE), "one each");
}

/// Makes `fd` one that sleeps in a write, after it was passed.
fn spoil(fd: &EventFd) {
    fd.write(u64::MAX - 1).unwrap();
    make_blocking(fd).unwrap();
}

/// Queue 1, on the same worker, is served, and after its session is over queue 0 is, too.
fn goes_on<D: Driver>(mut machine: Machine<D>, spoiled: FdKind, kick: &EventFd) {
    for number in 8..16 {
        let id = machine.post(1, number, false);
        kick.write(1).unwrap();
        assert_eq!(machine.await_used(1), (id, 513));
    }
    let fd = BlockingFd {
        vring: 0,
        kind: spoiled,
    };
    let blocked = || machine.handle.blocking();
    assert_eq!(wait_until("it is told", PATIENCE, blocked), fd);
    assert_eq!(machine.counter("blocked_calls"), 1, "and no other is tried");
    for index in machine.started.drain(..) {
        machine.handle.stop(index).unwrap();
    }
    assert_eq!(machine.handle.session_over(), Some(fd));
    assert_eq!(machine.handle.blocking(), None);
    let call = eventfd();
    machine.drivers[0] = fresh(&machine.rings[0]);
    let fds = Fds {
        kick: Some(kick),
        call: Some(&call),
        err: None,
    };
    machine.start(0, &fds);
    let id = machine.post(0, 0, false);
    kick.write(1).unwrap();
    assert_eq!(machine.await_used(0), (id, 513));
    wait_until("the next session is called", PATIENCE, || call.read().ok());
    assert_eq!(machine.counter("blocked_calls"), 1);
}

fn a_call_fd_that_blocks_and_is_full_stops_nobody<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, call) = (eventfd(), eventfd());
    let fds = Fds {
        kick: Some(&kick),
        call: Some(&call),
        err: None,
    };
    machine.start(0, &fds);
    machine.start(1, &fds);
    spoil(&call);
    for number in 0..4 {
        let id = machine.post(0, number, false);
        kick.write(1).unwrap();
        assert_eq!(machine.await_used(0), (id, 513));
    }
    goes_on(machine, FdKind::Call, &kick);
}

fn an_err_fd_that_blocks_and_is_full_stops_nobody<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, err) = (eventfd(), eventfd());
    let fds = Fds {
        kick: Some(&kick),
        call: None,
        err: Some(&err),
    };
    machine.start(0, &fds);
    machine.start(1, &Fds { err: None, ..fds });
    spoil(&err);
    let nowhere = [Buf::readable(1 << 40, 16), Buf::writable(DATA, 513)];
    machine.drivers[0].add(&nowhere).unwrap();
    machine.drivers[0].publish();
    kick.write(1).unwrap();
    goes_on(machine, FdKind::Err, &kick);
}

fn a_ring_that_breaks_tells_its_err_fd_once_and_the_other_goes_on<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let (kick, err) = (eventfd(), eventfd());
    let fds = Fds {
        kick: Some(&kick),
        call: None,
        err: Some(&err),
    };
    machine.start(0, &fds);
    machine.start(1, &Fds { err: None, ..fds });
    let nowhere = [Buf::readable(1 << 40, 16), Buf::writable(DATA, 513)];
    for _ in 0..2 {
        machine.drivers[0].add(&nowhere).unwrap();
        machine.drivers[0].publish();
        kick.write(1).unwrap();
    }
    wait_until("the fault is told", PATIENCE, || err.read().ok());
    for number in 0..5 {
        let id = machine.post(1, number, false);
        kick.write(1).unwrap();
        assert_eq!(machine.await_used(1), (id, 513));
    }
    err.read().unwrap_err();
    assert_eq!(machine.counter("ring_faults"), 1);
    assert_eq!(machine.drivers[0].used(), None);
}

fn the_memory_table_is_exchanged_under_load<D: Driver>() {
    let mut machine = Machine::<D>::new();
    let kick = eventfd();
    let kicked = Fds {
        kick: Some(&kick),
        ..Fds::default()
    };
    machine.start(0, &kicked);
    let (handle, addr) = (Arc::clone(&machine.handle), machine.addr(0));
    let specs = machine.ram.specs();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let mut swaps = 0;
            while !done.load(Ordering::Relaxed) {
                // The same memory, mapped anew: the old mappings go away when nothing needs them.
                let ram = Arc::new(GuestRam::map(specs.clone(), None).unwrap());
                handle.swap(0, ram, addr).unwrap();
                swaps += 1;
            }
            swaps
        });
        for round in 0..300u64 {
            let bytes = [u8::try_from(round % 251).unwrap(); 512];
            for write in [true, false] {
                let place = if write { bytes } else { [0xee; 512] };
                for number in 0..4 {
                    write_guest(&machine.ram, DATA + number * 1024, &place);
                    machine.post(0, number, write);
                    kick.write(1).unwrap();
                }
                for _ in 0..4 {
                    assert_eq!(machine.await_used(0).1, if write { 1 } else { 513 });
                }
                for number in 0..4 {
                    assert_eq!(machine.status(number), 0);
                    assert_eq!(read_guest(&machine.ram, DATA + number * 1024, 512), bytes);
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(swapper.join().unwrap() > 10);
    });
    assert_eq!(machine.counter("ring_faults"), 0);
}
