//! What a chain costs the device side of a ring.
//!
//! `cargo bench --features testing --bench chains`. Every figure is for 256 chains, taken and used
//! in bursts of 1, 8, 32 or 256; the driver's share is not timed. `virtio-queue` is the rust-vmm
//! crate over the same bytes, `vhost-user-backend` the same behind that crate's `VringMutex`.
//! `echo` is the whole way of a frame from a transmit to a receive ring, `threads` a ring between
//! two pinned threads, driver and device timed together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vringd::device::net::{QueueCounters, RxHandler, TxHandler, feature};
use vringd::host::net::FrameBurst;
use vringd::memory::{GuestRam, Segments};
use vringd::ring::{ChainQueue, Popped, Single, Virtqueue};
use vringd::sys::cpu;
use vringd::testing::driver::{Buf, Driver, PackedDriver, RingMemory, SplitDriver};

const CHAINS: u64 = 256;
/// As many, to count with.
const ALL: usize = 256;
const SIZE: u16 = 1024;
const BUFFERS: u64 = 0x10_0000;
/// From one buffer to the next, as in DPDK's pools: not a power of two, which would put all of them
/// into the same few sets of the cache.
const BUFFER: u64 = 2432;
const RAM: u64 = 0x100_0000;
const BURSTS: [usize; 4] = [1, 8, 32, 256];

/// The buffers of chain `number`: `count` descriptors, the last of them writable.
fn bufs(number: u64, count: u64) -> Vec<Buf> {
    let at = BUFFERS + number * BUFFER;
    let mut bufs: Vec<_> = (1..count)
        .map(|i| Buf::readable(at + i * 256, 128))
        .collect();
    bufs.push(Buf::writable(at, 128));
    bufs
}

fn post(driver: &mut impl Driver, descriptors: u64) {
    for number in 0..CHAINS {
        driver
            .add(&bufs(number, descriptors))
            .expect("room for all");
    }
    driver.publish();
}

/// What a device keeps between bursts.
struct Scratch {
    singles: Vec<Single>,
    segments: Segments,
}

impl Scratch {
    fn new() -> Scratch {
        Scratch {
            singles: (0..ALL).map(|_| Single::EMPTY).collect(),
            segments: Segments::with_capacity(4096),
        }
    }
}

/// Takes and uses a burst of up to `burst` chains.
fn take<D: Driver>(vq: &mut Virtqueue<D::Format>, scratch: &mut Scratch, burst: usize) {
    scratch.segments.clear();
    let taken = vq.pop_singles(true, &mut scratch.singles[..burst]);
    vq.put_used_singles(&scratch.singles[..taken], core::iter::repeat(128));
    for _ in taken..burst {
        let Ok(Popped::Chain(chain)) = vq.pop(&mut scratch.segments) else {
            break;
        };
        vq.put_used(chain.id, 128, &[]);
    }
    vq.publish();
}

/// Takes and uses all chains in bursts of `burst`.
fn drain<D: Driver>(vq: &mut Virtqueue<D::Format>, scratch: &mut Scratch, burst: usize) {
    (0..ALL / burst).for_each(|_| take::<D>(vq, scratch, burst));
}

fn ours<D: Driver>(c: &mut Criterion, name: &str) {
    let mut group = c.benchmark_group("chain");
    group.throughput(Throughput::Elements(CHAINS));
    for descriptors in [1, 2, 4] {
        for burst in BURSTS {
            let ram = GuestRam::for_test(&[(0, RAM)]);
            let memory = RingMemory::new::<D::Format>(&ram, 0, SIZE);
            let (mut driver, mut vq) = (D::new(&memory, true), memory.device::<D::Format>(true));
            let mut scratch = Scratch::new();
            let id = BenchmarkId::new(name, format!("{descriptors} descriptors, burst {burst}"));
            group.bench_function(id, |b| {
                b.iter_custom(|rounds| {
                    timed(
                        rounds,
                        &mut (&mut driver, &mut vq),
                        |(driver, vq), start| {
                            post(*driver, descriptors);
                            *start = Instant::now();
                            drain::<D>(vq, &mut scratch, burst);
                            let took = start.elapsed();
                            while driver.used().is_some() {}
                            took
                        },
                    )
                });
            });
        }
    }
    group.finish();
}

