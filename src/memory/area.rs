//! `Area`: one part of a virtqueue in shared memory, and how it is touched.
//!
//! This file alone decides how shared ring memory is accessed: naturally aligned atomics of the
//! width that the specification gives a field, relaxed but where the method's name says acquire or
//! release; ordering beyond that is the caller's explicit fences (docs/decisions/0002). All words
//! are little-endian in memory and native at the interface. Bounds are checked in release builds.
//!
//! Under `cfg(loom)` the body is a table of loom atomics, so that the models run the production
//! code of the rings. An offset is always accessed with one width, which makes one cell per offset
//! enough.

use std::sync::Arc;

use super::GuestRam;

#[cfg(not(loom))]
mod body {
    use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

    use super::{Arc, GuestRam};
    use crate::memory::prefetch;

    /// A bounds-checked window on ring memory.
    #[derive(Debug)]
    pub struct Area {
        base: *mut u8,
        len: usize,
        /// Keeps the mapping below `base` alive.
        _ram: Arc<GuestRam>,
    }

    // SAFETY: the memory belongs to the mapping that `_ram` holds, and every access is atomic.
    unsafe impl Send for Area {}
    // SAFETY: as above.
    unsafe impl Sync for Area {}

    impl Area {
        /// `len` bytes at `base`, inside a mapping of `ram`.
        pub(in super::super) fn new(base: *mut u8, len: usize, ram: Arc<GuestRam>) -> Area {
            Area {
                base,
                len,
                _ram: ram,
            }
        }

        /// Length in bytes.
        #[expect(clippy::len_without_is_empty, reason = "an area is never empty")]
        pub fn len(&self) -> usize {
            self.len
        }

        /// Start address in this process.
        pub(in super::super) fn base(&self) -> *mut u8 {
            self.base
        }

        /// Asks the CPU to fetch the line at `offset`.
        #[inline]
        pub fn prefetch(&self, offset: usize) {
            prefetch::for_read(self.base.wrapping_add(offset));
        }

        /// Asks the CPU to fetch the line at `offset` in order to write it.
        #[inline]
        pub fn prefetch_write(&self, offset: usize) {
            prefetch::for_write(self.base.wrapping_add(offset));
        }
    }

    macro_rules! access {
        ($cell:ident, $word:ty, $atomic:ty, $load:ident, $load_acquire:ident, $store:ident,
         $store_release:ident) => {
            impl Area {
                #[inline]
                fn $cell(&self, offset: usize) -> &$atomic {
                    #[cfg(fuzzing)]
                    crate::memory::meddle::before_read();
                    const BYTES: usize = size_of::<$word>();
                    let inside = offset.checked_add(BYTES).is_some_and(|end| end <= self.len);
                    let at = self.base.wrapping_add(offset);
                    assert!(
                        inside && at.addr().is_multiple_of(BYTES),
                        "ring access out of bounds"
                    );
                    // SAFETY: inside the mapping and aligned (just checked); the mapping lives as
                    // long as `self`. An atomic is the one kind of reference that tolerates a peer
                    // changing the bytes.
                    unsafe { <$atomic>::from_ptr(at.cast()) }
                }

                /// Relaxed load of the word at byte `offset`.
                #[inline]
                pub fn $load(&self, offset: usize) -> $word {
                    <$word>::from_le(self.$cell(offset).load(Ordering::Relaxed))
                }

                /// Acquire load of the word at byte `offset`.
                #[inline]
                pub fn $load_acquire(&self, offset: usize) -> $word {
                    <$word>::from_le(self.$cell(offset).load(Ordering::Acquire))
                }

                /// Relaxed store of the word at byte `offset`.
                #[inline]
                pub fn $store(&self, offset: usize, value: $word) {
                    self.$cell(offset).store(value.to_le(), Ordering::Relaxed);
                }

                /// Release store of the word at byte `offset`.
                #[inline]
                pub fn $store_release(&self, offset: usize, value: $word) {
                    self.$cell(offset).store(value.to_le(), Ordering::Release);
                }
            }
        };
    }
    access!(
        cell16,
        u16,
        AtomicU16,
        load16,
        load16_acquire,
        store16,
        store16_release
    );
    access!(
        cell32,
        u32,
        AtomicU32,
        load32,
        load32_acquire,
        store32,
        store32_release
    );
    access!(
        cell64,
        u64,
        AtomicU64,
        load64,
        load64_acquire,
        store64,
        store64_release
    );
}

#[cfg(loom)]
mod body {
    use super::{Arc, GuestRam};
    use loom::sync::atomic::{AtomicU64, Ordering};

    /// A window on ring memory made of loom atomics, one per even byte offset.
    #[derive(Debug, Clone)]
    pub struct Area {
        cells: Arc<Vec<AtomicU64>>,
    }

    impl Area {
        pub(in super::super) fn new(_base: *mut u8, len: usize, _ram: Arc<GuestRam>) -> Area {
            Area::for_loom(len)
        }

        /// `len` bytes of zeros; clones share them.
        pub fn for_loom(len: usize) -> Area {
            Area {
                cells: Arc::new((0..len.div_ceil(2)).map(|_| AtomicU64::new(0)).collect()),
            }
        }

        /// Length in bytes.
        pub fn len(&self) -> usize {
            self.cells.len() * 2
        }

        /// A model has no addresses.
        pub(in super::super) fn base(&self) -> *mut u8 {
            core::ptr::null_mut()
        }

        /// Nothing to fetch in a model.
        pub fn prefetch(&self, _offset: usize) {}
    }

    macro_rules! access {
        ($word:ty, $load:ident, $load_acquire:ident, $store:ident, $store_release:ident) => {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the cell holds a narrower word"
            )]
            impl Area {
                /// Relaxed load of the word at byte `offset`.
                pub fn $load(&self, offset: usize) -> $word {
                    self.cells[offset / 2].load(Ordering::Relaxed) as $word
                }

                /// Acquire load of the word at byte `offset`.
                pub fn $load_acquire(&self, offset: usize) -> $word {
                    self.cells[offset / 2].load(Ordering::Acquire) as $word
                }

                /// Relaxed store of the word at byte `offset`.
                pub fn $store(&self, offset: usize, value: $word) {
                    self.cells[offset / 2].store(u64::from(value), Ordering::Relaxed);
                }

                /// Release store of the word at byte `offset`.
                pub fn $store_release(&self, offset: usize, value: $word) {
                    self.cells[offset / 2].store(u64::from(value), Ordering::Release);
                }
            }
        };
    }
    access!(u16, load16, load16_acquire, store16, store16_release);
    access!(u32, load32, load32_acquire, store32, store32_release);
    access!(u64, load64, load64_acquire, store64, store64_release);
}

pub use body::Area;
