//! Files and block devices as disks: how they are opened, how large they are, what direct I/O asks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::FileMap;

use super::lock::{LockError, lock};
use super::uring::probe_iopoll;
use super::witness::Witness;

/// What a witness is needed for, and how it does that.
const ASK: &str = "ask what the page cache lost, by /proc/self/fd and sync_file_range(2)";

/// What direct I/O may ask of buffers and offsets, to be tried where the kernel doesn't say.
const ALIGNS: [u32; 2] = [512, 4096];

// linux/fs.h; not in libc.
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKIOMIN: libc::Ioctl = 0x1278;
const BLKIOOPT: libc::Ioctl = 0x1279;
const BLKALIGNOFF: libc::Ioctl = 0x127a;
const BLKPBSZGET: libc::Ioctl = 0x127b;

/// Why a disk can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("path = {path:?}: {reason}")]
pub struct DiskError {
    /// The path as configured.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: DiskReason,
}

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskReason {
    /// A system call failed.
    #[error("{doing}: {error}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("neither a file nor a block device")]
    Kind,
    /// The size is no multiple of the block size.
    #[error("{bytes} bytes are no multiple of the block size {block_size}")]
    Size {
        /// Size in bytes.
        bytes: u64,
        /// Logical block size in bytes.
        block_size: u32,
    },
    /// Somebody else uses it.
    #[error("{0} (lock = \"off\" does without locks)")]
    Locked(LockError),
    /// It is no qcow2 image that we can serve.
    #[error("{0}")]
    Image(String),
    /// There is nothing in it.
    #[error("the file is empty")]
    Empty,
    /// `direct = true`, and the file system has no direct I/O.
    #[error("direct = true: the file system has no direct I/O: {0}")]
    NoDirect(io::Error),
}

/// How a disk is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// For reading only.
    pub read_only: bool,
    /// Direct I/O: always, never, or where the file system allows it.
    pub direct: Option<bool>,
    /// Logical block size in bytes that the guest will see.
    pub block_size: u32,
    /// Keep other users of the image away, as QEMU does.
    pub lock: bool,
}

/// What a disk asks of io_uring beside the usual.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoOptions {
    /// The device is polled for completions.
    pub iopoll: bool,
    /// A thread of the kernel takes what the workers of this disk queue.
    pub sqpoll: bool,
    /// Guest memory is registered, and pinned with that.
    pub fixed_buffers: bool,
}

/// An open disk.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    /// Has the locks. Not what is given to the io_uring, which may keep a file for a moment after
    /// the daemon has gone.
    _locked: Option<File>,
    /// The page cache is bypassed.
    direct: bool,
    in_memory: bool,
    /// Of a file in memory that is a disk by itself.
    map: Option<FileMap>,
    bytes: u64,
    mem_align: u32,
    offset_align: u32,
    topology: DiskTopology,
    io: IoOptions,
    path: PathBuf,
    /// Data were lost, or a sync has failed.
    sync_failed: AtomicBool,
    /// What is written goes to the page cache, and from there to a device.
    is_cached: bool,
}

