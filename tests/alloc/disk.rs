//! Requests of a disk, over both ring formats: on one that does nothing, in memory, in a file that
//! is mapped, and in one through io_uring, where buffers that do not suit it are bounced.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::tempfile::TempFile;
use vringd::device::blk::{BlkHandler, BlkModel, BlkSetup};
use vringd::host::null::NullDisk;
use vringd::host::ram::RamDisk;
use vringd::host::uring::UringDisk;
use vringd::memory::{GuestRam, Segments, Store};
use vringd::ring::{ChainQueue, Virtqueue};
use vringd::sys::disk::{DiskFile, DiskOptions};
use vringd::sys::uring::Uring;
use vringd::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

use super::calls;

const SIZE: u16 = 256;
const DISK: u64 = 1 << 20;
/// Requests of a burst at most; each has a place of its own in memory and on the disk.
const BURST_MAX: u8 = 40;
const TABLES: u64 = 0x8_0000;
const PLACES: u64 = 0x10_0000;
const PLACE: u64 = 0x4000;
/// The data of a place.
const DATA: u64 = 0x1000;
const LEN: u32 = 8192;
const STATUS: u64 = 0x3800;
const RAM: u64 = PLACES + PLACE * BURST_MAX as u64;
const UNANSWERED: u8 = 0xee;
const PATIENCE: Duration = Duration::from_secs(20);

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// FLUSH, DISCARD, WRITE_ZEROES.
const FEATURES: u64 = 1 << 9 | 1 << 13 | 1 << 14;

enum Host {
    Null(NullDisk),
    Ram(RamDisk),
    File(Box<UringDisk>, Box<Uring>),
}

impl Host {
    /// In `/dev/shm` it is mapped.
    fn file(directory: &str) -> Host {
        let file = TempFile::new_in(Path::new(directory)).unwrap();
        file.as_file().set_len(DISK).unwrap();
        let options = DiskOptions {
            read_only: false,
            direct: None,
            block_size: 512,
            lock: false,
        };
        let disk = DiskFile::open(file.as_path(), options).unwrap();
        let mut ring = Uring::new().unwrap();
        let mut disk = UringDisk::new(Arc::new(disk));
        disk.attach(&mut ring, SIZE.into()).unwrap();
        Host::File(Box::new(disk), Box::new(ring))
    }

    fn name(&self) -> &'static str {
        match self {
            Host::Null(_) => "null",
            Host::Ram(_) => "ram",
            Host::File(..) => "file",
        }
    }
}

/// How the driver lays a request out.
#[derive(Debug, Clone, Copy)]
enum Framing {
    /// Header, data and status in a buffer each.
    Usual,
    /// The same in an indirect table.
    Indirect,
    /// The data in pieces that no sector fits.
    Odd,
}

struct Guest<D: Driver> {
    ram: Arc<GuestRam>,
    driver: D,
    vq: Virtqueue<D::Format>,
    handler: BlkHandler,
    scratch: Segments,
    host: Host,
}

impl<D: Driver> Guest<D> {
    fn new(host: Host) -> Guest<D> {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let ring = RingMemory::new::<D::Format>(&ram, 0, SIZE);
        let model = BlkModel::new(BlkSetup {
            name: "disk0".into(),
            capacity_bytes: DISK,
            block_size: 512,
            queues: 1,
            serial: "serial".into(),
            ..BlkSetup::default()
        });
        Guest {
            driver: D::new(&ring, true),
            vq: ring.device::<D::Format>(true),
            handler: BlkHandler::new(&model, 0, SIZE, FEATURES).unwrap(),
            scratch: Segments::with_capacity(4096),
            host,
            ram,
        }
    }

    /// Posts the same request for each of the first places.
    fn post(&mut self, kind: u32, framing: Framing, count: u8, fill: u8) {
        for number in 0..count {
            let at = PLACES + PLACE * u64::from(number);
            let sector = u64::from(number) * u64::from(LEN / 512);
            let in_header = if matches!(kind, IN | OUT) { sector } else { 0 };
            write_guest(&self.ram, at, &kind.to_le_bytes());
            write_guest(&self.ram, at + 8, &in_header.to_le_bytes());
            write_guest(&self.ram, at + STATUS, &[UNANSWERED]);
            let (bytes, write) = match kind {
                IN => (LEN, true),
                OUT => (LEN, false),
                GET_ID => (20, true),
                FLUSH => (0, false),
                _ => (16, false),
            };
            let mut data = vec![fill.wrapping_add(number); bytes as usize];
            if matches!(kind, DISCARD | WRITE_ZEROES) {
                data[..8].copy_from_slice(&sector.to_le_bytes());
                data[8..12].copy_from_slice(&(LEN / 512).to_le_bytes());
                // UNMAP of every other.
                let flags = u32::from(kind == WRITE_ZEROES && number % 2 == 1);
                data[12..].copy_from_slice(&flags.to_le_bytes());
            }
            write_guest(&self.ram, at + DATA, &data);
            let buf = |from: u32, to: u32| Buf {
                addr: at + DATA + u64::from(from),
                len: to - from,
                write,
            };
            let mut bufs = vec![Buf::readable(at, 16)];
            match framing {
                Framing::Odd if bytes > 5 => bufs.extend([buf(0, 5), buf(5, bytes)]),
                _ if bytes > 0 => bufs.push(buf(0, bytes)),
                _ => {}
            }
            bufs.push(Buf::writable(at + STATUS, 1));
            let added = match framing {
                Framing::Indirect => {
                    let table = TABLES + u64::from(number) * 64;
                    self.driver.add_indirect(&bufs, table)
                }
                _ => self.driver.add(&bufs),
            };
            added.unwrap();
        }
        self.driver.publish();
    }

