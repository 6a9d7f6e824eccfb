//! A qcow2 image that somebody made, and what its guest does with it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::host::blk::{BlkIo, BlkOp, Token};
use crate::host::qcow2::{Qcow2Disk, Qcow2Image};
use crate::memory::{Store, copy, memfd};
use crate::sys::disk::{DiskOptions, IoOptions};
use crate::sys::uring::Uring;

use super::Bytes;

/// Operations of one input at most.
const OPS_MAX: usize = 24;
/// Bytes of one operation at most, and of the memory that they share.
const BYTES_MAX: u64 = 64 << 10;
/// Ranges that are zeroed or discarded may be longer.
const RANGE_MAX: u64 = 1 << 20;
/// An operation that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an input led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qcow2Outcome {
    /// The image was refused.
    Refused,
    /// So many operations ended well, and so many not.
    Served {
        /// Without an error.
        well: usize,
        /// With one.
        failed: usize,
    },
}

/// Opens an image and works on it: `data` has a byte with the number of operations, four bytes with
/// how many KiB the file has at least (what is behind the image is a hole), ten bytes for each
/// operation, and the image.
///
/// # Panics
/// When something does not hold.
pub fn qcow2(data: &[u8]) -> Qcow2Outcome {
    let mut data = Bytes(data);
    let ops = usize::from(data.u8()) % (OPS_MAX + 1);
    let kibibytes = data.u32();
    let ops: Vec<Op> = (0..ops).map(|_| Op::from(&mut data)).collect();
    let file = memfd(data.0.len() as u64).expect("a file in memory");
    file.write_all_at(data.0, 0).expect("room in memory");
    if u64::from(kibibytes) << 10 > data.0.len() as u64 {
        file.set_len(u64::from(kibibytes) << 10).expect("a hole");
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let options = DiskOptions {
        read_only: false,
        direct: Some(false),
        block_size: 512,
        lock: false,
    };
    let begun = Instant::now();
    let opened = Qcow2Image::open("fuzz", (&path, None), options, IoOptions::default());
    assert!(begun.elapsed() < PATIENCE, "opening it takes for ever");
    let Ok(image) = opened else {
        return Qcow2Outcome::Refused;
    };
    needs_nothing_else(data.0);
    let outcome = Work::new(image, file).run(&ops);
    assert!(begun.elapsed() < PATIENCE, "closing it takes for ever");
    outcome
}

/// An image that names other files is not served, unless somebody allowed that.
fn needs_nothing_else(image: &[u8]) {
    let mut start = [0; 104];
    let bytes = image.len().min(start.len());
    start[..bytes].copy_from_slice(&image[..bytes]);
    let word = |at: usize| u64::from_be_bytes(start[at..at + 8].try_into().unwrap_or_default());
    assert_eq!(word(8), 0, "a backing file that nobody allowed");
    let version = word(4) >> 32;
    assert!(version < 3 || word(72) & 4 == 0, "its data are elsewhere");
}

/// Something that a guest asks for.
#[derive(Debug, Clone, Copy)]
struct Op {
    kind: u8,
    /// Mostly a place that there is.
    place: u64,
    bytes: u32,
}

impl Op {
    fn from(data: &mut Bytes<'_>) -> Op {
        let kind = data.u8();
        let scale = data.u8() % 56;
        Op {
            kind,
            place: u64::from(data.u32()) << scale,
            bytes: data.u32(),
        }
    }
}

/// An open image with one queue.
struct Work {
    image: Arc<Qcow2Image>,
    disk: Qcow2Disk,
    ring: Uring,
    store: Store,
    file: File,
}

impl Work {
    fn new(image: Qcow2Image, file: File) -> Work {
        let image = Arc::new(image);
        let mut ring = Uring::new().expect("an io_uring");
        let mut disk = image.queue(4);
        disk.attach(&mut ring, 4).expect("room in the io_uring");
        Work {
            image,
            disk,
            ring,
            store: Store::new(BYTES_MAX).expect("memory"),
            file,
        }
    }

    fn run(mut self, ops: &[Op]) -> Qcow2Outcome {
        let (mut well, mut failed) = (0, 0);
        for (number, op) in ops.iter().enumerate() {
            match self.one(*op, number as u8) {
                Ok(_) => well += 1,
                Err(errno) => {
                    assert!(errno > 0, "{op:?}: {errno} is no error number");
                    failed += 1;
                }
            }
        }
        self.disk.detach(&mut self.ring);
        drop(self.disk);
        drop(self.image);
        // What the image says may be anywhere, but nothing is allocated for that.
        let used = self.file.metadata().expect("its metadata");
        let used = std::os::unix::fs::MetadataExt::blocks(&used) * 512;
        assert!(used < 1 << 30, "the file takes {used} bytes");
        Qcow2Outcome::Served { well, failed }
    }

    /// Runs one operation, cut as the device cuts it: whole sectors within the disk.
    fn one(&mut self, op: Op, fill: u8) -> Result<u32, i32> {
        let sectors = self.image.bytes() / 512;
        let offset = op.place % sectors * 512;
        let most = (sectors * 512 - offset).min(match op.kind % 8 {
            0..=4 => BYTES_MAX,
            _ => RANGE_MAX,
        });
        let bytes = (u64::from(op.bytes) % most / 512 + 1) * 512;
        let segments = [self.store.segment(0, bytes.min(BYTES_MAX) as usize)];
        let bytes = bytes as u32;
        let operation = match op.kind % 8 {
            0 | 1 => BlkOp::Read {
                offset,
                segments: &segments,
            },
            2..=4 => {
                copy::write(&segments, 0, &vec![fill; segments[0].len()]);
                BlkOp::Write {
                    offset,
                    segments: &segments,
                    durable: op.kind % 8 == 4,
                }
            }
            5 => BlkOp::Discard { offset, bytes },
            6 => BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap: op.kind & 8 != 0,
            },
            _ => BlkOp::Flush,
        };
        self.submit(operation)
    }

    fn submit(&mut self, op: BlkOp<'_>) -> Result<u32, i32> {
        let token = Token {
            slot: 1,
            generation: 1,
        };
        let submitted = self.disk.lend(&mut self.ring).submit(token, op);
        submitted.expect("nothing else is in flight");
        let begun = Instant::now();
        loop {
            if let Some(done) = self.disk.lend(&mut self.ring).reap() {
                assert_eq!(done.token, token);
                return done.result;
            }
            assert!(begun.elapsed() < PATIENCE, "{op:?} has no answer");
            self.ring.enter();
            std::thread::yield_now();
        }
    }
}