impl DiskFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`DiskError`] names the path and the reason.
    pub fn open(path: &Path, options: DiskOptions) -> Result<DiskFile, DiskError> {
        let mut disk = DiskFile::open_image(path, options)?;
        let (bytes, block_size) = (disk.bytes, options.block_size);
        let reason = match bytes {
            0 => DiskReason::Empty,
            _ if !bytes.is_multiple_of(block_size.into()) => DiskReason::Size { bytes, block_size },
            _ => {
                disk.map_in_memory(!options.read_only);
                return Ok(disk);
            }
        };
        let path = path.to_owned();
        Err(DiskError { path, reason })
    }

    fn map_in_memory(&mut self, writable: bool) {
        let map = || FileMap::new(&self.file, self.bytes, writable);
        let map = self.in_memory.then(map).transpose();
        self.map = map.unwrap_or_else(|error| {
            tracing::info!(
                "{:?}: not mapped ({error}): read and written by calls",
                self.path
            );
            None
        });
    }

    /// Opens `path`, whose own size is not the size of a disk.
    ///
    /// # Errors
    /// [`DiskError`] names the path and the reason.
    pub fn open_image(path: &Path, options: DiskOptions) -> Result<DiskFile, DiskError> {
        let named = |reason| DiskError {
            path: path.to_owned(),
            reason,
        };
        let failed = |doing| move |error| DiskReason::Failed { doing, error };
        let plain = open(path, options.read_only, 0)
            .map_err(failed("open"))
            .map_err(named)?;
        let metadata = plain.metadata().map_err(failed("stat")).map_err(named)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(named(DiskReason::Kind));
        }
        let locked = options.lock.then(|| locked(path, options.read_only));
        let locked = locked.transpose().map_err(named)?.flatten();
        let bytes = end_of(&plain).map_err(failed("size")).map_err(named)?;
        let in_memory = kind.is_file() && is_in_memory(&plain);
        let (file, alignment) = match options.direct {
            Some(false) => (plain, None),
            // It takes the flag, and does the same with it.
            None if in_memory => (plain, None),
            wanted => match open_direct(path, options) {
                Ok((direct, alignment)) => (direct, Some(alignment)),
                Err(error) if wanted == Some(true) => {
                    return Err(named(DiskReason::NoDirect(error)));
                }
                Err(error) => {
                    tracing::info!("{path:?}: no direct I/O here ({error}): using the page cache");
                    (plain, None)
                }
            },
        };
        let is_cached = alignment.is_none() && !in_memory && !options.read_only;
        if is_cached {
            // So that what lacks is known before there is a guest.
            let asked = Witness::of(&file).map_err(failed(ASK));
            drop(asked.map_err(named)?);
        }
        let block = kind.is_block_device();
        let told = block.then(|| DiskTopology::block_device(&file)).flatten();
        let topology = told.unwrap_or_else(|| DiskTopology::file(metadata.blksize()));
        let direct = alignment.is_some();
        let (mem_align, offset_align) = alignment.unwrap_or((1, 1));
        Ok(DiskFile {
            file,
            _locked: locked,
            direct,
            in_memory,
            map: None,
            bytes,
            mem_align,
            offset_align,
            topology,
            io: IoOptions::default(),
            path: path.to_owned(),
            sync_failed: AtomicBool::new(false),
            is_cached,
        })
    }

    /// A witness for whoever makes data durable; `None` where the page cache is not written to.
    ///
    /// # Errors
    /// What the system said.
    pub fn witness(&self) -> io::Result<Option<Witness>> {
        let witness = self.is_cached.then(|| Witness::of(&self.file)).transpose();
        witness.map_err(|error| io::Error::other(format!("{ASK}: {error}")))
    }

    /// Asks `witness`, before it is said that data are durable.
    pub fn heed(&self, witness: Option<&Witness>) {
        if let Some(Err(errno)) = witness.map(Witness::ask) {
            self.lost(errno);
        }
    }

    /// Data in the page cache are lost: every sync and every durable write fails from now on. The
    /// kernel tells once of data that it could not write, and then takes them for written.
    #[cold]
    fn lost(&self, errno: i32) {
        if !self.sync_failed.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "{:?}: data in the page cache could not be written ({}): every flush fails \
                     from now on, until the daemon is started again",
                self.path,
                io::Error::from_raw_os_error(errno)
            );
        }
    }

    /// What a sync that ended like this came to.
    ///
    /// # Errors
    /// EIO once one has failed, whatever the reason was; of a disk not in the page cache, the error
    /// number of this one.
    pub fn synced(&self, result: Result<u32, i32>) -> Result<u32, i32> {
        if self.direct {
            return result;
        }
        if let Err(errno) = result
            && !matches!(errno, libc::EINTR | libc::EAGAIN)
        {
            self.lost(errno);
        }
        match self.sync_failed.load(Ordering::Relaxed) {
            true => Err(libc::EIO),
            false => result,
        }
    }

    /// What a durable write that ended like this came to. It ends with a sync: see
    /// [`DiskFile::synced`]. An error that says something of its own data alone is no news of
    /// others; a queue's witness has told of those.
    ///
    /// # Errors
    /// The error number of this write, and EIO after a sync that failed: none waits for room then.
    pub fn wrote_durably(&self, result: Result<u32, i32>) -> Result<u32, i32> {
        use libc::{EAGAIN, EDQUOT, EFAULT, EFBIG, EINTR, EINVAL, ENOMEM, ENOSPC};
        if self.direct {
            return result;
        }
        let own = [EINTR, EAGAIN, EINVAL, EFAULT, ENOMEM, EFBIG, ENOSPC, EDQUOT];
        match result {
            Err(errno) if own.contains(&errno) && !self.sync_failed.load(Ordering::Relaxed) => {
                result
            }
            _ => self.synced(result),
        }
    }

    /// With as much of `wanted` as this disk can do; a log line tells what it can't.
    #[must_use]
    pub fn with_io(mut self, path: &Path, wanted: IoOptions) -> DiskFile {
        self.io = wanted;
        if wanted.fixed_buffers {
            tracing::warn!(
                "{path:?}: fixed_buffers: guest memory is pinned; a guest that gives memory back \
                 and takes it again (balloon, free page reporting, unplugging) loses what it reads \
                 into it"
            );
        }
        if wanted.iopoll {
            let probed = if !self.direct || self.in_memory {
                Err(io::Error::other("only with direct I/O"))
            } else if queue_limit(&self.file, "io_poll") == Some(0) {
                // Linux 6.1 takes such reads all the same, and
                // whoever waits for them waits for an interrupt without sleeping.
                Err(io::Error::other("the device has no queues to poll"))
            } else {
                probe_iopoll(&self.file)
            };
            if let Err(error) = probed {
                tracing::warn!("{path:?}: iopoll: not here ({error}): interrupts tell instead");
                self.io.iopoll = false;
            }
        }
        self
    }

    /// What is asked of io_uring beside the usual.
    pub fn io(&self) -> IoOptions {
        self.io
    }

    /// Size in bytes when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size in bytes as it is now.
    ///
    /// # Errors
    /// What the system said.
    pub fn bytes_now(&self) -> io::Result<u64> {
        end_of(&self.file)
    }

    /// Whether it is a regular file, and no block device.
    pub fn is_regular(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.is_file())
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether its file system keeps everything in memory.
    #[inline]
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its mapping, where it has one.
    #[inline]
    pub fn map(&self) -> Option<&FileMap> {
        self.map.as_ref()
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What addresses and lengths in memory must be a multiple of, in bytes.
    pub fn mem_align(&self) -> u32 {
        self.mem_align
    }

    /// What offsets and lengths on the disk must be a multiple of, in bytes.
    pub fn offset_align(&self) -> u32 {
        self.offset_align
    }

    /// What is told of the medium.
    pub fn topology(&self) -> &DiskTopology {
        &self.topology
    }
}

