//! The request queue on real rings, with a disk that misbehaves on demand.

mod large;

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::device::DeviceModel;
use crate::host::limit::DiskLimits;
use crate::memory::GuestRam;
use crate::ring::{Split, Virtqueue};
use crate::testing::disk::{Ending, TestDisk};
use crate::testing::driver::{Buf, Driver, RingMemory, SplitDriver, read_guest, write_guest};

const DISK: usize = 1 << 16;
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;
const UNTOUCHED: u8 = 0xee;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const RANGES: u64 = (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES);

struct Rig {
    ram: Arc<GuestRam>,
    driver: SplitDriver,
    vq: Virtqueue<Split>,
    handler: BlkHandler,
    disk: TestDisk,
    scratch: Segments,
    model: BlkModel,
}

impl Rig {
    fn new(features: u64) -> Rig {
        Rig::with(features, SickPolicy::default(), Arc::default())
    }

    fn with(features: u64, sick: SickPolicy, limits: Arc<DiskLimits>) -> Rig {
        let ram = GuestRam::for_test(&[(0, 0x20_0000)]);
        let memory = RingMemory::new::<Split>(&ram, 0, 64);
        let setup = BlkSetup {
            rings: crate::device::RingOptions::default(),
            name: "disk0".into(),
            capacity_bytes: DISK as u64,
            block_size: 512,
            queues: 1,
            read_only: false,
            serial: "serial-of-disk0".into(),
            sick,
            limits,
            ..BlkSetup::default()
        };
        let model = BlkModel::new(setup);
        let mut disk = TestDisk::new(DISK);
        for (at, byte) in disk.bytes.iter_mut().enumerate() {
            *byte = u8::try_from(at * 7 % 251).unwrap();
        }
        Rig {
            vq: memory.device::<Split>(true),
            driver: SplitDriver::new(&memory, true),
            ram,
            handler: BlkHandler::new(&model, 0, 64, features).unwrap(),
            disk,
            scratch: Segments::with_capacity(4096),
            model,
        }
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        write_guest(&self.ram, at, &kind.to_le_bytes());
        write_guest(&self.ram, at + 8, &sector.to_le_bytes());
    }

    /// A request in the usual framing, with its own place in memory by `number`.
    fn add(&mut self, number: u64, kind: u32, sector: u64, bytes: u32) -> u16 {
        let header = HEADER + number * 16;
        self.header(header, kind, sector);
        write_guest(&self.ram, STATUS + number, &[UNTOUCHED]);
        let data = Buf {
            addr: DATA + number * 4096,
            len: bytes,
            write: matches!(kind, 0 | 8),
        };
        let mut bufs = vec![Buf::readable(header, 16)];
        if bytes > 0 {
            bufs.push(data);
        }
        bufs.push(Buf::writable(STATUS + number, 1));
        let id = self.driver.add(&bufs).unwrap();
        self.driver.publish();
        id
    }

    fn poll(&mut self) -> usize {
        let Rig {
            handler,
            vq,
            disk,
            scratch,
            ..
        } = self;
        let work = handler.poll(vq, disk, scratch, 64).unwrap();
        vq.publish();
        work
    }

    fn status(&self, number: u64) -> u8 {
        read_guest(&self.ram, STATUS + number, 1)[0]
    }

    fn counter(&self, name: &str) -> u64 {
        self.model
            .counters()
            .iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }

    /// Polls and releases until the chain comes back.
    fn finish(&mut self) -> (u16, u32) {
        for _ in 0..20 {
            self.poll();
            self.disk.release();
            self.poll();
            if let Some(used) = self.driver.used() {
                return used;
            }
        }
        panic!("the chain never came back");
    }
}

/// VIRTIO 1.3 §2.7.8.2: `len` counts what was written, status byte and all.
#[test]
fn reads_and_writes_move_the_bytes_and_used_len_is_exact() {
    let mut rig = Rig::new(FLUSH);
    let id = rig.add(0, 0, 3, 1024);
    assert_eq!(rig.finish(), (id, 1025));
    assert_eq!(rig.status(0), STATUS_OK);
    assert_eq!(read_guest(&rig.ram, DATA, 1024), rig.disk.bytes[1536..2560]);
    let data: Vec<u8> = (0..512).map(|i| u8::try_from(i % 256).unwrap()).collect();
    write_guest(&rig.ram, DATA + 4096, &data);
    let id = rig.add(1, 1, 5, 512);
    assert_eq!(rig.finish(), (id, 1));
    assert_eq!(rig.disk.bytes[2560..3072], data);
    assert_eq!((rig.counter("reads"), rig.counter("write_bytes")), (1, 512));
}