/// Bytes of a cluster of the seeds, as a power of two: the least there is.
const BITS: u32 = 9;
const CLUSTER: usize = 1 << BITS;
/// Clusters of a seed: header, refcount table, a block of it, L1 table, L2 table, data.
const CLUSTERS: usize = 10;
const COPIED: u64 = 1 << 63;

/// An image of 64 KiB with one of its two L2 tables.
struct Seed(Vec<u8>);

impl Seed {
    fn new() -> Seed {
        let mut seed = Seed(vec![0; CLUSTERS * CLUSTER]);
        seed.0[..4].copy_from_slice(b"QFI\xfb");
        // Version, cluster size, disk size, L1 entries, where L1 and refcount table are.
        seed.put4(4, 3).put4(20, BITS).put8(24, 64 << 10);
        seed.put4(36, 2).put8(40, 0x600).put8(48, 0x200).put4(56, 1);
        // Refcounts of 16 bits, bytes of this header.
        seed.put4(96, 4).put4(100, 104);
        seed.put8(0x200, 0x400).put8(0x600, COPIED | 0x800);
        for cluster in 0..7 {
            seed.0[0x401 + 2 * cluster] = 1;
        }
        // Data, zeros, zeros that keep their cluster, nothing.
        seed.put8(0x800, COPIED | 0xa00).put8(0x808, 1);
        seed.put8(0x810, COPIED | 0xc01);
        seed.0[0xa00..0xc00].fill(0x5a);
        seed
    }