/// What a file or block device says of its medium, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskTopology {
    /// What ranges must be a multiple of to be discarded or zeroed by the kernel.
    pub zero_align: u32,
    /// What is written as one; space is given back in such units.
    pub physical_block: u32,
    /// Where the first physical block begins.
    pub offset: u32,
    /// The least I/O that is worth while.
    pub min_io: u32,
    /// The best I/O, or 0.
    pub opt_io: u32,
    /// Space is given back in such units.
    pub discard_align: u32,
    /// The most that is discarded as one, or 0 where nothing is.
    pub discard_max: u64,
}

impl DiskTopology {
    /// Of a file in blocks of `block` bytes.
    fn file(block: u64) -> DiskTopology {
        let block = u32::try_from(block).unwrap_or(0).max(512);
        DiskTopology {
            zero_align: 1,
            physical_block: block,
            offset: 0,
            min_io: block,
            opt_io: 0,
            discard_align: block,
            discard_max: u64::MAX,
        }
    }

    /// Of a block device; `None` when the kernel tells nothing.
    fn block_device(file: &File) -> Option<DiskTopology> {
        let ask = |request| {
            let mut answer: libc::c_int = 0;
            // SAFETY: each of the requests below writes one int, which is there for it.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut answer) };
            u32::try_from(answer).ok().filter(|_| done == 0)
        };
        let zero_align = ask(BLKSSZGET).filter(|bytes| *bytes > 0)?;
        let physical_block = ask(BLKPBSZGET).unwrap_or(0).max(zero_align);
        let granularity = queue_limit(file, "discard_granularity");
        let granularity = granularity.and_then(|bytes| u32::try_from(bytes).ok());
        Some(DiskTopology {
            zero_align,
            physical_block,
            // -1 where partitions are askew.
            offset: ask(BLKALIGNOFF).unwrap_or(0),
            min_io: ask(BLKIOMIN).unwrap_or(0).max(physical_block),
            opt_io: ask(BLKIOOPT).unwrap_or(0),
            discard_align: granularity.unwrap_or(0).max(physical_block),
            // Where nothing is told, the device itself will.
            discard_max: queue_limit(file, "discard_max_bytes").unwrap_or(u64::MAX),
        })
    }
}