#[test]
fn nothing_is_answered_before_the_host_is_done_and_order_is_free() {
    let mut rig = Rig::new(FLUSH);
    let ids: Vec<_> = (0..3).map(|i| rig.add(i, 0, i, 512)).collect();
    rig.poll();
    assert_eq!((rig.driver.used(), rig.handler.in_flight()), (None, 3));
    rig.disk.release();
    rig.poll();
    let used: Vec<_> = core::iter::from_fn(|| rig.driver.used())
        .map(|used| used.0)
        .collect();
    assert_eq!(used, ids.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn short_io_is_continued_to_the_end() {
    let mut rig = Rig::new(FLUSH);
    rig.disk.endings.extend([
        Ending::Short(100),
        Ending::Short(600),
        Ending::Error(EAGAIN),
    ]);
    let id = rig.add(0, 0, 0, 2048);
    assert_eq!(rig.finish(), (id, 2049));
    assert_eq!(read_guest(&rig.ram, DATA, 2048), rig.disk.bytes[..2048]);
    assert_eq!(rig.counter("short_ios"), 2);
    rig.disk.endings.push_back(Ending::Short(1));
    write_guest(&rig.ram, DATA + 4096, &[0x5a; 1024]);
    let id = rig.add(1, 1, 0, 1024);
    assert_eq!(rig.finish(), (id, 1));
    assert_eq!(rig.disk.bytes[..1024], [0x5a; 1024]);
}

#[test]
fn a_failing_disk_gives_io_errors_and_never_a_hang() {
    let mut rig = Rig::new(FLUSH);
    for (number, ending) in [Ending::Error(5), Ending::Error(28), Ending::Short(0)]
        .into_iter()
        .enumerate()
    {
        rig.disk.endings.push_back(ending);
        let id = rig.add(number as u64, 0, 0, 512);
        assert_eq!(rig.finish(), (id, 513));
        assert_eq!(rig.status(number as u64), STATUS_IOERR);
    }
    assert_eq!(rig.counter("errors"), 3);
    let id = rig.add(9, 0, 0, 512);
    assert_eq!(rig.finish(), (id, 513), "the queue goes on");
}

#[test]
fn a_buffer_that_can_not_be_accessed_is_the_guests_fault() {
    let mut rig = Rig::new(FLUSH);
    rig.disk.endings.push_back(Ending::Error(EFAULT));
    rig.add(0, 0, 0, 512);
    rig.poll();
    rig.disk.release();
    let Rig {
        handler,
        vq,
        disk,
        scratch,
        ..
    } = &mut rig;
    assert_eq!(handler.poll(vq, disk, scratch, 64), Err(RingFault::Memory));
    assert_eq!(handler.in_flight(), 0);
}

#[test]
fn a_full_host_loses_no_request() {
    let mut rig = Rig::new(FLUSH);
    rig.disk.room = 2;
    for number in 0..10 {
        rig.add(number, 0, number, 512);
    }
    let mut used = 0;
    for _ in 0..20 {
        rig.poll();
        rig.disk.release();
        rig.poll();
        used += core::iter::from_fn(|| rig.driver.used()).count();
    }
    assert_eq!(used, 10);
    for number in 0..10 {
        let at = usize::try_from(number).unwrap() * 512;
        let data = read_guest(&rig.ram, DATA + number * 4096, 512);
        assert_eq!(data, rig.disk.bytes[at..at + 512]);
    }
}

#[test]
fn flush_reaches_the_disk_and_without_it_writes_are_durable() {
    let mut rig = Rig::new(FLUSH);
    rig.add(0, 4, 0, 0);
    assert_eq!(rig.finish().1, 1);
    rig.add(1, 1, 0, 512);
    rig.finish();
    assert_eq!((rig.disk.flushes, rig.disk.durable_writes), (1, 0));
    let mut rig = Rig::new(0);
    rig.add(0, 1, 0, 512);
    rig.finish();
    assert_eq!(rig.disk.durable_writes, 1);
}

#[test]
fn a_cache_that_is_off_makes_writes_durable_at_once() {
    let mut rig = Rig::new(FLUSH | RANGES);
    rig.add(0, 1, 0, 512);
    rig.finish();
    assert_eq!(rig.disk.durable_writes, 0);
    rig.model.write_config(32, &[0]).unwrap();
    // Each part of a write that is continued is durable.
    rig.disk.endings.push_back(Ending::Short(512));
    rig.add(0, 1, 0, 1024);
    rig.finish();
    assert_eq!((rig.disk.durable_writes, rig.disk.flushes), (2, 0));
    assert_eq!(rig.counter("durable_writes"), 2);
    rig.model.write_config(32, &[1]).unwrap();
    rig.add(0, 1, 0, 512);
    rig.finish();
    assert_eq!((rig.disk.durable_writes, rig.status(0)), (2, STATUS_OK));
}

#[test]
fn get_id_tells_the_serial_number() {
    let mut rig = Rig::new(FLUSH);
    let id = rig.add(0, 8, 0, 20);
    assert_eq!(rig.finish(), (id, 21));
    assert_eq!(read_guest(&rig.ram, DATA, 20), b"serial-of-disk0\0\0\0\0\0");
    let id = rig.add(1, 8, 0, 4);
    assert_eq!(rig.finish(), (id, 5), "no more than there is room for");
    let id = rig.add(2, 8, 0, 0);
    assert_eq!(rig.finish(), (id, 1), "not even a byte");
    assert_eq!(rig.status(2), STATUS_OK);
}

#[test]
fn bad_requests_are_answered_and_the_queue_goes_on() {
    let mut rig = Rig::new(FLUSH);
    let beyond = rig.add(0, 0, 1 << 40, 512);
    assert_eq!(rig.finish(), (beyond, 513));
    assert_eq!(
        read_guest(&rig.ram, DATA, 512),
        [0; 512],
        "nothing left as it was"
    );
    assert_eq!(rig.status(0), STATUS_IOERR);
    let unknown = rig.add(1, 99, 0, 0);
    assert_eq!(rig.finish(), (unknown, 1));
    assert_eq!(rig.status(1), 2);
    let id = rig.add(2, 0, 0, 512);
    assert_eq!(rig.finish(), (id, 513));
}

#[test]
fn a_request_that_can_not_be_answered_breaks_the_ring_behind_those_before_it() {
    let half = [Buf::readable(HEADER, 15), Buf::writable(STATUS, 1)];
    let no_status = [Buf::readable(HEADER, 16)];
    let empty = [Buf::readable(HEADER, 16), Buf::writable(STATUS, 0)];
    for bad in [&half[..], &no_status, &empty] {
        let mut rig = Rig::new(FLUSH);
        let unknown = rig.add(0, 99, 0, 0);
        let read = rig.add(1, 0, 0, 512);
        rig.driver.add(bad).unwrap();
        rig.add(2, 1, 0, 512);
        let Rig {
            handler,
            vq,
            disk,
            scratch,
            ..
        } = &mut rig;
        let fault = RingFault::Unanswerable;
        assert_eq!(handler.poll(vq, disk, scratch, 64), Err(fault));
        vq.latch(fault);
        disk.release();
        assert_eq!(handler.poll(vq, disk, scratch, 64), Err(fault));
        vq.publish();
        assert_eq!(rig.driver.used(), Some((unknown, 1)));
        assert_eq!(rig.driver.used(), Some((read, 513)));
        assert_eq!(rig.driver.used(), None, "it does not pass for done");
        assert_eq!(rig.counter("writes"), 0, "nor is what comes behind it done");
        assert_eq!(rig.counter("bad_chains"), 1);
        assert_eq!(rig.handler.in_flight(), 0);
    }
}

/// Cuts `total` bytes at `gpa` into buffers at the given points.
fn cut_up(gpa: u64, total: u32, cuts: &[u32], write: bool) -> Vec<Buf> {
    let mut points: Vec<u32> = cuts
        .iter()
        .map(|cut| cut % total)
        .chain([0, total])
        .collect();
    points.sort_unstable();
    let buf = |w: &[u32]| Buf {
        addr: gpa + u64::from(w[0]),
        len: w[1] - w[0],
        write,
    };
    points.windows(2).map(buf).collect()
}

proptest! {
    #[test]
    fn any_framing_gives_the_same_bytes(
        write in any::<bool>(),
        sector in 0u64..120,
        blocks in 1u32..5,
        readable in prop::collection::vec(any::<u32>(), 0..6),
        writable in prop::collection::vec(any::<u32>(), 0..6),
    ) {
        let mut rig = Rig::new(FLUSH);
        let bytes = blocks * 512;
        // Header and data out in one range, data in and status in another.
        let (out, data_in) = if write { (bytes, 0) } else { (0, bytes) };
        rig.header(HEADER, u32::from(write), sector);
        let data: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 253).unwrap()).collect();
        if write {
            write_guest(&rig.ram, HEADER + 16, &data);
        }
        let mut bufs = cut_up(HEADER, 16 + out, &readable, false);
        bufs.extend(cut_up(DATA, data_in + 1, &writable, true));
        let id = rig.driver.add(&bufs).unwrap();
        rig.driver.publish();
        prop_assert_eq!(rig.finish(), (id, data_in + 1));
        prop_assert_eq!(read_guest(&rig.ram, DATA + u64::from(data_in), 1), vec![STATUS_OK]);
        let at = usize::try_from(sector * 512).unwrap();
        let on_disk = &rig.disk.bytes[at..at + bytes as usize];
        if write {
            prop_assert_eq!(on_disk, &data[..]);
        } else {
            prop_assert_eq!(&read_guest(&rig.ram, DATA, bytes as usize)[..], on_disk);
        }
    }
}

mod limits;
mod ranges;
mod sick;
