//! The dirty log of a live migration: one bit per 4 KiB page that we wrote.
//!
//! vhost-user: SET_LOG_BASE. The rings mark a chain's writable segments when it completes, before
//! the used element is published, and never at submit.

use crate::sync::Ordering;
use core::sync::atomic::AtomicU8;

use super::{GuestRam, Segment};

/// Page size of the log, fixed by the protocol.
const LOG_PAGE: u64 = 4096;

/// A bitmap over guest physical pages.
#[derive(Debug)]
pub struct DirtyLog {
    bits: Box<[AtomicU8]>,
}

impl DirtyLog {
    /// A log that covers guest physical addresses below `gpa_end`.
    pub fn new(gpa_end: u64) -> DirtyLog {
        let bytes = usize::try_from(gpa_end.div_ceil(LOG_PAGE * 8)).unwrap_or(usize::MAX);
        DirtyLog {
            bits: (0..bytes).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// Marks the pages of the first `written` bytes of `segments`.
    pub fn mark(&self, ram: &GuestRam, segments: &[Segment], written: u32) {
        let mut left = written as usize;
        for segment in segments {
            let here = segment.take(left);
            left -= here.len();
            if let (Some(gpa), false) = (ram.gpa_of(&here), here.is_empty()) {
                self.mark_range(gpa, here.len() as u64);
            }
        }
    }

    fn mark_range(&self, gpa: u64, len: u64) {
        for page in gpa / LOG_PAGE..=(gpa + len - 1) / LOG_PAGE {
            let byte = usize::try_from(page / 8)
                .ok()
                .and_then(|at| self.bits.get(at));
            let bit = 1 << (page % 8);
            // A set bit is left alone: the front-end clears bits rarely, we set them often.
            if let Some(byte) = byte.filter(|byte| byte.load(Ordering::Relaxed) & bit == 0) {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether the page that holds `gpa` is marked.
    pub fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE;
        let byte = usize::try_from(page / 8)
            .ok()
            .and_then(|at| self.bits.get(at));
        byte.is_some_and(|byte| byte.load(Ordering::Relaxed) & (1 << (page % 8)) != 0)
    }
}