/// What sysfs says of the queue of a block device, or of the device that it is a partition of; of
/// the one below its file system for any other file.
fn queue_limit(file: &File, name: &str) -> Option<u64> {
    let found = file.metadata().ok()?;
    let device = match found.file_type().is_block_device() {
        true => found.rdev(),
        false => found.dev(),
    };
    let (major, minor) = (libc::major(device), libc::minor(device));
    let queue = |up| format!("/sys/dev/block/{major}:{minor}/{up}queue/{name}");
    let text = fs::read_to_string(queue("")).or_else(|_| fs::read_to_string(queue("../")));
    text.ok()?.trim().parse().ok()
}

fn open(path: &Path, read_only: bool, flags: libc::c_int) -> io::Result<File> {
    let flags = flags | libc::O_CLOEXEC;
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(path)
}

/// Whether the file system of `file` keeps everything in memory (tmpfs, ramfs).
fn is_in_memory(file: &File) -> bool {
    // Of linux/magic.h; not in libc.
    const RAMFS_MAGIC: u32 = 0x8584_58f6;
    // SAFETY: all-zero bytes are a valid `statfs`.
    let mut stat: libc::statfs = unsafe { core::mem::zeroed() };
    // SAFETY: `stat` is writable.
    let answer = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) };
    let magic = u32::try_from(stat.f_type).unwrap_or(0);
    let tmpfs = u32::try_from(libc::TMPFS_MAGIC).unwrap_or(0);
    answer == 0 && (magic == tmpfs || magic == RAMFS_MAGIC)
}

/// Another handle of the file, with locks; `None` where the file system has none.
fn locked(path: &Path, read_only: bool) -> Result<Option<File>, DiskReason> {
    let doing = "open";
    let file = open(path, read_only, 0).map_err(|error| DiskReason::Failed { doing, error })?;
    match lock(&file, !read_only) {
        Ok(()) => Ok(Some(file)),
        Err(LockError::None(error)) => {
            tracing::info!("{path:?}: no locks here ({error}): other users are not kept away");
            Ok(None)
        }
        Err(error) => Err(DiskReason::Locked(error)),
    }
}

/// The file without the page cache, and what that asks of memory and offsets.
fn open_direct(path: &Path, options: DiskOptions) -> io::Result<(File, (u32, u32))> {
    let file = open(path, options.read_only, libc::O_DIRECT)?;
    let (memory, offset) = direct_io_align(&file)?;
    if offset > options.block_size {
        let block_size = options.block_size;
        return Err(io::Error::other(format!(
            "it wants offsets aligned to {offset}, block_size is {block_size}"
        )));
    }
    Ok((file, (memory, offset)))
}

/// Where the file ends: right for block devices too, whose `stat` says 0.
fn end_of(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    (&*file).seek(SeekFrom::End(0))
}

/// Alignment of memory and offsets for direct I/O: what the kernel says, or else what it takes.
fn direct_io_align(file: &File) -> io::Result<(u32, u32)> {
    match told_align(file) {
        // Opening with O_DIRECT succeeds, and the page cache is used all the same.
        Some((_, 0)) => Err(io::Error::other("the kernel says that this file has none")),
        Some(alignment) => Ok(alignment),
        None => probe_align(file),
    }
}

