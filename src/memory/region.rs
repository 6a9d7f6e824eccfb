//! One mapped region of guest memory: the checks before `mmap`, and the mapping itself.
//!
//! A front-end is not trusted with sizes: mapping past the end of a file succeeds and turns into a
//! SIGBUS on first use, so each region is checked against its file first. A file that becomes
//! shorter later costs its own front-end the session, and nobody else anything (`torn`).

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::ram::{MemoryError, RegionSpec};
use super::torn::{self, Watched};

/// A mapping that lives as long as any table that uses it.
#[derive(Debug)]
pub(super) struct Mapping {
    map: MmapRegion<()>,
    /// Bytes between the start of the mapping and the region: the file offset was aligned down.
    lead: usize,
    /// Identity of the file, so that an unchanged region is recognised in a new table.
    identity: (u64, u64),
    watched: &'static Watched,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before it is unmapped.
        self.watched.forget();
    }
}

impl Mapping {
    /// Checks `spec` and maps it. With an `old` mapping of the same bytes of the same file, that
    /// mapping is kept.
    pub(super) fn new(spec: &RegionSpec) -> Result<Mapping, MemoryError> {
        let stat = fstat(&spec.file).map_err(|source| MemoryError::Map {
            gpa: spec.gpa,
            source,
        })?;
        check_against_file(spec, &stat)?;
        let page = page_bytes(&spec.file);
        let lead = spec.mmap_offset % page;
        let offset = spec.mmap_offset - lead;
        let too_big = || MemoryError::Size {
            gpa: spec.gpa,
            size: spec.size,
        };
        // The length of a hugetlbfs mapping must be whole pages; munmap would fail otherwise.
        let bytes = (spec.size + lead)
            .checked_next_multiple_of(page)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(too_big)?;
        let file = spec.file.try_clone().map_err(|source| MemoryError::Map {
            gpa: spec.gpa,
            source,
        })?;
        let map = MmapRegionBuilder::new(bytes)
            .with_file_offset(FileOffset::new(file, offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| MemoryError::Map {
                gpa: spec.gpa,
                source: std::io::Error::other(error.to_string()),
            })?;
        // SAFETY: the range is the mapping just made. Guest RAM is no use in a core dump of ours.
        unsafe { libc::madvise(map.as_ptr().cast(), bytes, libc::MADV_DONTDUMP) };
        let lead = usize::try_from(lead).map_err(|_| too_big())?;
        let page = usize::try_from(page).map_err(|_| too_big())?;
        Ok(Mapping {
            watched: torn::watch(map.as_ptr(), bytes, page),
            map,
            lead,
            identity: (stat.st_dev, stat.st_ino),
        })
    }

    /// Address of the region's first byte.
    pub(super) fn base(&self) -> *mut u8 {
        self.map.as_ptr().wrapping_add(self.lead)
    }

    /// Whether pages of the file were missing when they were touched: zeros are in their place.
    pub(super) fn is_torn(&self) -> bool {
        self.watched.is_torn()
    }

    /// `socket` is shut down when a page is missing, or was; until this is called with none.
    pub(super) fn ends(&self, socket: Option<BorrowedFd<'_>>) {
        self.watched.ends(socket);
    }

    /// Whether this mapping already shows the bytes that `spec` asks for.
    pub(super) fn serves(&self, spec: &RegionSpec) -> bool {
        if self.is_torn() {
            return false;
        }
        let same_file = fstat(&spec.file).is_ok_and(|s| (s.st_dev, s.st_ino) == self.identity);
        let offset = self.map.file_offset().map(|f| f.start() + self.lead as u64);
        same_file
            && offset == Some(spec.mmap_offset)
            && (self.map.size() - self.lead) as u64 >= spec.size
    }
}

/// A file in memory of `bytes` zero bytes.
#[cfg(any(test, fuzzing, feature = "testing"))]
///
/// # Errors
/// When the kernel has none to give.
pub fn memfd(bytes: u64) -> std::io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string; the call has no other argument in memory.
    let fd = unsafe { libc::memfd_create(c"vringd-test".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the fd was just made and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

/// Finds the mapping for `spec` among `old`, or makes one.
pub(super) fn map_or_keep(
    spec: &RegionSpec,
    old: &[Arc<Mapping>],
) -> Result<Arc<Mapping>, MemoryError> {
    match old.iter().find(|mapping| mapping.serves(spec)) {
        // The file may have been truncated since it was mapped.
        Some(kept) => {
            let stat = fstat(&spec.file).map_err(|source| MemoryError::Map {
                gpa: spec.gpa,
                source,
            })?;
            check_against_file(spec, &stat)?;
            Ok(Arc::clone(kept))
        }
        None => Mapping::new(spec).map(Arc::new),
    }
}

/// Regular files must cover the region; a char device such as devdax has size 0 and is accepted.
fn check_against_file(spec: &RegionSpec, stat: &libc::stat) -> Result<(), MemoryError> {
    let kind = stat.st_mode & libc::S_IFMT;
    if kind == libc::S_IFCHR {
        return Ok(());
    }
    let end = spec.mmap_offset.checked_add(spec.size);
    let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    match end {
        Some(end) if kind == libc::S_IFREG && end <= file_bytes => Ok(()),
        _ => Err(MemoryError::BeyondFile {
            gpa: spec.gpa,
            size: spec.size,
            offset: spec.mmap_offset,
            file: file_bytes,
        }),
    }
}

/// File systems whose files have their pages in memory and nowhere else, but for swap.
const IN_MEMORY: [i64; 2] = [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC];

/// Others that a front-end might have a file on.
const KNOWN: [(i64, &str); 6] = [
    (libc::EXT4_SUPER_MAGIC, "ext4"),
    (libc::XFS_SUPER_MAGIC, "xfs"),
    (libc::BTRFS_SUPER_MAGIC, "btrfs"),
    (libc::NFS_SUPER_MAGIC, "nfs"),
    (libc::OVERLAYFS_SUPER_MAGIC, "overlay"),
    (libc::FUSE_SUPER_MAGIC, "fuse"),
];

/// Refuses a regular file whose pages may have to be read from somewhere. A character device has no
/// such pages; what is neither can't be mapped at all, which [`check_against_file`] says.
pub(super) fn check_kind(spec: &RegionSpec) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::Map {
        gpa: spec.gpa,
        source,
    };
    let kind = fstat(&spec.file).map_err(failed)?.st_mode & libc::S_IFMT;
    let on = fstatfs(&spec.file).map_err(failed)?.f_type;
    if kind != libc::S_IFREG || IN_MEMORY.contains(&on) {
        return Ok(());
    }
    let known = KNOWN.iter().find(|(magic, _)| *magic == on);
    let file_system = match known {
        Some((_, name)) => (*name).to_owned(),
        None => format!("a file system of type {on:#x}"),
    };
    Err(MemoryError::OnDisk {
        gpa: spec.gpa,
        file_system,
    })
}

fn fstatfs(file: &File) -> std::io::Result<libc::statfs> {
    // SAFETY: all-zero bytes are a valid `statfs`.
    let mut stat: libc::statfs = unsafe { core::mem::zeroed() };
    // SAFETY: the fd is open for the whole call and `stat` is writable.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(stat)
}

fn fstat(file: &File) -> std::io::Result<libc::stat> {
    // SAFETY: all-zero bytes are a valid `stat`.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    // SAFETY: the fd is open for the whole call and `stat` is writable.
    if unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(stat)
}

/// Page size of the file system below `file`: 2 MiB or 1 GiB on hugetlbfs, else the base page.
fn page_bytes(file: &File) -> u64 {
    const BASE_PAGE: u64 = 4096;
    let huge = fstatfs(file).ok();
    let huge = huge.filter(|stat| stat.f_type == libc::HUGETLBFS_MAGIC);
    huge.and_then(|stat| u64::try_from(stat.f_bsize).ok())
        .filter(|page| page.is_power_of_two())
        .unwrap_or(BASE_PAGE)
}
