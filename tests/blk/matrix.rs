//! Every request of a disk in every shape, over the real daemon: type × framing × ring format ×
//! indirect × size × backing. What comes back and what is on the disk are compared byte for byte
//! with a model, the used length and the memory around each request too. VIRTIO 1.3 §5.2.6.

use std::path::Path;

use super::encrypted::key_file;
use super::front_end::{
    Answer, DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, Framing, FrontEnd, GET_ID, IN, OUT,
    WRITE_ZEROES, range,
};
use super::mounted::Mounted;
use super::qcow2;
use super::served::{DISK, SECTOR, Served, Way, assert_same, image, on_a_disk};
use crate::support::loop_device::Loop;
use crate::support::tmp::{TempDir, random_bytes};
use crate::support::xts::reference;
use vringd::sys::disk::{DiskFile, DiskOptions};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const SIZES: [usize; 6] = [512, 4096, 7 * 512, 65536, 66048, 1 << 20];
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const ALL: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
/// Data segments that drivers are told to stay below.
const SEG_MAX: u32 = 126;

/// Ranges of a request, and the bytes of each (VIRTIO 1.3 §5.2.6).
const RANGES: usize = 3;
const RANGE_BYTES: usize = 16;

/// The ways in which a request with `out` and `data_in` bytes of data is cut up.
fn framings(out: usize, data_in: usize, indirect: bool) -> Vec<Framing> {
    let (out, data_in) = (u32::try_from(out).unwrap(), u32::try_from(data_in).unwrap());
    let steps = |from: u32, bytes: u32, step: u32| -> Vec<u32> {
        let step = step.max(bytes / 100) as usize;
        (from..from + bytes).step_by(step).collect()
    };
    let even = |from: u32, bytes: u32| -> Vec<u32> {
        let cut = |segment| {
            from + u32::try_from(u64::from(bytes) * segment / u64::from(SEG_MAX)).unwrap()
        };
        (0..=SEG_MAX.into()).map(cut).collect()
    };
    let framing = |readable, writable| Framing {
        readable,
        writable,
        indirect,
    };
    vec![
        // Each part in a descriptor of its own.
        framing(vec![16], vec![data_in]),
        // Header and data together, data and status together.
        framing(vec![], vec![]),
        // The header in pieces, data cut at odd bytes.
        framing(vec![1, 9, 17, 16 + out / 3], vec![1, 511, data_in / 2 + 7]),
        // Many sectors, each a piece; the last one has the status byte.
        framing(steps(16, out, 512), steps(0, data_in, 512)),
        // Pieces that fit nothing.
        framing(steps(3, out + 13, 1021), steps(1, data_in, 1021)),
        // As many pieces as a driver may have, header and status apart.
        framing(even(16, out), even(0, data_in)),
    ]
}

/// Whether a sector may have this (the second) after a discard, which had the first before.
type Discarded = fn(&[u8], &[u8]) -> bool;

/// Files with holes and memory both read as zeros.
fn zeros(_: &[u8], found: &[u8]) -> bool {
    found.iter().all(|byte| *byte == 0)
}

/// An image gives back whole clusters only.
fn zeros_or_kept(before: &[u8], found: &[u8]) -> bool {
    found == before || zeros(before, found)
}

/// Zeros that were never encrypted, or what was there.
fn anything(_: &[u8], _: &[u8]) -> bool {
    true
}

/// A disk and what should be on it.
struct Checked<D: Driver> {
    front: FrontEnd<D>,
    model: Vec<u8>,
    seed: u64,
    discarded: Discarded,
}

impl<D: Driver> Checked<D> {
    fn next(&mut self) -> u64 {
        self.seed += 1;
        u64::from_le_bytes(random_bytes(self.seed, 8).try_into().unwrap())
    }

    /// A place for `bytes` bytes, aligned to `align`.
    fn place(&mut self, bytes: usize, align: usize) -> usize {
        let places = (DISK - bytes) / align + 1;
        usize::try_from(self.next() >> 8).unwrap() % places * align
    }