/// What statx(2) tells of direct I/O, since Linux 6.1 and on some file systems only; zeros where
/// the file has none.
fn told_align(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all-zero bytes are a valid `statx`.
    let mut stat: libc::statx = unsafe { core::mem::zeroed() };
    // SAFETY: the path is an empty C string, `stat` is writable.
    let answer = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    let known = answer == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    known.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// The smallest alignment with which `file` can be read, as an address and as an offset.
fn probe_align(file: &File) -> io::Result<(u32, u32)> {
    let mut bytes = vec![0u8; 3 * ALIGNS[1] as usize];
    let page = bytes.as_ptr().align_offset(ALIGNS[1] as usize);
    let mut refused = None;
    for align in ALIGNS {
        // Aligned to this and to nothing more, unless it is the last.
        let from = page + align as usize;
        let buffer = &mut bytes[from..from + align as usize];
        match file.read_at(buffer, u64::from(align)) {
            Ok(_) => return Ok((align, align)),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::InvalidInput.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    const OPTIONS: DiskOptions = DiskOptions {
        read_only: false,
        direct: None,
        block_size: 512,
        lock: true,
    };

    #[test]
    fn what_can_not_be_a_disk_is_refused_by_name() {
        let missing = DiskFile::open(Path::new("/no/such/disk"), OPTIONS).unwrap_err();
        assert!(missing.to_string().contains("/no/such/disk"), "{missing}");
        let directory = DiskFile::open(Path::new("/dev/zero"), OPTIONS).unwrap_err();
        assert!(matches!(directory.reason, DiskReason::Kind), "{directory}");
        let file = TempFile::new().unwrap();
        let empty = DiskFile::open(file.as_path(), OPTIONS).unwrap_err();
        assert!(matches!(empty.reason, DiskReason::Empty), "{empty}");
        file.as_file().set_len(1000).unwrap();
        let odd = DiskFile::open(file.as_path(), OPTIONS).unwrap_err();
        assert!(odd.to_string().contains("1000"), "{odd}");
    }

    #[test]
    fn a_file_has_its_size_and_alignment() {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = DiskFile::open(file.as_path(), OPTIONS).unwrap();
        assert_eq!(disk.bytes(), 1 << 20);
        file.as_file().set_len(3 << 20).unwrap();
        assert_eq!(disk.bytes_now().unwrap(), 3 << 20);
        file.as_file().set_len(1 << 20).unwrap();
        assert!(disk.is_regular());
        assert_eq!(
            disk.is_direct(),
            disk.mem_align() > 1 || disk.offset_align() > 1
        );
        let plain = DiskOptions {
            direct: Some(false),
            lock: false,
            ..OPTIONS
        };
        assert!(!DiskFile::open(file.as_path(), plain).unwrap().is_direct());
        let topology = *disk.topology();
        assert_eq!((topology.zero_align, topology.physical_block), (1, 4096));
    }

    #[test]
    fn a_probe_finds_what_the_kernel_tells() {
        let file = TempFile::new_in(Path::new("/var/tmp")).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let Ok(direct) = open(file.as_path(), false, libc::O_DIRECT) else {
            // Nothing to probe for: then there is nothing told either.
            assert!(!DiskFile::open(file.as_path(), OPTIONS).unwrap().is_direct());
            return;
        };
        let (memory, offset) = probe_align(&direct).unwrap();
        assert!(ALIGNS.contains(&memory) && memory == offset);
        if let Some((told_memory, told_offset)) = told_align(&direct).filter(|told| told.1 > 0) {
            assert_eq!(offset, told_offset.max(ALIGNS[0]));
            assert!(memory >= told_memory, "told {told_memory}, probed {memory}");
        }
    }

    #[test]
    fn a_probe_reports_why_nothing_can_be_read() {
        let file = TempFile::new().unwrap();
        let write_only = OpenOptions::new().write(true).open(file.as_path()).unwrap();
        assert_eq!(
            probe_align(&write_only).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }
}
