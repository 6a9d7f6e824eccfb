//! `GuestRam`: one immutable memory table, and the translation of guest addresses.
//!
//! Control builds a table from the regions of SET_MEM_TABLE or ADD_MEM_REG, checks every region
//! before it is mapped (vhost-user: "Memory regions description"), and hands it to the workers in
//! an `Arc`. The hot path is [`GuestRam::translate`]: a look-up in a flat table, no lock, no count.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Area;
use super::region::{Mapping, map_or_keep};
use super::segment::{Segment, Segments};

/// With at most this many regions a linear scan beats a binary search.
const LINEAR_REGIONS_MAX: usize = 8;

/// One region as the front-end describes it.
#[derive(Debug, Clone)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the first byte in the front-end's address space.
    pub uva: u64,
    /// Where the region begins in `file`.
    pub mmap_offset: u64,
    /// The memory itself.
    pub file: Arc<File>,
}

/// What of a region can be told without its file: what a saved session keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RegionInfo {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the first byte in the front-end's address space.
    pub uva: u64,
    /// Where the region begins in its file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    /// The description without the file.
    pub fn info(&self) -> RegionInfo {
        RegionInfo {
            gpa: self.gpa,
            size: self.size,
            uva: self.uva,
            mmap_offset: self.mmap_offset,
        }
    }

    /// Sees to it that touching the region waits for no disk: its pages stay in memory.
    ///
    /// # Errors
    /// [`MemoryError::OnDisk`] of a file that can be written out and read again,
    /// [`MemoryError::Map`] when the system does not tell what it is.
    pub fn stays_in_memory(&self) -> Result<(), MemoryError> {
        super::region::check_kind(self)
    }
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or an end beyond the address space.
    #[error("memory region at gpa {gpa:#x} has an impossible size {size:#x}")]
    Size {
        /// Guest physical address.
        gpa: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Two regions share guest physical or front-end addresses.
    #[error("memory regions at gpa {first:#x} and gpa {second:#x} overlap")]
    Overlap {
        /// Guest physical address of one region.
        first: u64,
        /// Guest physical address of the other.
        second: u64,
    },
    /// The file behind the region ends before the region does.
    #[error(
        "memory region at gpa {gpa:#x} (offset {offset:#x}, size {size:#x}) is beyond its file of \
         {file:#x} bytes"
    )]
    BeyondFile {
        /// Guest physical address.
        gpa: u64,
        /// Size in bytes.
        size: u64,
        /// Offset in the file.
        offset: u64,
        /// Bytes in the file.
        file: u64,
    },
    /// The file behind the region is not kept in memory.
    #[error(
        "memory region at gpa {gpa:#x} is a file on {file_system}, which may wait for a disk when \
         it is touched: it takes a memfd, a file on tmpfs or hugetlbfs, or memory_files = true"
    )]
    OnDisk {
        /// Guest physical address.
        gpa: u64,
        /// The kind of file system, or its number where we have no name for it.
        file_system: String,
    },
    /// `mmap` or a system call around it failed.
    #[error("memory region at gpa {gpa:#x} can't be mapped: {source}")]
    Map {
        /// Guest physical address.
        gpa: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A region to be removed is not in the table.
    #[error("no memory region at gpa {gpa:#x} of {size:#x} bytes (front-end address {uva:#x})")]
    Unknown {
        /// Guest physical address.
        gpa: u64,
        /// Size in bytes.
        size: u64,
        /// Front-end address.
        uva: u64,
    },
    /// A virtqueue area is not inside one region.
    #[error("no memory region holds the {len} bytes at front-end address {uva:#x}")]
    Unmapped {
        /// Front-end address.
        uva: u64,
        /// Length in bytes.
        len: usize,
    },
    /// A virtqueue area is not aligned as VIRTIO 1.3 §2.7 and §2.8.10.1 ask.
    #[error("front-end address {uva:#x} is not a multiple of {align}")]
    Unaligned {
        /// Front-end address.
        uva: u64,
        /// Alignment in bytes.
        align: usize,
    },
}

/// What a buffer is translated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// We read it.
    Read,
    /// We write it.
    Write,
}

/// Why an address was not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Translate {
    /// Some byte is in no region.
    Unmapped,
    /// The translation is not known yet and has been asked for (an IOMMU in front of the device);
    /// the same call succeeds later.
    Miss {
        /// The I/O virtual address.
        iova: u64,
        /// What it is wanted for.
        access: Access,
    },
    /// The list of segments is full.
    Full,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    gpa: u64,
    len: u64,
    uva: u64,
    hva: *mut u8,
}

