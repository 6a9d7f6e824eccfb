//! Requests of many megabytes: they must not keep the worker's other queues waiting.

use super::*;
use crate::host::blk::{Full, Token};
use crate::host::ram::RamDisk;
use crate::memory::Store;

const SPACE: usize = 64 << 20;
/// Where the data of all requests is; not at the start of a page.
const AT: u64 = (1 << 20) + 17;
/// A turn's bytes, and the piece that may go beyond.
const MOST: u64 = TURN_BYTES + (2 << 20);

/// A disk in memory, which does all on the worker, and what it was asked for in this turn.
struct Counted {
    disk: RamDisk,
    submitted: u64,
    done: u64,
}

impl BlkIo for Counted {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        self.submitted += match op {
            BlkOp::Read { segments, .. } | BlkOp::Write { segments, .. } => {
                segments.iter().map(|it| it.len() as u64).sum()
            }
            BlkOp::WriteZeroes { bytes, .. } | BlkOp::Discard { bytes, .. } => bytes.into(),
            BlkOp::Flush => 0,
        };
        self.disk.submit(token, op)
    }

    fn reap(&mut self) -> Option<Completion> {
        let done = self.disk.reap()?;
        self.done += u64::from(done.result.unwrap());
        Some(done)
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight()
    }
}

struct Large {
    ram: Arc<GuestRam>,
    driver: SplitDriver,
    vq: Virtqueue<Split>,
    handler: BlkHandler,
    disk: Counted,
    store: Arc<Store>,
    model: BlkModel,
}

impl Large {
    fn new() -> Large {
        let ram = GuestRam::for_test(&[(0, SPACE as u64)]);
        let memory = RingMemory::new::<Split>(&ram, 0, 64);
        let model = BlkModel::new(BlkSetup {
            name: "disk0".into(),
            capacity_bytes: SPACE as u64,
            block_size: 512,
            queues: 1,
            ranges: RangeLimits::RAM,
            ..BlkSetup::default()
        });
        let store = Arc::new(Store::new(SPACE as u64).unwrap());
        Large {
            vq: memory.device::<Split>(false),
            driver: SplitDriver::new(&memory, false),
            handler: BlkHandler::new(&model, 0, 64, FLUSH | RANGES).unwrap(),
            disk: Counted {
                disk: RamDisk::new(Arc::clone(&store), 64),
                submitted: 0,
                done: 0,
            },
            ram,
            store,
            model,
        }
    }

    /// Polls until so many requests are answered; no turn does more than it may.
    fn finish(&mut self, requests: usize) {
        let mut scratch = Segments::with_capacity(64);
        let (mut answered, mut longest) = (0, 0);
        while answered < requests {
            (self.disk.submitted, self.disk.done) = (0, 0);
            let (vq, disk) = (&mut self.vq, &mut self.disk);
            let work = self.handler.poll(vq, disk, &mut scratch, 64).unwrap();
            self.vq.publish();
            assert!(work > 0, "the worker would sleep");
            longest = longest.max(self.disk.submitted).max(self.disk.done);
            answered += core::iter::from_fn(|| self.driver.used()).count();
        }
        assert_eq!(read_guest(&self.ram, HEADER + 16, 1), [STATUS_OK]);
        assert!(longest <= MOST, "{longest} bytes in one turn");
        assert!(longest > TURN_BYTES / 2, "pieces are larger than that");
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.model.counters();
        counters.iter().find(|(it, _)| *it == name).unwrap().1
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}

#[test]
fn large_reads_and_writes_are_done_piece_by_piece() {
    let bytes = 40_000_000 / 512 * 512;
    for is_write in [false, true] {
        let mut rig = Large::new();
        let data = pattern(bytes);
        let stored = [rig.store.segment(0, bytes)];
        if is_write {
            write_guest(&rig.ram, AT, &data);
        } else {
            copy::write(&stored, 0, &data);
        }
        write_guest(&rig.ram, HEADER, &[0; 16]);
        write_guest(&rig.ram, HEADER, &[u8::from(is_write)]);
        // Cut where no piece ends.
        let data_bufs = [
            (AT, 12345),
            (AT + 12345, u32::try_from(bytes).unwrap() - 12345),
        ];
        let bufs = [
            Buf::readable(HEADER, 16),
            Buf {
                addr: data_bufs[0].0,
                len: data_bufs[0].1,
                write: !is_write,
            },
            Buf {
                addr: data_bufs[1].0,
                len: data_bufs[1].1,
                write: !is_write,
            },
            Buf::writable(HEADER + 16, 1),
        ];
        for _ in 0..3 {
            rig.driver.add(&bufs).unwrap();
        }
        rig.driver.publish();
        rig.finish(3);
        let mut got = vec![0; bytes];
        if is_write {
            copy::read(&stored, 0, &mut got);
        } else {
            got = read_guest(&rig.ram, AT, bytes);
        }
        assert!(got == data, "other bytes");
        assert_eq!(rig.counter("short_ios"), 0, "nobody was short");
        let moved = if is_write {
            "write_bytes"
        } else {
            "read_bytes"
        };
        assert_eq!(rig.counter(moved), 3 * bytes as u64);
    }
}

#[test]
fn large_ranges_are_zeroed_a_few_in_a_turn() {
    let mut rig = Large::new();
    let stored = [rig.store.segment(0, SPACE)];
    copy::write(&stored, 0, &pattern(SPACE));
    write_guest(&rig.ram, HEADER, &[0; 16]);
    write_guest(&rig.ram, HEADER, &[13]);
    let sectors = 8192u32;
    for range in 0..8u64 {
        let at = AT + range * 16;
        write_guest(&rig.ram, at, &(range * u64::from(sectors)).to_le_bytes());
        write_guest(&rig.ram, at + 8, &sectors.to_le_bytes());
        write_guest(&rig.ram, at + 12, &[0; 4]);
    }
    let bufs = [
        Buf::readable(HEADER, 16),
        Buf::readable(AT, 128),
        Buf::writable(HEADER + 16, 1),
    ];
    (0..4).for_each(|_| _ = rig.driver.add(&bufs).unwrap());
    rig.driver.publish();
    rig.finish(4);
    let mut got = vec![1; 32 << 20];
    copy::read(&stored, 0, &mut got);
    assert!(got.iter().all(|byte| *byte == 0));
    assert_eq!(rig.counter("zeroed_bytes"), 4 * (32 << 20));
}
