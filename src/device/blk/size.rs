//! `DiskSize`: how large a disk is, as its guest is told and as it is.
//!
//! Both are one word each, so nobody reads half of a change. Control writes them, the workers look
//! at the end once per turn.

use std::sync::atomic::{AtomicU64, Ordering};

/// The size of a disk, which may change while it is used.
#[derive(Debug)]
pub struct DiskSize {
    /// Bytes of the capacity in config space.
    told: AtomicU64,
    /// Bytes that there are: nothing is read or written from here on. Never more than `told`.
    end: AtomicU64,
}

impl DiskSize {
    /// A disk of `bytes` bytes.
    pub(super) fn new(bytes: u64) -> DiskSize {
        DiskSize {
            told: AtomicU64::new(bytes),
            end: AtomicU64::new(bytes),
        }
    }

    /// What config space says, in bytes.
    pub fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }

    /// Where the disk ends, in bytes.
    #[inline]
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The disk has `bytes` bytes now. A guest that uses it (`in_use`) is never told that it has
    /// become smaller, since no driver expects that; it can't reach what is gone. Returns whether
    /// config space has changed. One thread alone calls this.
    ///
    /// A driver learns of its new size after this, and its requests come after that.
    pub fn set(&self, bytes: u64, in_use: bool) -> bool {
        let told = self.told();
        // What is behind it was made ready before.
        self.end.store(bytes, Ordering::Release);
        let tells = bytes > told || (bytes < told && !in_use);
        if tells {
            self.told.store(bytes, Ordering::Relaxed);
        }
        tells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_at_once_and_a_loss_only_to_the_next_guest() {
        let size = DiskSize::new(100);
        let both = || (size.told(), size.end());
        assert!(!size.set(100, true));
        assert!(size.set(200, true));
        assert_eq!(both(), (200, 200));
        assert!(!size.set(50, true));
        assert_eq!(both(), (200, 50));
        assert!(!size.set(150, true));
        assert_eq!(both(), (200, 150));
        assert!(size.set(300, true));
        assert_eq!(both(), (300, 300));
        assert!(!size.set(0, true));
        assert!(size.set(0, false), "nobody is there");
        assert_eq!(both(), (0, 0));
        assert!(!size.set(0, false));
    }
}