impl Region {
    /// `len` bytes at `addr`, an address in this region, if there is one and all are in it.
    #[inline(always)]
    fn segment(&self, addr: u64, len: u32) -> Option<Segment> {
        let (offset, len) = (addr - self.gpa, u64::from(len));
        if len == 0 || len > self.len - offset {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "offsets of a mapping fit usize"
        )]
        Some(Segment::new(
            self.hva.wrapping_add(offset as usize),
            len as usize,
        ))
    }
}

/// One memory table as sent by the front-end.
#[derive(Debug)]
pub struct GuestRam {
    /// Sorted by guest physical address, without overlap.
    regions: Box<[Region]>,
    /// In the order of `regions`: what keeps `hva` valid, and what a new table may take over.
    keep: Vec<(Arc<Mapping>, RegionSpec)>,
    /// Addresses whose translation was asked for and has not come: empty as long as no IOMMU
    /// stands in front of the device.
    asked_for: Box<[core::ops::Range<u64>]>,
}

// SAFETY: `hva` points into a mapping that `keep` holds; all access to it goes through `Area`,
// `Segment` and `copy`, which tolerate concurrent change.
unsafe impl Send for GuestRam {}
// SAFETY: as above; the table itself never changes after it is built.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// A table without any region: what a session begins with.
    pub fn empty() -> GuestRam {
        GuestRam {
            regions: Box::default(),
            keep: Vec::new(),
            asked_for: Box::default(),
        }
    }

    /// Maps a whole table (SET_MEM_TABLE). Mappings of `old` that are asked for again are kept.
    ///
    /// # Errors
    /// [`MemoryError`] names the first region that can't be used; nothing stays mapped then.
    pub fn map(specs: Vec<RegionSpec>, old: Option<&GuestRam>) -> Result<GuestRam, MemoryError> {
        let mut specs = specs;
        specs.sort_by_key(|spec| spec.gpa);
        check_layout(&specs)?;
        let old: Vec<_> = old
            .iter()
            .flat_map(|r| r.keep.iter().map(|k| Arc::clone(&k.0)))
            .collect();
        let keep = specs
            .into_iter()
            .map(|spec| Ok((map_or_keep(&spec, &old)?, spec)))
            .collect::<Result<Vec<_>, MemoryError>>()?;
        Ok(GuestRam::from_kept(keep))
    }

    fn from_kept(keep: Vec<(Arc<Mapping>, RegionSpec)>) -> GuestRam {
        let region = |(mapping, spec): &(Arc<Mapping>, RegionSpec)| Region {
            gpa: spec.gpa,
            len: spec.size,
            uva: spec.uva,
            hva: mapping.base(),
        };
        GuestRam {
            regions: keep.iter().map(region).collect(),
            keep,
            asked_for: Box::default(),
        }
    }

    /// This table and one region more (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestRam::map`].
    pub fn with_region(&self, spec: RegionSpec) -> Result<GuestRam, MemoryError> {
        let mut specs = self.specs();
        specs.push(spec);
        GuestRam::map(specs, Some(self))
    }

    /// This table without the region that `gpa`, `size` and `uva` name (REM_MEM_REG).
    ///
    /// # Errors
    /// [`MemoryError::Unknown`] when there is no such region.
    pub fn without_region(&self, gpa: u64, size: u64, uva: u64) -> Result<GuestRam, MemoryError> {
        let mut specs = self.specs();
        let at = specs
            .iter()
            .position(|s| (s.gpa, s.size, s.uva) == (gpa, size, uva))
            .ok_or(MemoryError::Unknown { gpa, size, uva })?;
        specs.remove(at);
        GuestRam::map(specs, Some(self))
    }

    /// The descriptions, in the order of guest physical addresses.
    pub fn specs(&self) -> Vec<RegionSpec> {
        self.keep.iter().map(|(_, spec)| spec.clone()).collect()
    }

    /// Whether the very same region is in the table: addresses, size, and bytes of the same file.
    pub fn holds(&self, spec: &RegionSpec) -> bool {
        self.keep
            .iter()
            .any(|(mapping, kept)| kept.info() == spec.info() && mapping.serves(spec))
    }

    /// `socket`, the front-end's, is shut down when the file of a region turns out to be shorter
    /// than it was, or did before; until this is called with none.
    pub fn ends(&self, socket: Option<BorrowedFd<'_>>) {
        for (mapping, _) in &self.keep {
            mapping.ends(socket);
        }
    }

    /// A region whose file was shorter than it had been when it was touched, if there is one.
    pub fn torn(&self) -> Option<RegionInfo> {
        let torn = self.keep.iter().find(|(mapping, _)| mapping.is_torn());
        torn.map(|(_, spec)| spec.info())
    }

    /// All of it, as one segment per region.
    pub fn memory(&self) -> Vec<Segment> {
        let segment = |region: &Region| {
            let len = usize::try_from(region.len).expect("it is mapped");
            Segment::new(region.hva, len)
        };
        self.regions.iter().map(segment).collect()
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there is no region at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Translates a guest buffer of `len` bytes at `addr` and appends its segments to `out`: one,
    /// or several when it spans adjacent regions. A buffer of no bytes adds none.
    ///
    /// # Errors
    /// [`Translate`]; segments appended before the error are left to the caller to truncate.
    #[inline]
    pub fn translate(
        &self,
        addr: u64,
        len: u32,
        access: Access,
        out: &mut Segments,
    ) -> Result<(), Translate> {
        let len = u64::from(len);
        if let Some(region) = self.region_of(addr) {
            let offset = addr - region.gpa;
            if len <= region.len - offset {
                return push(out, region, offset, len);
            }
        }
        self.translate_spanning(addr, len, access, out)
    }

    /// Translates guest buffers that lie in one region and have a byte at least, looking first into
    /// the region of the address before.
    #[inline(always)]
    pub fn finder(&self) -> impl FnMut(u64, u32) -> Option<Segment> {
        let mut last = self.regions.first().copied();
        move |addr, len| {
            let mut region = last?;
            if addr.wrapping_sub(region.gpa) >= region.len {
                region = *self.region_of(addr)?;
                last = Some(region);
            }
            region.segment(addr, len)
        }
    }

    #[cold]
    fn translate_spanning(
        &self,
        mut addr: u64,
        mut len: u64,
        access: Access,
        out: &mut Segments,
    ) -> Result<(), Translate> {
        while len > 0 {
            let Some(region) = self.region_of(addr) else {
                let asked = self.asked_for.iter().any(|range| range.contains(&addr));
                let miss = Translate::Miss { iova: addr, access };
                return Err(if asked { miss } else { Translate::Unmapped });
            };
            let offset = addr - region.gpa;
            let here = len.min(region.len - offset);
            push(out, region, offset, here)?;
            len -= here;
            addr = addr.checked_add(here).ok_or(Translate::Unmapped)?;
        }
        Ok(())
    }

    #[inline]
    fn region_of(&self, addr: u64) -> Option<&Region> {
        if self.regions.len() <= LINEAR_REGIONS_MAX {
            return self
                .regions
                .iter()
                .find(|r| addr.wrapping_sub(r.gpa) < r.len);
        }
        let after = self.regions.partition_point(|r| r.gpa <= addr);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (addr - region.gpa < region.len).then_some(region)
    }

    /// One 16-byte entry of an indirect table at guest address `addr`, read once, as two
    /// little-endian words. `None` when some byte is unmapped.
    #[inline]
    pub fn read_entry(&self, addr: u64) -> Option<[u64; 2]> {
        #[cfg(fuzzing)]
        super::meddle::before_read();
        let region = self.region_of(addr)?;
        let offset = addr - region.gpa;
        if region.len - offset < 16 {
            return self.read_entry_spanning(addr);
        }
        // `offset` fits: the region is mapped, so its length is below usize::MAX.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "offsets of a mapping fit usize"
        )]
        let at = region.hva.wrapping_add(offset as usize).cast::<u64>();
        if !at.is_aligned() {
            // No driver of ours has such tables, though nothing forbids them.
            return self.read_entry_spanning(addr);
        }
        let words = [at, at.wrapping_add(1)].map(|at| {
            // SAFETY: the 16 bytes lie inside the region's mapping (checked above), which `keep`
            // holds, and are aligned. The guest may change them: each word is read once.
            unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Relaxed)
        });
        Some(words.map(u64::from_le))
    }

    #[cold]
    fn read_entry_spanning(&self, addr: u64) -> Option<[u64; 2]> {
        let mut bytes = [0u8; 16];
        let mut rest = bytes.as_mut_slice();
        let mut at = addr;
        while !rest.is_empty() {
            let region = self.region_of(at)?;
            let left = u32::try_from(region.len - (at - region.gpa)).unwrap_or(u32::MAX);
            let here = left.min(u32::try_from(rest.len()).ok()?);
            let (now, later) = rest.split_at_mut(here as usize);
            super::copy::read(&[region.segment(at, here)?], 0, now);
            at = at.checked_add(u64::from(here))?;
            rest = later;
        }
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[at + i]));
        Some([word(0), word(8)])
    }

    /// The virtqueue area of `len` bytes at front-end address `uva`, which must lie inside one
    /// region and be a multiple of `align`.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] or [`MemoryError::Unaligned`].
    pub fn area(self: &Arc<Self>, uva: u64, len: usize, align: usize) -> Result<Area, MemoryError> {
        let wanted = len as u64;
        let inside = |r: &&Region| {
            let offset = uva.wrapping_sub(r.uva);
            offset < r.len && wanted <= r.len - offset
        };
        let region = self
            .regions
            .iter()
            .find(inside)
            .ok_or(MemoryError::Unmapped { uva, len })?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "offsets of a mapping fit usize"
        )]
        let base = region.hva.wrapping_add((uva - region.uva) as usize);
        if !base.addr().is_multiple_of(align) {
            return Err(MemoryError::Unaligned { uva, align });
        }
        Ok(Area::new(base, len, Arc::clone(self)))
    }

    /// Guest physical address of a segment that this table translated.
    pub fn gpa_of(&self, segment: &Segment) -> Option<u64> {
        let at = segment.base().addr() as u64;
        self.regions.iter().find_map(|r| {
            let offset = at.wrapping_sub(r.hva.addr() as u64);
            (offset < r.len).then(|| r.gpa + offset)
        })
    }

    /// Memory of its own for (gpa, bytes) pairs, front-end address = gpa + 2^40: for tests, benches
    /// and fuzzing, where there is no front-end.
    ///
    /// # Panics
    /// When the kernel has no memory to give.
    #[cfg(any(test, fuzzing, feature = "testing"))]
    pub fn for_test(regions: &[(u64, u64)]) -> Arc<GuestRam> {
        let spec = |&(gpa, size): &(u64, u64)| RegionSpec {
            gpa,
            size,
            uva: gpa + (1 << 40),
            mmap_offset: 0,
            file: Arc::new(super::region::memfd(size).expect("a memfd")),
        };
        let ram = GuestRam::map(regions.iter().map(spec).collect(), None);
        Arc::new(ram.expect("test regions are valid"))
    }

    /// The same table, in which the translation of `addresses` has been asked for.
    ///
    /// # Panics
    /// When somebody else holds the table already.
    #[cfg(any(test, fuzzing, feature = "testing"))]
    pub fn asking_for(mut self: Arc<Self>, addresses: core::ops::Range<u64>) -> Arc<GuestRam> {
        let ram = Arc::get_mut(&mut self).expect("nobody else holds the table yet");
        ram.asked_for = Box::new([addresses]);
        self
    }
}