/// The sum of what `round` says it took.
fn timed<T>(
    rounds: u64,
    state: &mut T,
    mut round: impl FnMut(&mut T, &mut Instant) -> Duration,
) -> Duration {
    let mut start = Instant::now();
    (0..rounds).map(|_| round(state, &mut start)).sum()
}

/// Another's queue over the same bytes as our driver: takes and uses all chains in bursts of the
/// size given.
fn theirs<F: FnMut(usize)>(
    c: &mut Criterion,
    name: &str,
    queue: impl Fn(&RingMemory, GuestMemoryMmap) -> F,
) {
    let mut group = c.benchmark_group("chain");
    group.throughput(Throughput::Elements(CHAINS));
    for descriptors in [1, 2, 4] {
        for burst in BURSTS {
            let (ram, memory) = shared_memory();
            let ring = RingMemory::new::<vringd::ring::Split>(&ram, 0, SIZE);
            let mut driver = SplitDriver::new(&ring, true);
            let mut drain = queue(&ring, memory);
            let id = BenchmarkId::new(name, format!("{descriptors} descriptors, burst {burst}"));
            group.bench_function(id, |b| {
                b.iter_custom(|rounds| {
                    timed(rounds, &mut driver, |driver, start| {
                        post(driver, descriptors);
                        *start = Instant::now();
                        drain(burst);
                        let took = start.elapsed();
                        while driver.used().is_some() {}
                        took
                    })
                });
            });
        }
    }
    group.finish();
}

/// `virtio-queue` on its own.
fn virtio_queue(ring: &RingMemory, memory: GuestMemoryMmap) -> impl FnMut(usize) + use<> {
    let mut queue = queue(ring);
    move |burst| {
        for _ in 0..ALL / burst {
            for _ in 0..burst {
                let Some(chain) = queue.pop_descriptor_chain(&memory) else {
                    break;
                };
                let head = chain.head_index();
                let bytes: u32 = chain.map(|desc| desc.len()).sum();
                std::hint::black_box(bytes);
                queue.add_used(&memory, head, 128).expect("a legal ring");
            }
            let wants = queue.needs_notification(&memory).expect("a legal ring");
            std::hint::black_box(wants);
        }
    }
}

/// A vring of `vhost-user-backend`, used call by call as back-ends on it do.
fn vhost_user_backend(ring: &RingMemory, memory: GuestMemoryMmap) -> impl FnMut(usize) + use<> {
    let memory = GuestMemoryAtomic::new(memory);
    let vring = VringMutex::new(memory.clone(), SIZE).expect("a legal size");
    *vring.get_mut().get_queue_mut() = queue(ring);
    move |burst| {
        for _ in 0..ALL / burst {
            for _ in 0..burst {
                let memory = memory.memory();
                let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory);
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let bytes: u32 = chain.map(|desc| desc.len()).sum();
                std::hint::black_box(bytes);
                vring.add_used(head, 128).expect("a legal ring");
            }
            std::hint::black_box(vring.needs_notification().expect("a legal ring"));
        }
    }
}

/// The same memory for our driver and for the crate.
fn shared_memory() -> (Arc<GuestRam>, GuestMemoryMmap) {
    let ram = GuestRam::for_test(&[(0, RAM)]);
    let file = ram.specs()[0].file.try_clone().expect("an fd");
    let bytes = usize::try_from(RAM).expect("64 bits");
    let range = (
        GuestAddress(0),
        bytes,
        Some(vm_memory::FileOffset::new(file, 0)),
    );
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("a mapping");
    (ram, memory)
}

fn queue(ring: &RingMemory) -> Queue {
    let mut queue = Queue::new(SIZE).expect("a legal size");
    let [desc, driver, device] = ring.at.map(GuestAddress);
    queue.set_size(SIZE);
    queue
        .try_set_desc_table_address(desc)
        .and_then(|()| queue.try_set_avail_ring_address(driver))
        .and_then(|()| queue.try_set_used_ring_address(device))
        .expect("aligned areas");
    queue.set_event_idx(true);
    queue.set_ready(true);
    queue
}

