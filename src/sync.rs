//! Atomics and fences: core's, or loom's under `cfg(loom)`; and the one kind of counter we have.
//!
//! Everything that two threads (or the guest and we) share in a protocol goes through these names,
//! so that the loom models run the production code of the rings and of parking as it is.

pub(crate) mod parking;

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell as Cell;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// A place that one thread at a time may access, as loom's cell shows it.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct Cell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> Cell<T> {
    /// A cell that holds `value`.
    pub(crate) fn new(value: T) -> Cell<T> {
        Cell(core::cell::UnsafeCell::new(value))
    }

    /// Lends the place; whoever looks into it sees to it that nobody else does.
    #[inline(always)]
    pub(crate) fn with_mut<R>(&self, look: impl FnOnce(*mut T) -> R) -> R {
        look(self.0.get())
    }
}

/// A counter with one writer and any number of readers.
///
/// `add` is a plain load and a plain store: the writer is the worker that owns what is counted, so
/// no read-modify-write is needed on the hot path.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter that stands at zero.
    pub const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds `count`. Only the owner may call this.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(count), Relaxed);
    }

    /// Sets the value, for a counter that shows a level. Only the owner may call this.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