#[inline]
fn push(out: &mut Segments, region: &Region, offset: u64, len: u64) -> Result<(), Translate> {
    if len == 0 {
        return Ok(());
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "offsets of a mapping fit usize"
    )]
    let segment = Segment::new(region.hva.wrapping_add(offset as usize), len as usize);
    if out.push(segment) {
        Ok(())
    } else {
        Err(Translate::Full)
    }
}

/// Sizes and overlaps; `specs` is sorted by guest physical address.
fn check_layout(specs: &[RegionSpec]) -> Result<(), MemoryError> {
    for spec in specs {
        let fits = |start: u64| start.checked_add(spec.size).is_some();
        if spec.size == 0 || !fits(spec.gpa) || !fits(spec.uva) || !fits(spec.mmap_offset) {
            return Err(MemoryError::Size {
                gpa: spec.gpa,
                size: spec.size,
            });
        }
    }
    let mut by_uva: Vec<_> = specs.iter().collect();
    by_uva.sort_by_key(|spec| spec.uva);
    let by_gpa = specs
        .windows(2)
        .find(|w| w[0].gpa + w[0].size > w[1].gpa)
        .map(|w| (&w[0], &w[1]));
    let by_uva = by_uva
        .windows(2)
        .find(|w| w[0].uva + w[0].size > w[1].uva)
        .map(|w| (w[0], w[1]));
    match by_gpa.or(by_uva) {
        Some((a, b)) => Err(MemoryError::Overlap {
            first: a.gpa,
            second: b.gpa,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