    fn put4(&mut self, at: usize, word: u32) -> &mut Seed {
        self.0[at..at + 4].copy_from_slice(&word.to_be_bytes());
        self
    }

    fn put8(&mut self, at: usize, word: u64) -> &mut Seed {
        self.0[at..at + 8].copy_from_slice(&word.to_be_bytes());
        self
    }

    /// A cluster as deflate keeps what it can't make shorter.
    fn compressed() -> Seed {
        let mut seed = Seed::new();
        seed.0[0xa00..0xa05].copy_from_slice(&[1, 0, 2, 0xff, 0xfd]);
        seed.0[0xa05..0xc05].fill(0x77);
        seed.put8(0x800, 1 << 62 | 1 << 61 | 0xa00).put8(0x810, 0);
        seed
    }

    fn backing() -> Seed {
        let mut seed = Seed::new();
        seed.put4(104, 0xe279_2aca).put4(108, 3);
        seed.0[112..115].copy_from_slice(b"raw");
        seed.0[128..139].copy_from_slice(b"/etc/passwd");
        seed.put8(8, 128).put4(16, 11);
        seed
    }

    /// All that is said of clusters is wrong: tables are data, what is in use is free.
    fn tangled() -> Seed {
        let mut seed = Seed::new();
        for (entry, at) in [0x800, 0x600, 0x400, 0x200, 0xa00, 0xa00]
            .iter()
            .enumerate()
        {
            seed.put8(0x800 + 8 * entry, COPIED | at);
        }
        seed.put8(0x608, COPIED | 0x800)
            .put8(0x830, COPIED | 1 << 50);
        seed.0[0x400..0x600].fill(0);
        seed
    }

    /// As large as a header can say, with nothing in it.
    fn huge() -> Seed {
        let mut seed = Seed(Seed::new().0[..CLUSTER].to_vec());
        seed.0.resize(3 << 12, 0);
        seed.put4(20, 12).put8(24, 1 << 43).put4(36, 1 << 22);
        seed.put8(40, 3 << 12).put8(48, 1 << 12);
        seed.put8(1 << 12, 2 << 12).put8(2 << 12, u64::MAX);
        seed
    }

    /// Nobody counts its header.
    fn uncounted() -> Seed {
        let mut seed = Seed::new();
        seed.put8(0x200, 0);
        seed
    }
}

/// Images to begin with, by name, each with the same work on it.
pub fn qcow2_seeds() -> Vec<(String, Vec<u8>)> {
    let mut old = Seed::new();
    old.put4(4, 2).put8(0x808, 0).put8(0x810, 0);
    let mut elsewhere = Seed::new();
    elsewhere.put8(72, 4);
    let mut again = Seed::new();
    again.put8(0x208, 0x400);
    let mut shared = Seed::new();
    shared.put8(0x800, 0xa00).put8(0x600, 0x800);
    let seeds = [
        ("whole", Seed::new(), 0),
        ("old", old, 0),
        ("compressed", Seed::compressed(), 0),
        ("shared", shared, 0),
        ("tangled", Seed::tangled(), 64),
        ("huge", Seed::huge(), 64 << 10),
        ("refused-backing", Seed::backing(), 0),
        ("refused-elsewhere", elsewhere, 0),
        ("refused-again", again, 0),
        ("refused-uncounted", Seed::uncounted(), 0),
    ];
    let kinds = [0, 2, 0, 5, 14, 3, 7, 6, 4, 2, 2, 1, 7];
    let work = kinds.iter().enumerate().flat_map(|(number, kind)| {
        let place = [0, 1, 2, 60, 70, 3, 0][number % 7];
        let mut op = vec![*kind, 0, place, 0, 0, 0];
        op.extend((1500 * number as u32).to_le_bytes());
        op
    });
    let work: Vec<u8> = work.collect();
    let seed = |(name, seed, kibibytes): (&str, Seed, u32)| {
        let mut data = vec![kinds.len() as u8];
        data.extend(kibibytes.to_le_bytes());
        data.extend(&work);
        data.extend(seed.0);
        (name.to_owned(), data)
    };
    seeds.into_iter().map(seed).collect()
}
