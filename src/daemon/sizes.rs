//! The sizes of disks, and the workers that serve them, which may change while guests use them.
//!
//! A disk's own session thread looks at its medium, when the kernel says that another program has
//! written to the file, or when the main thread asks it to, at SIGHUP. So the size has one writer,
//! and vrings are started, stopped and moved by one thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::config::{BlkBackend, BlkConfig};
use crate::control::session::Medium;
use crate::device::DeviceModel;
use crate::device::blk::BlkModel;
use crate::engine::{Backing, DeviceHandle, Parts};
use crate::memory::Store;
use crate::sys::disk::DiskFile;
use crate::sys::watch::SizeWatch;

/// A disk's size, for the main thread.
#[derive(Debug)]
pub(super) struct Size {
    name: String,
    bell: EventFd,
    memory: Option<Memory>,
}

/// Where there is no file that has a size.
#[derive(Debug, Clone)]
struct Memory {
    bytes: Arc<AtomicU64>,
    store: Option<Arc<Store>>,
}

/// A disk's size, for its session thread.
struct Watched {
    model: Arc<BlkModel>,
    handle: Arc<DeviceHandle>,
    source: Source,
    watch: SizeWatch,
    /// As the log has it.
    last: u64,
}

enum Source {
    File(Arc<DiskFile>),
    Memory(Memory),
}

impl Source {
    fn of(backing: &Backing, bytes: u64) -> Source {
        let memory = |store| {
            let bytes = Arc::new(AtomicU64::new(bytes));
            Source::Memory(Memory { bytes, store })
        };
        match backing {
            Backing::File(file) | Backing::Encrypted(file, _) => Source::File(Arc::clone(file)),
            Backing::Ram(store) => memory(Some(Arc::clone(store))),
            // An image's size is in its header, which nobody else changes while we use it.
            Backing::Null | Backing::Qcow2(_) => memory(None),
        }
    }

    fn bytes(&self) -> io::Result<u64> {
        match self {
            Source::File(file) => file.bytes_now(),
            Source::Memory(memory) => Ok(memory.bytes.load(Ordering::Acquire)),
        }
    }
}

/// Watches the size of a disk; `None` for what is none.
pub(super) fn watch(
    parts: &Parts,
    handle: &Arc<DeviceHandle>,
) -> io::Result<Option<(Size, Box<dyn Medium>)>> {
    let Parts::Blk(model, backing) = parts else {
        return Ok(None);
    };
    let name = model.name().to_owned();
    let last = model.size().end();
    let source = Source::of(backing, last);
    let mut watch = SizeWatch::new()?;
    let mut memory = None;
    match &source {
        Source::File(file) if file.is_regular() => {
            if let Err(error) = watch.follow(file.file()) {
                tracing::info!("blk {name}: another size is seen at SIGHUP only: {error}");
            }
        }
        Source::File(_) => {}
        Source::Memory(it) => memory = Some(it.clone()),
    }
    let bell = watch.bell()?;
    let size = Size { name, bell, memory };
    let medium = Watched {
        model: Arc::clone(model),
        handle: Arc::clone(handle),
        source,
        watch,
        last,
    };
    Ok(Some((size, Box::new(medium))))
}

impl Medium for Watched {
    fn news(&self) -> RawFd {
        self.watch.as_raw_fd()
    }

    fn look(&mut self, in_use: bool) -> bool {
        // Before the look: what changes after it is news again.
        self.watch.clear();
        self.handle.settle();
        let name = self.model.name();
        let bytes = match self.source.bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!("blk {name}: its size can't be told: {error}");
                return false;
            }
        };
        let bytes = bytes - bytes % u64::from(self.model.setup().block_size);
        let before = core::mem::replace(&mut self.last, bytes);
        let changed = self.model.size().set(bytes, in_use);
        let told = self.model.size().told();
        if bytes < told && bytes != before {
            tracing::warn!(
                "blk {name}: its medium has {bytes} bytes now, which were {before}: the guest that \
                 uses it is not told, what it reads and writes beyond that fails"
            );
        } else if bytes != before {
            let what = if bytes > before { "grown" } else { "shrunk" };
            tracing::info!("blk {name}: {what} from {before} to {bytes} bytes");
        }
        changed
    }
}

/// At SIGHUP: `ram:` and `null:` disks take a greater size from the settings `new`, and all look
/// for themselves.
pub(super) fn change(sizes: &[Size], blks: &mut [BlkConfig], new: &[BlkConfig]) {
    for blk in blks {
        let same = new.iter().find(|other| other.name == blk.name);
        let size = sizes.iter().find(|size| size.name == blk.name);
        if let (Some(same), Some(memory)) = (same, size.and_then(|size| size.memory.as_ref())) {
            match resize(memory, &blk.backend, &same.backend) {
                Ok(()) => blk.backend = same.backend.clone(),
                Err(Some(error)) => tracing::error!("blk {}: not resized: {error}", blk.name),
                Err(None) => {}
            }
        }
    }
    for size in sizes {
        if let Err(error) = size.bell.write(1) {
            tracing::error!("blk {}: nobody looks at its size: {error}", size.name);
        }
    }
}

/// Makes a disk in memory as large as the backend `to` says; no error where that is not its
/// business.
fn resize(memory: &Memory, from: &BlkBackend, to: &BlkBackend) -> Result<(), Option<io::Error>> {
    let (old, bytes) = match (from, to) {
        (BlkBackend::Ram(old), BlkBackend::Ram(bytes))
        | (BlkBackend::Null(old), BlkBackend::Null(bytes)) => (*old, *bytes),
        _ => return Err(None),
    };
    if bytes < old {
        let why = format!("{bytes} bytes are less than {old}, and it only grows");
        return Err(Some(io::Error::other(why)));
    }
    if let Some(store) = &memory.store {
        store.grow(bytes).map_err(Some)?;
    }
    // The store is that long already.
    memory.bytes.store(bytes, Ordering::Release);
    Ok(())
}
