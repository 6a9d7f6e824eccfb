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

        /// The byte offset of an address in this process, if it is in the area.
        #[cfg(test)]
        pub(crate) fn offset_of(&self, at: usize) -> Option<usize> {
            let offset = at.checked_sub(self.base.addr())?;
            (offset < self.len).then_some(offset)
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

    /// Pairs of words in a row, as descriptors and used elements are: where they lie is checked
    /// once for all of them.
    #[derive(Debug)]
    pub struct Pairs<'a, A>(&'a [[A; 2]]);

    /// One of them.
    #[derive(Debug)]
    pub struct Pair<'a, A>(&'a [A; 2]);

    impl<'a, A> Pairs<'a, A> {
        /// The pair `index` places on, if it is among them.
        #[inline(always)]
        pub fn get(&self, index: usize) -> Option<Pair<'a, A>> {
            self.0.get(index).map(Pair)
        }

        /// All of them, in order.
        #[inline(always)]
        pub fn iter(&self) -> impl ExactSizeIterator<Item = Pair<'a, A>> {
            self.0.iter().map(Pair)
        }
    }

    macro_rules! pairs {
        ($pairs:ident, $word:ty, $atomic:ty) => {
            impl Area {
                /// `count` pairs of words from byte `offset` on.
                #[inline(always)]
                pub fn $pairs(&self, offset: usize, count: usize) -> Pairs<'_, $atomic> {
                    let bytes = count.checked_mul(2 * size_of::<$word>());
                    let end = bytes.and_then(|bytes| offset.checked_add(bytes));
                    let at = self.base.wrapping_add(offset);
                    assert!(
                        end.is_some_and(|end| end <= self.len)
                            && at.addr().is_multiple_of(size_of::<$word>()),
                        "ring access out of bounds"
                    );
                    // SAFETY: inside the mapping and aligned (just checked); the mapping lives as
                    // long as `self`. Atomics tolerate a peer changing the bytes.
                    Pairs(unsafe { core::slice::from_raw_parts(at.cast(), count) })
                }
            }

            impl Pair<'_, $atomic> {
                #[inline(always)]
                fn word(&self, which: usize) -> &$atomic {
                    #[cfg(fuzzing)]
                    crate::memory::meddle::before_read();
                    #[cfg(test)]
                    crate::memory::watch::touch(core::ptr::from_ref(&self.0[which]).addr());
                    &self.0[which]
                }

                /// Relaxed load of the first word.
                #[inline(always)]
                pub fn first(&self) -> $word {
                    <$word>::from_le(self.word(0).load(Ordering::Relaxed))
                }

                /// Relaxed load of the second word.
                #[inline(always)]
                pub fn second(&self) -> $word {
                    <$word>::from_le(self.word(1).load(Ordering::Relaxed))
                }

                /// Acquire load of the second word.
                #[inline(always)]
                pub fn second_acquire(&self) -> $word {
                    <$word>::from_le(self.word(1).load(Ordering::Acquire))
                }

                /// Relaxed store of the first word.
                #[inline(always)]
                pub fn set_first(&self, value: $word) {
                    #[cfg(test)]
                    crate::memory::watch::note(core::ptr::from_ref(&self.0[0]).addr());
                    self.word(0).store(value.to_le(), Ordering::Relaxed);
                }

                /// Relaxed store of the second word.
                #[inline(always)]
                pub fn set_second(&self, value: $word) {
                    #[cfg(test)]
                    crate::memory::watch::note(core::ptr::from_ref(&self.0[1]).addr());
                    self.word(1).store(value.to_le(), Ordering::Relaxed);
                }
            }
        };
    }
    pairs!(pairs32, u32, AtomicU32);
    pairs!(pairs64, u64, AtomicU64);

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
                    #[cfg(test)]
                    crate::memory::watch::touch(at.addr());
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
                    #[cfg(test)]
                    crate::memory::watch::note(self.base.addr() + offset);
                    self.$cell(offset).store(value.to_le(), Ordering::Relaxed);
                }

                /// Release store of the word at byte `offset`.
                #[inline]
                pub fn $store_release(&self, offset: usize, value: $word) {
                    #[cfg(test)]
                    crate::memory::watch::note(self.base.addr() + offset);
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

    macro_rules! pairs {
        ($pairs:ident, $Pair:ident, $word:ty, $load:ident, $load_acquire:ident, $store:ident) => {
            /// Two words of the model.
            #[derive(Debug, Clone)]
            pub struct $Pair {
                area: Area,
                at: usize,
            }

            impl Area {
                /// `count` pairs of words from byte `offset` on.
                pub fn $pairs(&self, offset: usize, count: usize) -> Pairs<$Pair> {
                    let bytes = 2 * size_of::<$word>();
                    let pair = |index| $Pair {
                        area: self.clone(),
                        at: offset + bytes * index,
                    };
                    Pairs((0..count).map(pair).collect())
                }
            }

            impl $Pair {
                /// Relaxed load of the first word.
                pub fn first(&self) -> $word {
                    self.area.$load(self.at)
                }

                /// Relaxed load of the second word.
                pub fn second(&self) -> $word {
                    self.area.$load(self.at + size_of::<$word>())
                }

                /// Acquire load of the second word.
                pub fn second_acquire(&self) -> $word {
                    self.area.$load_acquire(self.at + size_of::<$word>())
                }

                /// Relaxed store of the first word.
                pub fn set_first(&self, value: $word) {
                    self.area.$store(self.at, value);
                }

                /// Relaxed store of the second word.
                pub fn set_second(&self, value: $word) {
                    self.area.$store(self.at + size_of::<$word>(), value);
                }
            }
        };
    }
    pairs!(pairs32, Pair32, u32, load32, load32_acquire, store32);
    pairs!(pairs64, Pair64, u64, load64, load64_acquire, store64);

    /// Pairs of words in a row.
    #[derive(Debug, Clone)]
    pub struct Pairs<P>(Vec<P>);

    impl<P: Clone> Pairs<P> {
        /// The pair `index` places on, if it is among them.
        pub fn get(&self, index: usize) -> Option<P> {
            self.0.get(index).cloned()
        }

        /// All of them, in order.
        pub fn iter(&self) -> impl ExactSizeIterator<Item = P> {
            self.0.clone().into_iter()
        }
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
