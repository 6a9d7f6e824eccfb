//! The disk beside a reference: the same requests, in the oddest framings, to our handler on either
//! ring, and to a reference over the split queue of the `virtio-queue` crate
//! (`support::reference`). Status, used length, guest memory and disk must be the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vringd::device::blk::{BlkHandler, BlkModel, BlkSetup};
use vringd::memory::{GuestRam, Segments};
use vringd::ring::{Split, Virtqueue};
use vringd::testing::disk::{Ending, TestDisk};
use vringd::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

use crate::support::cases::cases;
use crate::support::reference::{DISCARD, FLUSH, GET_ID, IN, OUT, ReferenceDisk, WRITE_ZEROES};

const SIZE: u16 = 128;
const DISK: usize = 64 << 10;
const SERIAL: &[u8; 20] = b"reference-serial\0\0\0\0";
/// Each request of a burst has a place of its own for what is read, what is written, its table.
const READABLE: u64 = 0x10_0000;
const WRITABLE: u64 = 0x14_0000;
const TABLES: u64 = 0x18_0000;
const PLACE: u64 = 0x8000;
const RAM: u64 = 0x1c_0000;
const BURST_MAX: usize = 8;

const FEATURES: u64 = 1 << 9 | 1 << 13 | 1 << 14;

/// A request: what the header says, bytes that follow it, bytes to be written, and the cuts.
#[derive(Debug, Clone)]
struct Request {
    kind: u32,
    sector: u64,
    readable: u32,
    writable: u32,
    cuts: [Vec<u32>; 2],
    indirect: bool,
    fill: u8,
    /// Sector, sectors and flags of what DISCARD and WRITE_ZEROES are about.
    ranges: Vec<(u64, u32, u32)>,
}

fn request() -> impl Strategy<Value = Request> {
    let kind = prop_oneof![
        8 => Just(IN),
        8 => Just(OUT),
        2 => Just(FLUSH),
        2 => Just(GET_ID),
        3 => prop::sample::select(&[DISCARD, WRITE_ZEROES][..]),
        1 => prop::sample::select(&[2u32, 10, 14, 77, u32::MAX][..]),
    ];
    let sectors = DISK as u64 / 512;
    let sector = prop_oneof![
        8 => 0..sectors,
        4 => (0..sectors / 8).prop_map(|block| block * 8),
        1 => sectors - 2..sectors + 2,
        1 => any::<u64>(),
    ];
    let data = || {
        prop_oneof![
            4 => Just(0u32),
            6 => (1u32..5).prop_map(|blocks| blocks * 512),
            3 => (1u32..4).prop_map(|blocks| blocks * 4096),
            2 => 0u32..2000,
        ]
    };
    let cuts = || prop::collection::vec(any::<u32>(), 0..6);
    let sizes = (data(), data(), any::<bool>());
    let looks = ([cuts(), cuts()], any::<bool>(), any::<u8>());
    let flags = prop_oneof![12 => Just(0u32), 4 => Just(1u32), 1 => any::<u32>()];
    let blocks = prop_oneof![12 => 0u32..16, 1 => any::<u32>()];
    let at = prop_oneof![16 => (0..sectors / 8).prop_map(|block| block * 8), 1 => any::<u64>()];
    let range = (at, blocks.prop_map(|blocks| blocks.wrapping_mul(8)), flags);
    let ranges = prop::collection::vec(range, 4);
    (kind, sector, sizes, looks, ranges).prop_map(
        |(kind, sector, (out, data_in, plain), (cuts, indirect, fill), ranges)| {
            // As drivers do it, or with data in the direction that the request has no use for.
            let out = match kind {
                // Mostly whole ranges, and sometimes more of them than there may be.
                DISCARD | WRITE_ZEROES if plain => 16 * (1 + out % 40),
                OUT => out,
                _ if plain => 0,
                _ => out,
            };
            let data_in = match kind {
                GET_ID if plain => 20,
                _ if plain && kind != IN => 0,
                _ => data_in,
            };
            Request {
                kind,
                sector,
                readable: 16 + out,
                writable: data_in + 1,
                cuts,
                indirect,
                fill,
                ranges,
            }
        },
    )
}

/// Cuts `total` bytes at `gpa` into buffers; some of them are empty.
fn cut_up(gpa: u64, total: u32, cuts: &[u32], write: bool) -> Vec<Buf> {
    let mut points: Vec<u32> = cuts.iter().map(|cut| cut % (total + 1)).collect();
    points.extend([0, total]);
    points.sort_unstable();
    let buf = |ends: &[u32]| Buf {
        addr: gpa + u64::from(ends[0]),
        len: ends[1] - ends[0],
        write,
    };
    points.windows(2).map(buf).collect()
}