    /// What is on the disk around `at` is what the model says.
    fn check(&mut self, what: &str, at: usize, bytes: usize) {
        let from = at.saturating_sub(4096);
        let to = (at + bytes + 4096).min(DISK);
        let sector = (from / SECTOR) as u64;
        let answer = self.front.run(IN, sector, &[], to - from);
        assert_eq!(answer.status, OK, "{what}");
        assert_same(what, &answer.data, &self.model[from..to]);
    }

    fn read(&mut self, bytes: usize, framing: &Framing, align: usize) {
        let at = self.place(bytes, align);
        let sector = (at / SECTOR) as u64;
        let answer = self.front.run_framed(IN, sector, &[], bytes, framing);
        let what = format!("IN {bytes} {framing:?}");
        assert_eq!(
            (answer.status, answer.used as usize),
            (OK, bytes + 1),
            "{what}"
        );
        assert_same(&what, &answer.data, &self.model[at..at + bytes]);
    }

    fn write(&mut self, bytes: usize, framing: &Framing, align: usize) {
        let at = self.place(bytes, align);
        let data = random_bytes(self.next(), bytes);
        let sector = (at / SECTOR) as u64;
        let answer = self.front.run_framed(OUT, sector, &data, 0, framing);
        let what = format!("OUT {bytes} {framing:?}");
        assert_eq!((answer.status, answer.used), (OK, 1), "{what}");
        self.model[at..at + bytes].copy_from_slice(&data);
        self.check(&what, at, bytes);
    }

    /// `kind` is DISCARD or WRITE_ZEROES; the ranges together have `bytes` bytes.
    fn ranges(&mut self, [kind, flags]: [u32; 2], bytes: usize, framing: &Framing, align: usize) {
        let blocks = bytes / align;
        let parts: [usize; RANGES] = [blocks / 2, blocks / 3, blocks - blocks / 2 - blocks / 3];
        let mut payload = Vec::new();
        let mut places = Vec::new();
        for bytes in parts.map(|blocks| blocks * align) {
            let at = self.place(bytes, align);
            let sectors = u32::try_from(bytes / SECTOR).unwrap();
            payload.extend(range((at / SECTOR) as u64, sectors, flags));
            places.push((at, bytes));
        }
        let answer = self.front.run_framed(kind, 0, &payload, 0, framing);
        let what = format!("{kind} {bytes} flags {flags} {framing:?}");
        assert_eq!((answer.status, answer.used), (OK, 1), "{what}");
        for &(at, bytes) in &places {
            match kind {
                DISCARD => self.adopt(&what, at, bytes),
                _ => self.model[at..at + bytes].fill(0),
            }
        }
        for (at, bytes) in places {
            self.check(&what, at, bytes);
        }
    }

    /// What a discard has left there is what has to be there from now on.
    fn adopt(&mut self, what: &str, at: usize, bytes: usize) {
        let answer = self.front.run(IN, (at / SECTOR) as u64, &[], bytes);
        assert_eq!(answer.status, OK, "{what}");
        let model = &mut self.model[at..at + bytes];
        let sectors = model.chunks(SECTOR).zip(answer.data.chunks(SECTOR));
        for (sector, (before, found)) in sectors.enumerate() {
            let may = (self.discarded)(before, found);
            assert!(may, "{what}: sector {sector} behind {at} is {found:x?}");
        }
        model.copy_from_slice(&answer.data);
    }

    fn all(&mut self, indirect: bool, align: usize) {
        for bytes in SIZES.into_iter().filter(|size| size % align == 0) {
            for framing in framings(0, bytes, indirect) {
                self.read(bytes, &framing, align);
            }
            for framing in framings(bytes, 0, indirect) {
                self.write(bytes, &framing, align);
            }
            for kind in [[DISCARD, 0], [WRITE_ZEROES, 0], [WRITE_ZEROES, 1]] {
                for framing in framings(RANGES * RANGE_BYTES, 0, indirect) {
                    self.ranges(kind, bytes, &framing, align);
                }
            }
        }
        for framing in framings(0, 0, indirect) {
            let answer = self.front.run_framed(FLUSH, 0, &[], 0, &framing);
            assert_eq!((answer.status, answer.used), (OK, 1), "FLUSH {framing:?}");
        }
        for framing in framings(0, 20, indirect) {
            let answer = self.front.run_framed(GET_ID, 0, &[], 20, &framing);
            let want = Answer {
                status: OK,
                used: 21,
                data: b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            };
            assert_eq!(answer, want, "GET_ID {framing:?}");
        }
    }

