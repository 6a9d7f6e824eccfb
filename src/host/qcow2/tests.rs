//! Tests of an image's thread with a queue, without virtqueues.

use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::memory::{Store, copy};

const OPTIONS: DiskOptions = DiskOptions {
    read_only: false,
    direct: None,
    block_size: 512,
    lock: true,
};

struct Bench {
    _dir: TempDir,
    image: Arc<Qcow2Image>,
    ring: Uring,
    wakes: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Bench {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("disk.img");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).arg(&path);
        assert!(command.arg("8M").status().unwrap().success());
        let image = Qcow2Image::open("disk0", (&path, None), OPTIONS, IoOptions::default());
        Bench {
            _dir: dir,
            image: Arc::new(image.unwrap()),
            ring: Uring::new().unwrap(),
            wakes: Arc::default(),
        }
    }

    fn queue(&mut self) -> Qcow2Disk {
        let wakes = Arc::clone(&self.wakes);
        let waker = Waker(Arc::new(move || {
            wakes.fetch_add(1, Ordering::Relaxed);
        }));
        let mut disk = self.image.queue(8);
        disk.wakes(waker);
        disk.attach(&mut self.ring, 8).unwrap();
        disk
    }

    /// Runs one operation; what it came to, and whether the worker did it alone.
    fn run(&mut self, disk: &mut Qcow2Disk, op: BlkOp<'_>) -> (Result<u32, i32>, bool) {
        let token = Token {
            slot: 3,
            generation: 9,
        };
        let mut lent = disk.lend(&mut self.ring);
        lent.submit(token, op).unwrap();
        let alone = lent.rest.in_flight == 0;
        let begun = Instant::now();
        loop {
            if let Some(done) = disk.lend(&mut self.ring).reap() {
                assert_eq!(done.token, token);
                return (done.result, alone);
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "no answer");
            self.ring.enter();
        }
    }
}

fn ops<'a>(segments: &'a [Segment]) -> [BlkOp<'a>; 2] {
    let offset = 1 << 20;
    let write = BlkOp::Write {
        offset,
        segments,
        durable: false,
    };
    [write, BlkOp::Read { offset, segments }]
}

#[test]
fn workers_use_clusters_until_these_go() {
    let mut bench = Bench::new();
    let mut disk = bench.queue();
    let store = Store::new(4096).unwrap();
    let segments = [store.segment(0, 4096)];
    let [write, read] = ops(&segments);
    assert_eq!(bench.run(&mut disk, read), (Ok(4096), false));
    assert_eq!(bench.run(&mut disk, write), (Ok(4096), false));
    // The thread tells the place after it has answered.
    let begun = Instant::now();
    while !bench.image.shared.map.knows(16) {
        assert!(begun.elapsed() < Duration::from_secs(20), "no place");
        std::thread::yield_now();
    }
    assert_eq!(bench.run(&mut disk, write), (Ok(4096), true));
    assert_eq!(bench.run(&mut disk, read), (Ok(4096), true));
    let zero = BlkOp::WriteZeroes {
        offset: 1 << 20,
        bytes: 65536,
        unmap: true,
    };
    assert_eq!(bench.run(&mut disk, zero), (Ok(65536), false));
    assert_eq!(bench.run(&mut disk, read), (Ok(4096), false));
    let durable = BlkOp::Write {
        offset: 0,
        segments: &segments,
        durable: true,
    };
    assert_eq!(bench.run(&mut disk, durable), (Ok(4096), false));
    assert!(bench.wakes.load(Ordering::Relaxed) > 0);
    disk.detach(&mut bench.ring);
}

#[test]
fn a_cluster_in_use_does_not_go_and_reads_as_zeros() {
    let mut bench = Bench::new();
    let (mut disk, idle) = (bench.queue(), bench.queue());
    let store = Store::new(4096).unwrap();
    copy::write(&[store.segment(0, 4096)], 0, &[7; 4096]);
    let segments = [store.segment(0, 4096)];
    let [write, read] = ops(&segments);
    assert_eq!(bench.run(&mut disk, write).0, Ok(4096));
    // A queue that nobody serves any more has begun something.
    idle.rest.users.enter(0);
    let zero = BlkOp::WriteZeroes {
        offset: 1 << 20,
        bytes: 65536,
        unmap: true,
    };
    for _ in 0..2 {
        assert_eq!(bench.run(&mut disk, zero).0, Ok(65536));
        assert_eq!(bench.run(&mut disk, read).0, Ok(4096));
        let mut back = [1; 4096];
        copy::read(&segments, 0, &mut back);
        assert_eq!(back, [0; 4096]);
        copy::write(&segments, 0, &[7; 4096]);
        assert_eq!(bench.run(&mut disk, write).0, Ok(4096));
    }
    idle.rest.users.leave(0);
    disk.detach(&mut bench.ring);
}

/// A worker that writes to a cluster by itself is answered with nobody to ask the tables: they must
/// be in the file by then, even if that had failed, and a read was all that came since.
#[test]
fn workers_do_not_use_clusters_that_the_file_does_not_know_of() {
    let mut bench = Bench::new();
    let mut disk = bench.queue();
    let store = Store::new(4096).unwrap();
    let segments = [store.segment(0, 4096)];
    let [write, read] = ops(&segments);
    let stuck = |bench: &Bench, stuck| bench.image.shared.is_stuck.store(stuck, Ordering::Relaxed);
    stuck(&bench, true);
    assert_eq!(bench.run(&mut disk, write), (Err(5), false));
    // Places are told after the answer, so the second answer comes after them.
    for _ in 0..2 {
        assert_eq!(bench.run(&mut disk, read), (Ok(4096), false));
    }
    assert!(!bench.image.shared.map.knows(16));
    assert_eq!(bench.run(&mut disk, write), (Err(5), false));
    stuck(&bench, false);
    for _ in 0..2 {
        assert_eq!(bench.run(&mut disk, read).0, Ok(4096));
    }
    assert!(bench.image.shared.map.knows(16));
    assert_eq!(bench.run(&mut disk, write), (Ok(4096), true));
    disk.detach(&mut bench.ring);
}