/// A frame's way from a transmit ring to a receive ring.
fn echo<D: Driver>(c: &mut Criterion, name: &str) {
    let mut group = c.benchmark_group("echo");
    group.throughput(Throughput::Elements(CHAINS));
    for bytes in [64, 1518] {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let tx = RingMemory::new::<D::Format>(&ram, 0, SIZE);
        let at = tx.end::<D::Format>().next_multiple_of(4096);
        let rx = RingMemory::new::<D::Format>(&ram, at, SIZE);
        let (mut tx_driver, mut rx_driver) = (D::new(&tx, false), D::new(&rx, false));
        let mut tx_vq = tx.device::<D::Format>(false);
        let mut rx_vq = rx.device::<D::Format>(false);
        let counters = Arc::new(QueueCounters::default());
        let features = feature::VERSION_1 | feature::MRG_RXBUF;
        let mut from = TxHandler::new(features, 1, Arc::clone(&counters));
        let mut to = RxHandler::new(features, SIZE, counters);
        let mut burst = FrameBurst::new();
        let id = BenchmarkId::new(name, format!("{bytes} bytes"));
        group.bench_function(id, |b| {
            b.iter_custom(|rounds| {
                timed(rounds, &mut (), |(), start| {
                    for number in 0..CHAINS {
                        let at = BUFFERS + number * 2 * BUFFER;
                        let sent = tx_driver.add(&[Buf::readable(at + 116, bytes + 12)]);
                        let room = rx_driver.add(&[Buf::writable(at + BUFFER + 116, 2000)]);
                        assert!(sent.is_some() && room.is_some(), "room for all");
                    }
                    tx_driver.publish();
                    rx_driver.publish();
                    *start = Instant::now();
                    from.receive(&mut tx_vq, &mut burst).expect("a legal ring");
                    let FrameBurst {
                        frames, segments, ..
                    } = &mut burst;
                    to.transmit(&mut rx_vq, frames, segments)
                        .expect("a legal ring");
                    from.complete(&mut tx_vq, &mut burst);
                    tx_vq.publish();
                    rx_vq.publish();
                    let took = start.elapsed();
                    while tx_driver.used().is_some() {}
                    while rx_driver.used().is_some() {}
                    took
                })
            });
        });
    }
    group.finish();
}

/// A ring between a driver and a device on cores of their own: the driver shows 256 chains, the
/// device takes and uses them in bursts, until all are back.
fn threads<D: Driver + Send>(c: &mut Criterion, name: &str) {
    let cores = cpu::online_cores().unwrap_or_default();
    let [first, .., last] = cores[..] else {
        eprintln!("threads: two cores are needed");
        return;
    };
    cpu::pin_to_core(first).expect("the core is online");
    let mut group = c.benchmark_group("threads");
    group.throughput(Throughput::Elements(CHAINS));
    for descriptors in [1, 2, 4] {
        for burst in BURSTS {
            let ram = GuestRam::for_test(&[(0, RAM)]);
            let memory = RingMemory::new::<D::Format>(&ram, 0, SIZE);
            let (mut driver, mut vq) = (D::new(&memory, false), memory.device::<D::Format>(false));
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let _stop = Stop(&stop);
                scope.spawn(|| {
                    cpu::pin_to_core(last).expect("the core is online");
                    let mut scratch = Scratch::new();
                    while !stop.load(Ordering::Relaxed) {
                        take::<D>(&mut vq, &mut scratch, burst);
                    }
                });
                let id =
                    BenchmarkId::new(name, format!("{descriptors} descriptors, burst {burst}"));
                group.bench_function(id, |b| {
                    b.iter(|| {
                        post(&mut driver, descriptors);
                        let mut left = CHAINS;
                        while left > 0 {
                            left -= u64::from(driver.used().is_some());
                        }
                    });
                });
            });
        }
    }
    group.finish();
}

/// Ends the device's thread, however its driver ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn chains(c: &mut Criterion) {
    ours::<SplitDriver>(c, "split");
    ours::<PackedDriver>(c, "packed");
    theirs(c, "virtio-queue", virtio_queue);
    theirs(c, "vhost-user-backend", vhost_user_backend);
    echo::<SplitDriver>(c, "split");
    echo::<PackedDriver>(c, "packed");
    threads::<SplitDriver>(c, "split");
    threads::<PackedDriver>(c, "packed");
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
    chains(&mut criterion);
    criterion.final_summary();
}