    fn whole(&mut self) {
        for at in (0..DISK).step_by(1 << 20) {
            self.check("the whole disk", at, (1 << 20).min(DISK - at));
        }
    }
}

/// The matrix on one ring format; a disk of blocks of `align` bytes.
pub fn run<D: Driver>(served: &Served, model: Vec<u8>, align: usize) -> Vec<u8> {
    run_on::<D>(served, model, align, zeros)
}

fn run_on<D: Driver>(
    served: &Served,
    model: Vec<u8>,
    align: usize,
    discarded: Discarded,
) -> Vec<u8> {
    let mut front = served.open::<D>(ALL);
    assert!([F_FLUSH, F_DISCARD, F_WRITE_ZEROES].map(|f| front.has(f)) == [true; 3]);
    assert_eq!(front.config()[12..16], SEG_MAX.to_le_bytes());
    let mut disk = Checked {
        front,
        model,
        seed: 77,
        discarded,
    };
    for indirect in [false, true] {
        disk.all(indirect, align);
    }
    disk.whole();
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    assert_eq!(served.daemon.counter("disk0", "ring_faults"), 0);
    disk.model
}

/// The matrix on both ring formats, for a disk that is got at in this way; the daemon has ended
/// after it.
fn on(
    path: &Path,
    keys: &str,
    way: Way,
    model: Vec<u8>,
    align: usize,
    discarded: Discarded,
) -> Vec<u8> {
    let keys = format!("path={}{keys}", path.display());
    let served = Served::start(TempDir::new("matrix"), &keys);
    assert_eq!(served.way(path), way, "{keys}");
    let model = run_on::<SplitDriver>(&served, model, align, discarded);
    let model = run_on::<PackedDriver>(&served, model, align, discarded);
    let (status, log) = served.daemon.stop();
    assert!(status.success(), "{log}");
    model
}

fn on_a_file(keys: &str, way: Way, align: usize) {
    if let Some(dir) = on_a_disk("matrix") {
        on_a_file_in(&dir, keys, way, align);
    }
}

