//! What the encrypting layer costs beside the cipher alone, in memory.
//!
//! `cipher` is AWS-LC's own calls, sector by sector, over one buffer in the cache. `layer` is what
//! a disk's queue does for a request: pieces are taken, the guest's bytes encrypted into them, or
//! theirs decrypted into the guest's memory, over a disk that moves nothing. `in place` is the
//! other way to read: the disk reads into the guest's memory, which is decrypted there; beside it
//! `own memory` has the same copy in the disk's place.
//!
//! `cargo bench --features testing --bench crypt`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use vringd::host::blk::{BlkIo, BlkOp, Token};
use vringd::host::crypt::Crypt;
use vringd::host::null::NullDisk;
use vringd::memory::{Access, GuestRam, Segment, Segments, Store, copy};
use vringd::sys::key::DiskKey;
use vringd::sys::xts::{Direction, Xts};

const RAM: u64 = 64 << 20;
const TOKEN: Token = Token {
    slot: 0,
    generation: 0,
};

fn key() -> [u8; 64] {
    core::array::from_fn(|i| u8::try_from(i * 3 + 1).unwrap_or(0))
}

/// The cipher's own calls, without anything of ours around them.
#[expect(unsafe_code, reason = "the crate's functions take addresses")]
mod alone {
    use std::ptr;

    use aws_lc_sys::{
        EVP_CIPHER_CTX, EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate, EVP_aes_256_xts,
    };

    pub(crate) struct Cipher(*mut EVP_CIPHER_CTX);

    impl Cipher {
        pub(crate) fn new(key: &[u8; 64], encrypt: bool) -> Cipher {
            // SAFETY: a new context, and a key of the size that the cipher reads.
            unsafe {
                let context = EVP_CIPHER_CTX_new();
                let none = ptr::null_mut();
                let encrypt = i32::from(encrypt);
                let cipher = EVP_aes_256_xts();
                EVP_CipherInit_ex(context, cipher, none, key.as_ptr(), ptr::null(), encrypt);
                Cipher(context)
            }
        }

        pub(crate) fn run(&mut self, from: &[u8], to: &mut [u8], sector: usize) {
            let pairs = from.chunks_exact(sector).zip(to.chunks_exact_mut(sector));
            for (number, (from, to)) in (0u128..).zip(pairs) {
                let tweak = number.to_le_bytes();
                let len = i32::try_from(sector).unwrap_or(0);
                let mut done = 0;
                // SAFETY: both slices have `sector` bytes, the tweak has 16.
                unsafe {
                    let (cipher, key) = (ptr::null(), ptr::null());
                    EVP_CipherInit_ex(self.0, cipher, ptr::null_mut(), key, tweak.as_ptr(), -1);
                    EVP_CipherUpdate(self.0, to.as_mut_ptr(), &raw mut done, from.as_ptr(), len);
                }
                assert_eq!(done, len);
            }
        }
    }
}

fn segment(ram: &GuestRam, at: u64, bytes: usize) -> Segment {
    let mut list = Segments::with_capacity(1);
    let len = u32::try_from(bytes).expect("a small request");
    let added = ram.translate(at, len, Access::Write, &mut list);
    added.expect("an address in memory");
    list.as_slice()[0]
}

fn layer(criterion: &mut Criterion) {
    let ram = GuestRam::for_test(&[(0, RAM)]);
    copy::write(&[segment(&ram, 0, 1 << 20)], 0, &vec![0x5a; 1 << 20]);
    for (bytes, sector) in [(4096, 512), (4096, 4096), (65536, 512)] {
        let mut group = criterion.benchmark_group(format!("{bytes} bytes, sectors of {sector}"));
        group.throughput(Throughput::Bytes(bytes as u64));
        for (name, encrypt) in [("encrypt", true), ("decrypt", false)] {
            let mut cipher = alone::Cipher::new(&key(), encrypt);
            let (from, mut to) = (vec![0x5a; bytes], vec![0; bytes]);
            group.bench_function(BenchmarkId::new("cipher", name), |bencher| {
                bencher.iter(|| cipher.run(black_box(&from), black_box(&mut to), sector));
            });
            let size = u32::try_from(sector).expect("a small sector");
            let crypt = Crypt::new(&DiskKey::for_test(&key()), size, 512);
            let mut crypt = crypt.expect("there is memory");
            let mut disk = NullDisk::new(8);
            let segments = [segment(&ram, 0, bytes)];
            let segments = &segments[..];
            let op = if encrypt {
                BlkOp::Write {
                    offset: 0,
                    segments,
                    durable: false,
                }
            } else {
                let offset = 0;
                BlkOp::Read { offset, segments }
            };
            group.bench_function(BenchmarkId::new("layer", name), |bencher| {
                bencher.iter(|| {
                    let mut disk = crypt.over(&mut disk);
                    let io: &mut dyn BlkIo = black_box(&mut disk);
                    io.submit(TOKEN, black_box(op)).expect("there is room");
                    assert!(io.reap().is_some());
                });
            });
        }
        group.finish();
    }
}

/// Reads whose data comes from a copy, into buffers all over a guest's memory.
fn reads(criterion: &mut Criterion) {
    const BYTES: usize = 4096;
    let ram = GuestRam::for_test(&[(0, RAM)]);
    copy::write(&[segment(&ram, 0, 1 << 20)], 0, &vec![0x5a; 1 << 20]);
    let disk = Store::new(RAM).expect("there is memory");
    disk.zero(0, usize::try_from(RAM).expect("small"), false);
    let own = Store::new(BYTES as u64).expect("there is memory");
    let own = own.segment(0, BYTES);
    let mut xts = Xts::new(&DiskKey::for_test(&key()), 512).expect("there is memory");
    let mut group = criterion.benchmark_group("reads of 4096 bytes");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let mut at = 0u64;
    let mut next = move || {
        at = (at + 4096 * 1237) % RAM;
        at
    };
    group.bench_function("in place", |bencher| {
        bencher.iter(|| {
            let guest = segment(&ram, next(), BYTES);
            copy::one(disk.segment(next(), BYTES), guest, BYTES);
            xts.run(Direction::Decrypt, 0, guest, guest)
        });
    });
    group.bench_function("own memory", |bencher| {
        bencher.iter(|| {
            let guest = segment(&ram, next(), BYTES);
            copy::one(disk.segment(next(), BYTES), own, BYTES);
            xts.run(Direction::Decrypt, 0, own, guest)
        });
    });
    group.finish();
}

fn main() {
    // Without this cargo is testing, not benchmarking: that it builds is all there is to test.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    layer(&mut criterion);
    reads(&mut criterion);
    criterion.final_summary();
}