/// Posts `request` in place `number`, the memory around it filled with what tells changes.
fn post<D: Driver>(ram: &GuestRam, driver: &mut D, number: u64, request: &Request) -> u16 {
    let place = number * PLACE;
    let bytes = usize::try_from(PLACE).unwrap();
    let data = (0..bytes).map(|at| u8::try_from(at % 241).unwrap() ^ request.fill);
    write_guest(ram, READABLE + place, &data.collect::<Vec<_>>());
    write_guest(ram, WRITABLE + place, &vec![0xee; bytes]);
    write_guest(ram, READABLE + place, &request.kind.to_le_bytes());
    write_guest(ram, READABLE + place + 8, &request.sector.to_le_bytes());
    if matches!(request.kind, DISCARD | WRITE_ZEROES) {
        let data = READABLE + place + 16;
        for (at, (sector, sectors, flags)) in (0..50).zip(request.ranges.iter().cycle()) {
            write_guest(ram, data + 16 * at, &sector.to_le_bytes());
            write_guest(ram, data + 16 * at + 8, &sectors.to_le_bytes());
            write_guest(ram, data + 16 * at + 12, &flags.to_le_bytes());
        }
    }
    let [readable, writable] = &request.cuts;
    let mut bufs = cut_up(READABLE + place, request.readable, readable, false);
    bufs.extend(cut_up(WRITABLE + place, request.writable, writable, true));
    let id = if request.indirect {
        driver.add_indirect(&bufs, TABLES + number * 0x200)
    } else {
        driver.add(&bufs)
    };
    id.expect("a burst fits the ring")
}

fn fresh_disk() -> Vec<u8> {
    (0..DISK)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}

/// A disk's queue, driven and served.
trait Side {
    fn ram(&self) -> &GuestRam;
    /// Used length of each request of the burst, by its number.
    fn burst(&mut self, requests: &[Request]) -> Vec<u32>;
    fn disk(&self) -> &[u8];
}

struct Ours<D: Driver> {
    ram: Arc<GuestRam>,
    driver: D,
    vq: Virtqueue<D::Format>,
    handler: BlkHandler,
    disk: TestDisk,
    scratch: Segments,
    /// How the first operation of each burst ends; only for bursts of one, whose order is fixed.
    endings: Vec<Ending>,
}

impl<D: Driver> Ours<D> {
    fn new(setup: &BlkSetup, endings: Vec<Ending>) -> Ours<D> {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let ring = RingMemory::new::<D::Format>(&ram, 0, SIZE);
        let mut disk = TestDisk::new(DISK);
        disk.bytes = fresh_disk();
        Ours {
            driver: D::new(&ring, true),
            vq: ring.device::<D::Format>(true),
            handler: BlkHandler::new(&BlkModel::new(setup.clone()), 0, SIZE, FEATURES).unwrap(),
            disk,
            scratch: Segments::with_capacity(4096),
            endings,
            ram,
        }
    }
}

/// Waits for as many used elements as there are ids.
fn collect(ids: &[u16], mut used: impl FnMut() -> Option<(u16, u32)>) -> Vec<u32> {
    let mut lens = BTreeMap::new();
    while lens.len() < ids.len() {
        let (id, len) = used().expect("every request comes back");
        assert_eq!(lens.insert(id, len), None, "and comes back once");
    }
    assert_eq!(used(), None);
    ids.iter().map(|id| lens[id]).collect()
}

impl<D: Driver> Side for Ours<D> {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn disk(&self) -> &[u8] {
        &self.disk.bytes
    }

    fn burst(&mut self, requests: &[Request]) -> Vec<u32> {
        let post = |(number, request)| post(&self.ram, &mut self.driver, number, request);
        let ids: Vec<_> = (0..).zip(requests).map(post).collect();
        self.driver.publish();
        self.disk.endings.clear();
        if requests.len() == 1 {
            self.disk.endings.extend(self.endings.iter().copied());
        }
        let mut turns = 0;
        loop {
            let Ours {
                handler,
                vq,
                disk,
                scratch,
                ..
            } = self;
            handler.poll(vq, disk, scratch, 64).unwrap();
            vq.publish();
            turns += 1;
            if turns > 1 && handler.in_flight() == 0 {
                break;
            }
            assert!(turns < 100, "a request never ends");
            disk.release();
        }
        collect(&ids, || self.driver.used())
    }
}

