//! The memory that a back-end is shown: one region, for rings and buffers.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::BenchError;
use crate::memory::{GuestRam, RegionSpec};
use crate::sys::share::{self, HUGE_PAGE_BYTES};

/// Guest physical address of the memory, and what front-end addresses are more than that.
pub(super) const GPA: u64 = 1 << 30;
pub(super) const TO_UVA: u64 = 1 << 40;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Rings begin on a page.
pub(super) const PAGE: usize = 4096;

/// Memory that a back-end can map.
#[derive(Debug)]
pub(super) struct Memory {
    /// Our mapping of it.
    pub ram: Arc<GuestRam>,
    spec: RegionSpec,
    /// It is made of pages of 2 MiB.
    pub huge: bool,
}

impl Memory {
    /// Takes `bytes` of memory at least and maps them, in huge pages where there are enough.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub(super) fn new(bytes: u64) -> Result<Memory, BenchError> {
        let bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
        let (file, huge) = match share::memory(bytes, true) {
            Ok(file) => (file, true),
            Err(_) => {
                let file = share::memory(bytes, false);
                let file = file.map_err(|source| BenchError::NoMemory { bytes, source })?;
                (file, false)
            }
        };
        let spec = RegionSpec {
            gpa: GPA,
            size: bytes,
            uva: GPA + TO_UVA,
            mmap_offset: 0,
            file: Arc::new(file),
        };
        let ram = GuestRam::map(vec![spec.clone()], None).map_err(BenchError::Memory)?;
        Ok(Memory {
            ram: Arc::new(ram),
            spec,
            huge,
        })
    }

    /// The region as a back-end is told: guest physical address, size, front-end address.
    pub(super) fn region(&self) -> [u64; 3] {
        [self.spec.gpa, self.spec.size, self.spec.uva]
    }

    /// The memory itself.
    pub(super) fn fd(&self) -> RawFd {
        self.spec.file.as_raw_fd()
    }
}