fn on_a_file_in(dir: &TempDir, keys: &str, way: Way, align: usize) {
    let (path, model) = image(dir);
    let model = on(&path, keys, way, model, align, zeros);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn on_a_file_with_direct_io() {
    on_a_file("", Way::Direct, 512);
}

fn bounces_only_what_it_must<D: Driver>() {
    let Some(dir) = on_a_disk("bounced") else {
        return;
    };
    let (path, _) = image(&dir);
    let options = DiskOptions {
        read_only: false,
        direct: None,
        block_size: 512,
        lock: false,
    };
    let disk = DiskFile::open(&path, options).unwrap();
    // Behind a header in the same buffer.
    let behind = u64::from(16 % disk.mem_align() != 0);
    let sector = u64::from(512 % disk.mem_align() != 0 || 512 % disk.offset_align() != 0);
    drop(disk);
    let served = Served::start(dir, &format!("path={}", path.display()));
    assert_eq!(served.way(&path), Way::Direct);
    let mut front = served.open::<D>(ALL);
    let pieces = |bytes: u32, step: usize| (0..bytes).step_by(step).collect::<Vec<u32>>();
    let framing = |readable, writable, indirect| Framing {
        readable,
        writable,
        indirect,
    };
    let sectors = |indirect| framing(vec![16], pieces(8192, 512), indirect);
    let cut_anywhere = |indirect| framing(vec![16, 16 + 1021], pieces(8192, 1021), indirect);
    let mut want = 0;
    for indirect in [false, true] {
        for (kind, framing, more) in [
            (IN, Framing::usual(8192), 0),
            (IN, sectors(indirect), sector),
            (IN, cut_anywhere(indirect), 1),
            (OUT, Framing::usual(0), behind),
            (OUT, cut_anywhere(indirect), 1),
            (FLUSH, framing(vec![5], vec![], indirect), 0),
            (GET_ID, framing(vec![5], vec![3], indirect), 0),
        ] {
            let (out, data_in) = match kind {
                IN => (vec![], 8192),
                OUT => (random_bytes(want, 8192), 0),
                GET_ID => (vec![], 20),
                _ => (vec![], 0),
            };
            let answer = front.run_framed(kind, 0, &out, data_in, &framing);
            assert_eq!(answer.status, OK, "{kind} {framing:?}");
            want += more;
            let got = served.daemon.counter("disk0", "unaligned");
            assert_eq!(got, want, "{kind} {framing:?}");
        }
    }
}

#[test]
fn buffers_are_bounced_only_where_direct_io_can_not_have_them() {
    bounces_only_what_it_must::<SplitDriver>();
    bounces_only_what_it_must::<PackedDriver>();
}

#[test]
fn on_a_file_in_the_page_cache() {
    on_a_file(",direct=false", Way::Cached, 512);
}

#[test]
fn on_a_file_in_blocks_of_4096() {
    on_a_file(",block_size=4096", Way::Direct, 4096);
}

/// One that is mapped.
#[test]
fn on_a_file_in_memory() {
    let Some(tmpfs) = Mounted::new("tmpfs", "size=32M") else {
        return;
    };
    on_a_file_in(tmpfs.dir(), "", Way::Mapped, 512);
    on_an_encrypted_disk_in(tmpfs.dir(), Way::Mapped, 512);
}

#[test]
fn with_a_thread_of_the_kernel() {
    on_a_file(",sqpoll=true", Way::Direct, 512);
}

#[test]
fn with_registered_memory() {
    on_a_file(",fixed_buffers=true", Way::Direct, 512);
}

#[test]
fn with_a_device_that_is_polled_if_it_can_be() {
    on_a_file(",iopoll=true", Way::Direct, 512);
}

#[test]
fn in_an_image() {
    let Some(dir) = on_a_disk("matrix") else {
        return;
    };
    let image = qcow2::create(&dir, "disk.qcow2", "cluster_size=4k");
    let (keys, empty) = (",format=qcow2", vec![0; DISK]);
    let model = on(&image, keys, Way::Direct, empty, 512, zeros_or_kept);
    assert_same("as QEMU has it", &qcow2::content(&image), &model);
}

fn on_an_encrypted_disk_in(dir: &TempDir, way: Way, sector: usize) {
    let (path, ciphertext) = image(dir);
    let (key_path, key) = key_file(dir, 0o600);
    let model = reference(&key, sector, 0, &ciphertext, false);
    let keys = format!(
        ",encrypt=aes-256-xts,key_file={},encrypt_sector={sector},block_size={sector}",
        key_path.display()
    );
    let model = on(&path, &keys, way, model, sector, anything);
    let plain = reference(&key, sector, 0, &std::fs::read(&path).unwrap(), false);
    assert_same("the file, decrypted", &plain, &model);
}

#[test]
fn on_an_encrypted_disk() {
    for sector in [512, 4096] {
        if let Some(dir) = on_a_disk("matrix") {
            on_an_encrypted_disk_in(&dir, Way::Direct, sector);
        }
    }
}

#[test]
fn on_a_block_device() {
    for align in [512, 4096] {
        let dir = TempDir::new("matrix");
        let (path, model) = image(&dir);
        let Some(device) = Loop::over(&path, align) else {
            return;
        };
        let align = align as usize;
        let keys = format!(",block_size={align}");
        let device = Path::new(&device.0);
        let model = on(device, &keys, Way::Direct, model, align, zeros);
        assert_same("the file below", &std::fs::read(&path).unwrap(), &model);
    }
}

#[test]
fn in_memory() {
    let served = Served::start(TempDir::new("matrix"), "backend=ram:8M");
    let model = run::<SplitDriver>(&served, vec![0; DISK], 512);
    run::<PackedDriver>(&served, model, 512);
}

fn refuses<D: Driver>(served: &Served, keys: &str) {
    let mut front = served.open::<D>(ALL);
    let config = front.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let end = (DISK / SECTOR) as u64;
    for (kind, sectors, segments) in [(DISCARD, 36, 40), (WRITE_ZEROES, 48, 52)] {
        let (sectors, segments) = (word(sectors), word(segments));
        assert!(sectors > 0 && segments > 0, "{keys}: limits are published");
        let many = range(0, 1, 0).repeat(segments as usize);
        assert_eq!(front.run(kind, 0, &many, 0).status, OK, "{keys}: {kind}");
        let more = range(0, 1, 0).repeat(segments as usize + 1);
        let long = range(0, sectors + 1, 0);
        let past = range(end - 1, 2, 0);
        let far = range(u64::MAX, 1, 0);
        let unknown = range(0, 1, 1 << 7);
        for (bytes, want) in [
            (&more[..], IOERR),
            (&long, IOERR),
            (&past, IOERR),
            (&far, IOERR),
            (&far[..15], IOERR),
            (&[], IOERR),
            (&unknown, UNSUPP),
        ] {
            let answer = front.run(kind, 0, bytes, 0);
            assert_eq!((answer.status, answer.used), (want, 1), "{keys}: {kind}");
        }
    }
    assert_eq!(front.run(DISCARD, 0, &range(0, 1, 1), 0).status, UNSUPP);
    assert_eq!(front.run(IN, 0, &[], 512).status, OK, "the queue goes on");
}

#[test]
fn published_limits_are_kept() {
    let dir = TempDir::new("limits");
    let (path, _) = image(&dir);
    for keys in [
        &format!("path={}", path.display()),
        "backend=ram:8M",
        "backend=null:8M",
    ] {
        let served = Served::start(TempDir::new("limits"), keys);
        refuses::<SplitDriver>(&served, keys);
        refuses::<PackedDriver>(&served, keys);
    }
}

#[test]
fn space_is_given_back_only_where_that_is_allowed() {
    for discard in [true, false] {
        let dir = TempDir::new("space");
        let (path, _) = image(&dir);
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
        let all = blocks();
        let keys = format!("path={},discard={discard}", path.display());
        let served = Served::start(TempDir::new("space"), &keys);
        let mut front = served.open::<SplitDriver>(ALL);
        assert_eq!(front.has(F_DISCARD), discard);
        let want = if discard { OK } else { UNSUPP };
        let answer = front.run(DISCARD, 0, &range(0, 4096, 0), 0);
        assert_eq!(answer.status, want);
        // With UNMAP.
        let answer = front.run(WRITE_ZEROES, 0, &range(8192, 4096, 1), 0);
        assert_eq!(answer.status, OK);
        let answer = front.run(IN, 8192, &[], 1 << 20);
        assert_eq!(answer.data, vec![0; 1 << 20]);
        assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
        let given_back = if discard { 8192 } else { 0 };
        // The file system's own blocks may come and go by a few.
        assert!(
            blocks().abs_diff(all - given_back) <= 64,
            "{} of {all} blocks",
            blocks()
        );
    }
}

#[test]
fn a_read_only_disk_keeps_its_ranges() {
    let dir = TempDir::new("read-only");
    let (path, model) = image(&dir);
    let keys = format!("path={},read_only=true", path.display());
    let served = Served::start(TempDir::new("read-only"), &keys);
    let mut front = served.open::<PackedDriver>(ALL);
    assert!(!front.has(F_DISCARD) && !front.has(F_WRITE_ZEROES));
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        let data = [&range(0, 8, 0)[..], &[0; 496]].concat();
        assert_eq!(front.run(kind, 0, &data, 0).status, IOERR);
    }
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}
