//! What a disk in memory is measured against: the same copies without a ring or a guest. The
//! front-end's core is as busy meanwhile, with a thread that polls: cores share caches and memory,
//! and where the host makes them two halves of one, what computes with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vringd::memory::{Store, copy};
use vringd::sys::cpu;

use super::{
    RAM_BYTES, Rate,
    turns::{BACK_END_CORE, FRONT_END_CORE},
};

const BLOCK: usize = 4096;
/// Blocks that a guest has in flight, each in memory of its own.
const BUFFERS: u64 = 32;
/// Copies between two looks at the clock.
const COPIES: u64 = 1024;

/// Copies blocks at random to the buffers in turn, or the other way, on the back-end's core.
pub(crate) fn run(is_read: bool, seconds: u32) -> Rate {
    let copies = move || {
        cpu::pin_to_core(BACK_END_CORE).expect("a core that the bench has looked for");
        let stored = Store::new(RAM_BYTES).expect("memory");
        let buffers = Store::new(BUFFERS * BLOCK as u64).expect("memory");
        // Pages that were never written are all the same one.
        for (store, bytes) in [(&stored, RAM_BYTES), (&buffers, BUFFERS * BLOCK as u64)] {
            let ones = vec![1; BLOCK];
            for offset in (0..bytes).step_by(BLOCK) {
                copy::write(&[store.segment(offset, BLOCK)], 0, &ones);
            }
        }
        let span = Duration::from_secs(seconds.into());
        let (begin, mut count, mut state) = (Instant::now(), 0_u64, 1_u64);
        while begin.elapsed() < span {
            for _ in 0..COPIES {
                // A linear congruential generator (Knuth's): its high bits are random enough.
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let block = (state >> 33) % (RAM_BYTES / BLOCK as u64);
                let stored = [stored.segment(block * BLOCK as u64, BLOCK)];
                let buffer = [buffers.segment(count % BUFFERS * BLOCK as u64, BLOCK)];
                let (from, to) = if is_read {
                    (stored, buffer)
                } else {
                    (buffer, stored)
                };
                copy::between(&from, 0, &to, 0, BLOCK);
                count += 1;
            }
        }
        let each = begin.elapsed().as_secs_f64() / count as f64;
        Rate {
            kiops: 1e-3 / each,
            p50_us: each * 1e6,
            cpu_us: each * 1e6,
        }
    };
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let poll = move || {
        cpu::pin_to_core(FRONT_END_CORE).expect("a core that the bench has looked for");
        while !seen.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    };
    // Threads of their own: the bench's is not to stay on those cores.
    let polls = thread::spawn(poll);
    let rate = thread::spawn(copies).join().expect("it only copies");
    over.store(true, Ordering::Relaxed);
    polls.join().expect("it only polls");
    rate
}