    /// What a worker does in one turn.
    fn turn(&mut self) {
        let Guest {
            handler,
            vq,
            scratch,
            host,
            ..
        } = self;
        let done = match host {
            Host::Null(disk) => handler.poll(vq, disk, scratch, 64),
            Host::Ram(disk) => handler.poll(vq, disk, scratch, 64),
            Host::File(disk, ring) => {
                let done = handler.poll(vq, &mut disk.lend(ring), scratch, 64);
                ring.enter();
                done
            }
        };
        done.unwrap();
        vq.publish();
        vq.set_kicks(false);
        vq.set_kicks(true);
    }

    /// Serves what was posted; returns how often the allocator was called meanwhile.
    fn serve(&mut self, count: u8, what: &str) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        let mut left = count;
        let mut called = 0;
        while left > 0 {
            let before = calls();
            self.turn();
            called += calls() - before;
            while self.driver.used().is_some() {
                left -= 1;
            }
            assert!(Instant::now() < deadline, "{what}: {left} of {count} left");
        }
        for number in 0..count {
            let status = PLACES + PLACE * u64::from(number) + STATUS;
            let status = read_guest(&self.ram, status, 1);
            assert_eq!(status, [0], "{what}: status of {number}");
        }
        called
    }

    fn burst(&mut self, kind: u32, framing: Framing, count: u8, fill: u8) -> u64 {
        let what = format!("{}: {kind} {framing:?}", self.host.name());
        self.post(kind, framing, count, fill);
        let called = self.serve(count, &what);
        assert_eq!(self.vq.in_flight(), 0, "{what}");
        called
    }

    /// The data of the first places is this, one more in each.
    fn has(&self, count: u8, want: impl Fn(u8) -> u8, what: &str) {
        for number in 0..count {
            let at = PLACES + PLACE * u64::from(number) + DATA;
            let got = read_guest(&self.ram, at, LEN as usize);
            let want = vec![want(number); LEN as usize];
            assert!(got == want, "{what}: data of {number}");
        }
    }

    fn bursts(&mut self, framing: Framing) {
        let keeps = !matches!(self.host, Host::Null(_));
        // One burst more than enough for every list to have its size.
        for (round, count) in [BURST_MAX, 1, 7, BURST_MAX].into_iter().enumerate() {
            let fill = u8::try_from(round).unwrap() * 50 + 1;
            let what = format!("{}: {framing:?}, round {round}", self.host.name());
            let mut called = self.burst(OUT, framing, count, fill);
            called += self.burst(FLUSH, framing, count, 0);
            called += self.burst(IN, framing, count, 0);
            if keeps {
                self.has(count, |number| fill + number, &what);
            }
            called += self.burst(GET_ID, framing, count, 0);
            assert_eq!(&read_guest(&self.ram, PLACES + DATA, 6), b"serial");
            called += self.burst(DISCARD, framing, count, 0);
            called += self.burst(WRITE_ZEROES, framing, count, 0);
            called += self.burst(IN, framing, count, 9);
            if keeps {
                self.has(count, |_| 0, &what);
            }
            if round > 0 {
                assert_eq!(called, 0, "{what}");
            }
        }
    }
}

fn all<D: Driver>() {
    let store = Arc::new(Store::new(DISK).unwrap());
    let hosts = [
        Host::Null(NullDisk::new(SIZE.into())),
        Host::Ram(RamDisk::new(store, SIZE.into())),
        Host::file("/var/tmp"),
        Host::file("/dev/shm"),
    ];
    for host in hosts {
        let mut guest = Guest::<D>::new(host);
        for framing in [Framing::Usual, Framing::Indirect, Framing::Odd] {
            guest.bursts(framing);
        }
    }
}

#[test]
fn a_request_of_a_disk_allocates_nothing_after_the_first_burst() {
    all::<SplitDriver>();
    all::<PackedDriver>();
}