/// The reference: memory is that of a driver's ring, mapped once more.
struct Reference {
    ram: Arc<GuestRam>,
    driver: SplitDriver,
    memory: GuestMemoryMmap,
    queue: Queue,
    disk: ReferenceDisk,
}

impl Reference {
    fn new(setup: &BlkSetup) -> Reference {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let ring = RingMemory::new::<Split>(&ram, 0, SIZE);
        let file = ram.specs()[0].file.try_clone().unwrap();
        let range = (
            GuestAddress(0),
            usize::try_from(RAM).unwrap(),
            Some(FileOffset::new(file, 0)),
        );
        let mut queue = Queue::new(SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(ring.at[0]))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(ring.at[1]))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(ring.at[2]))
            .unwrap();
        queue.set_ready(true);
        Reference {
            driver: SplitDriver::new(&ring, false),
            memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
            queue,
            disk: ReferenceDisk {
                bytes: fresh_disk(),
                block: u64::from(setup.block_size),
                read_only: setup.read_only,
                discard_zeroes: false,
                serial: *SERIAL,
                ranges_max: 32,
            },
            ram,
        }
    }
}

impl Side for Reference {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn disk(&self) -> &[u8] {
        &self.disk.bytes
    }

    fn burst(&mut self, requests: &[Request]) -> Vec<u32> {
        let post = |(number, request)| post(&self.ram, &mut self.driver, number, request);
        let ids: Vec<_> = (0..).zip(requests).map(post).collect();
        self.driver.publish();
        let memory = self.memory.clone();
        while let Some(chain) = self.queue.pop_descriptor_chain(&memory) {
            let head = chain.head_index();
            let len = self.disk.answer(&memory, chain);
            self.queue.add_used(&memory, head, len).unwrap();
        }
        collect(&ids, || self.driver.used())
    }
}

fn compare(setup: &BlkSetup, ours: &mut impl Side, bursts: &[Vec<Request>]) {
    let mut reference = Reference::new(setup);
    for requests in bursts {
        let lens = ours.burst(requests);
        assert_eq!(lens, reference.burst(requests), "used lengths");
        let places = usize::try_from(TABLES - READABLE).unwrap();
        let memory = |side: &dyn Side| read_guest(side.ram(), READABLE, places);
        assert!(memory(ours) == memory(&reference), "guest memory");
        assert!(ours.disk() == reference.disk(), "the disk");
    }
}

fn bursts() -> impl Strategy<Value = Vec<Vec<Request>>> {
    let one = prop::collection::vec(request(), 1);
    let several = prop::collection::vec(request(), 1..=BURST_MAX);
    let bursts = prop::collection::vec(prop_oneof![one, several], 1..8);
    bursts.prop_map(|bursts| bursts.into_iter().flat_map(in_order).collect())
}

/// Cuts a burst into bursts whose requests a disk may do in any order with one result, or does in
/// the order in which they come: one of several ranges takes several turns, and is alone.
fn in_order(burst: Vec<Request>) -> Vec<Vec<Request>> {
    let turns = |request: &Request| match request.kind {
        DISCARD | WRITE_ZEROES => request.readable / 16,
        _ => 1,
    };
    let alone = |a: &Request, b: &Request| turns(a).max(turns(b)) <= 2;
    burst.chunk_by(alone).map(<[_]>::to_vec).collect()
}

fn setup() -> impl Strategy<Value = BlkSetup> {
    let block_size = prop_oneof![3 => Just(512), 1 => Just(4096)];
    let read_only = prop::bool::weighted(0.2);
    (block_size, read_only).prop_map(|(block_size, read_only)| BlkSetup {
        rings: vringd::device::RingOptions::default(),
        name: "disk0".into(),
        capacity_bytes: DISK as u64,
        block_size,
        queues: 1,
        read_only,
        serial: "reference-serial".into(),
        ..BlkSetup::default()
    })
}

fn endings() -> impl Strategy<Value = Vec<Ending>> {
    let short = (1u32..3000).prop_map(Ending::Short);
    prop::collection::vec(prop_oneof![short, Just(Ending::Whole)], 0..4)
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn the_disk_on_a_split_ring_does_what_the_reference_does(
        setup in setup(), endings in endings(), bursts in bursts()
    ) {
        compare(&setup, &mut Ours::<SplitDriver>::new(&setup, endings), &bursts);
    }

    #[test]
    fn the_disk_on_a_packed_ring_does_what_the_reference_does(
        setup in setup(), endings in endings(), bursts in bursts()
    ) {
        compare(&setup, &mut Ours::<PackedDriver>::new(&setup, endings), &bursts);
    }
}
