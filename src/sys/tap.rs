//! `Tap`: a tap device of the kernel, created or attached by name, one fd per queue.
//!
//! Every fd carries 12-byte virtio-net headers, little-endian, and never blocks. Header size and
//! offloads belong to the device, not to the queue. A device that was created here is gone when its
//! last fd is closed; one that was there before is left as it was found, but for header size and
//! offloads. Linux: Documentation/networking/tuntap.rst.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::memory::{Segment, Segments, copy};

mod dropped;
mod place;

use dropped::Dropped;
pub use place::{TapPlace, TapSource};

use super::ifreq::{IfReq, InterfaceSocket, bad_name, check};
use super::netns::NetnsError;

/// Where taps are made.
const CLONE_DEVICE: &str = "/dev/net/tun";
/// Bytes of the header before each frame.
const VNET_HEADER: usize = 12;
/// The same for the ioctl.
const VNET_HEADER_INT: libc::c_int = 12;
/// Queues of one tap at most (MAX_TAP_QUEUES of the kernel).
pub const QUEUES_MAX: u16 = 256;
/// Segments that one system call takes (IOV_MAX), the header among them.
const IOV_MAX: usize = 1024;
/// Bytes of the longest payload that is put behind its header before it is written: for so few, a
/// list of segments costs the kernel more than a copy costs us.
const SHORT_MAX: usize = 2048;
/// Flags that every queue has.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Frames that are thrown away at most when a queue is emptied: the longest queue that taps have
/// in practice, so that a flood can't keep us.
const DISCARD_MAX: usize = 16384;

/// Why a tap can't be used. Each names the interface.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have this name.
    #[error("tap `{name}`: not a name for an interface ({what})")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No queue, or too many.
    #[error("tap `{name}`: {queues} queues asked for, a tap has 1 to {QUEUES_MAX}")]
    Queues {
        /// The name.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// The interface exists and is something else.
    #[error("tap `{name}`: the interface exists but is not a tap (its driver is `{driver}`)")]
    NotTap {
        /// The name.
        name: String,
        /// Which driver it has.
        driver: String,
    },
    /// The existing tap has one queue, more are wanted.
    #[error(
        "tap `{name}`: {queues} queues asked for, but the interface exists as a tap with a single \
         queue (create it with multi_queue, or ask for 1 queue)"
    )]
    SingleQueue {
        /// The name.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// All queues of the existing tap are in use.
    #[error("tap `{name}`: the interface is in use by another process")]
    Busy {
        /// The name.
        name: String,
    },
    /// The kernel does not let us.
    #[error("tap `{name}`: no permission to {what} (CAP_NET_ADMIN, or a tap that this user owns)")]
    Permission {
        /// The name.
        name: String,
        /// To do what.
        what: &'static str,
    },
    /// A descriptor that was passed is none of ours to use.
    #[error("tap: the file descriptor {fd} {reason}")]
    Inherited {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
    /// The interface is no macvtap.
    #[error("macvtap `{name}`: {reason} (`ip link add link ETH name {name} type macvtap`)")]
    NoMacvtap {
        /// The name.
        name: String,
        /// What was found.
        reason: String,
    },
    /// The namespace can't be entered.
    #[error("{name}: {source}")]
    Netns {
        /// The tap.
        name: String,
        /// What is wrong.
        source: NetnsError,
    },
    /// A system call failed.
    #[error("tap `{name}`: can't {what}: {source}")]
    System {
        /// The name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Offloads that the reader of a tap takes: frames come with checksums or segmentation undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TapOffloads {
    /// Unfinished checksums; without it the others have no effect.
    pub csum: bool,
    /// TSO over IPv4.
    pub tso4: bool,
    /// TSO over IPv6.
    pub tso6: bool,
    /// TSO with ECN.
    pub ecn: bool,
    /// UDP segmentation, over IPv4 and IPv6 alike.
    pub uso: bool,
}

impl TapOffloads {
    fn bits(self) -> libc::c_uint {
        let when = |on: bool, bits: libc::c_uint| if on && self.csum { bits } else { 0 };
        when(true, libc::TUN_F_CSUM)
            | when(self.tso4, libc::TUN_F_TSO4)
            | when(self.tso6, libc::TUN_F_TSO6)
            | when(self.ecn && (self.tso4 || self.tso6), libc::TUN_F_TSO_ECN)
            | when(self.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6)
    }
}

/// Why a frame was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteError {
    /// The kernel has no room now.
    Full,
    /// More segments than a system call takes.
    TooManySegments,
    /// A segment is not accessible memory.
    Inaccessible,
    /// The interface is down or gone, or the kernel does not like header or frame: the system's
    /// error number.
    Refused(i32),
}

/// A tap device. Cold: what control does to the device as a whole. Frames go through the
/// [`TapFd`]s of its queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    fds: Vec<Arc<File>>,
    multi_queue: bool,
    created: bool,
    /// Bytes of the virtio-net header before each frame.
    header: Arc<AtomicUsize>,
    /// What the kernel drops for want of a reader, where it can be asked.
    dropped: Option<Dropped>,
}

impl Tap {
    /// Attaches to the tap `name` with `queues` queues, or creates it, up, when there is no such
    /// interface. An `mtu` is set unless the interface has it already.
    ///
    /// # Errors
    /// [`TapError`]; nothing stays created or attached then.
    pub fn open(name: &str, queues: u16, mtu: Option<u16>) -> Result<Tap, TapError> {
        check_name(name)?;
        check_queues(name, queues)?;
        let socket = InterfaceSocket::new()
            .map_err(|error| failed(name, "open a socket to look at it", error))?;
        let tap = match socket.driver(name) {
            Ok(None) => Tap::create(name, queues)?,
            Ok(Some(driver)) if driver.is_tap() => Tap::attach(name, queues)?,
            Ok(Some(driver)) => {
                return Err(TapError::NotTap {
                    name: name.into(),
                    driver: driver.name,
                });
            }
            Err(error) => return Err(failed(name, "look at it", error)),
        };
        let tap = tap.ready(mtu.map(|mtu| (&socket, mtu)))?;
        if tap.created {
            socket
                .set_up(name)
                .map_err(|error| failed(name, "set it up", error))?;
        }
        Ok(tap)
    }

    /// Brings queues that were opened into the form in which we use them.
    fn ready(self, mtu: Option<(&InterfaceSocket, u16)>) -> Result<Tap, TapError> {
        let name = self.name.as_str();
        for fd in &self.fds {
            set_int(fd, libc::TUNSETVNETHDRSZ, VNET_HEADER_INT)
                .and_then(|()| set_int(fd, libc::TUNSETVNETLE, 1))
                .map_err(|error| failed(name, "set its virtio-net header", error))?;
        }
        self.set_offload(TapOffloads::default())
            .map_err(|error| failed(name, "set its offloads", error))?;
        if let Some((socket, mtu)) = mtu {
            socket
                .set_mtu(name, mtu)
                .map_err(|error| failed(name, "set its MTU", error))?;
        }
        Ok(self)
    }

    fn create(name: &str, queues: u16) -> Result<Tap, TapError> {
        let multi_queue = queues > 1;
        let first = new_queue(name, multi_queue, libc::IFF_TUN_EXCL)
            .map_err(|error| failed(name, "create it", error))?;
        Tap::with_first(name, queues, first, multi_queue, true)
    }

    /// The kernel refuses a flag that differs from the device's and tells neither, so both are
    /// tried: what is wanted first.
    fn attach(name: &str, queues: u16) -> Result<Tap, TapError> {
        let wanted = queues > 1;
        let (first, multi_queue) = match new_queue(name, wanted, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (new_queue(name, !wanted, 0), !wanted)
            }
            answer => (answer, wanted),
        };
        let single = || TapError::SingleQueue {
            name: name.into(),
            queues,
        };
        let busy = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
        match first {
            Ok(_) if wanted && !multi_queue => Err(single()),
            Err(error) if wanted && !multi_queue && busy(&error) => Err(single()),
            Ok(first) => Tap::with_first(name, queues, first, multi_queue, false),
            Err(error) => Err(failed(name, "attach to it", error)),
        }
    }

    fn with_first(
        name: &str,
        queues: u16,
        first: File,
        multi_queue: bool,
        created: bool,
    ) -> Result<Tap, TapError> {
        let mut fds = vec![Arc::new(first)];
        for _ in 1..queues {
            let next = new_queue(name, multi_queue, 0)
                .map_err(|error| failed(name, "attach another queue to it", error))?;
            fds.push(Arc::new(next));
        }
        Ok(Tap {
            name: name.into(),
            fds,
            multi_queue,
            created,
            header: Arc::new(AtomicUsize::new(VNET_HEADER)),
            dropped: None,
        })
    }

    /// The name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the device was created here, and goes when it is closed.
    pub fn is_created(&self) -> bool {
        self.created
    }

    /// Frames that the kernel has dropped since [`Tap::open_at`], because a queue of the interface
    /// was full. `None` where it can't be asked: of descriptors it does not tell the namespace.
    pub fn dropped(&self) -> Option<u64> {
        self.dropped.as_ref()?.count().ok()
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.fds.len()
    }

    /// The fd of queue `index`, with a list of segments of its own; `None` past the last queue.
    pub fn queue(&self, index: u16) -> Option<TapFd> {
        let file = Arc::clone(self.fds.get(usize::from(index))?);
        Some(TapFd {
            file,
            header: Arc::clone(&self.header),
            iov: Segments::with_capacity(IOV_MAX),
            short: Box::new([0; VNET_HEADER + SHORT_MAX]),
        })
    }

    /// What readers of the device take from now on. Frames that wait in the device already were
    /// queued under the former offloads.
    ///
    /// # Errors
    /// EINVAL when the kernel lacks one of them (`uso` came with Linux 6.2).
    pub fn set_offload(&self, offloads: TapOffloads) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let answer = unsafe {
            libc::ioctl(
                self.fds[0].as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads.bits()),
            )
        };
        check(answer)
    }

    /// How many bytes the virtio-net header has before each frame, both ways: 12, or 10 for legacy
    /// drivers.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_header_bytes(&self, bytes: usize) -> io::Result<()> {
        debug_assert!(bytes <= VNET_HEADER, "there is no longer header");
        if self.header.load(Ordering::Relaxed) == bytes {
            return Ok(());
        }
        let size = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
        // A tap has one size, a macvtap one for each queue.
        for (index, fd) in self.fds.iter().enumerate() {
            match set_int(fd, libc::TUNSETVNETHDRSZ, size) {
                // A queue of a tap that is detached.
                Err(error) if index > 0 && error.raw_os_error() == Some(libc::EBADFD) => {}
                answer => answer?,
            }
        }
        self.header.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the kernel cuts UDP frames (Linux 6.2). Leaves all offloads off.
    pub fn supports_uso(&self) -> bool {
        let uso = TapOffloads {
            csum: true,
            uso: true,
            ..TapOffloads::default()
        };
        let answer = self.set_offload(uso);
        self.set_offload(TapOffloads::default()).is_ok() && answer.is_ok()
    }

    /// Attaches queue `index` to the device again or detaches it: the kernel spreads frames over
    /// attached queues, and nobody reads those of a queue that the guest does not use.
    /// What waits in a detached
    /// queue is lost. A tap with a single queue knows no such thing; it stays attached.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_attached(&self, index: u16, attached: bool) -> io::Result<()> {
        let Some(file) = self
            .fds
            .get(usize::from(index))
            .filter(|_| self.multi_queue)
        else {
            return Ok(());
        };
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let request = IfReq::with_flags("", flag);
        // SAFETY: TUNSETQUEUE reads an `ifreq`, which `request` is for the time of the call.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, request.as_ptr()) };
        match check(answer) {
            // Attached or detached already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            answer => answer,
        }
    }
}

/// One queue of a tap: reads and writes single frames.
#[derive(Debug)]
pub struct TapFd {
    file: Arc<File>,
    /// Bytes of the virtio-net header, as the device is set now.
    header: Arc<AtomicUsize>,
    /// Header and payload of the frame being written.
    iov: Segments,
    /// The same of a short frame, in one piece.
    short: Box<[u8; VNET_HEADER + SHORT_MAX]>,
}

impl TapFd {
    /// Reads one frame, its header first, into `window` (at most 1024 segments). Returns its bytes,
    /// or `None` when there is no frame. What does not fit is lost without a trace.
    ///
    /// # Errors
    /// The system's error: EFAULT when the window is not accessible memory (the frame is lost
    /// then), EBADFD when the interface was deleted.
    pub fn read_frame(&self, window: &[Segment]) -> io::Result<Option<usize>> {
        let count = iov_count(window);
        // SAFETY: segments are laid out as `iovec`s, and each lies in a mapping that its owner
        // keeps; the kernel checks every address and the guest may write there at any time anyway.
        let bytes = unsafe { libc::readv(self.file.as_raw_fd(), window.as_ptr().cast(), count) };
        match usize::try_from(bytes) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Writes one frame: `header`, then the `bytes` bytes of `payload`.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was written then.
    #[inline]
    pub fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER],
        payload: &[Segment],
        bytes: usize,
    ) -> Result<(), WriteError> {
        let header = &header[..self.header.load(Ordering::Relaxed).min(VNET_HEADER)];
        if bytes <= SHORT_MAX {
            self.write_short(header, payload, bytes)
        } else {
            self.write_list(header, payload)
        }
    }

    #[inline]
    fn write_short(
        &mut self,
        header: &[u8],
        payload: &[Segment],
        bytes: usize,
    ) -> Result<(), WriteError> {
        let (head, rest) = self.short.split_at_mut(header.len());
        head.copy_from_slice(header);
        let len = header.len() + copy::read(payload, 0, &mut rest[..bytes]);
        let at = self.short.as_ptr();
        // Not by way of libc's write(2), which is a cancellation point and pays for that.
        let fd = libc::c_long::from(self.file.as_raw_fd());
        // SAFETY: `at` has `len` bytes, which are ours.
        let answer = unsafe { libc::syscall(libc::SYS_write, fd, at, len) };
        if answer >= 0 {
            return Ok(());
        }
        Err(refusal())
    }

    fn write_list(&mut self, header: &[u8], payload: &[Segment]) -> Result<(), WriteError> {
        self.iov.clear();
        // The kernel only reads through it.
        let header = Segment::new(header.as_ptr().cast_mut(), header.len());
        if !self.iov.push(header) || !payload.iter().all(|&segment| self.iov.push(segment)) {
            return Err(WriteError::TooManySegments);
        }
        let iov = self.iov.as_slice();
        let count = iov_count(iov);
        // SAFETY: segments are laid out as `iovec`s; the first is the caller's header, the others
        // lie in mappings that their owner keeps, and the kernel checks every address.
        let bytes = unsafe { libc::writev(self.file.as_raw_fd(), iov.as_ptr().cast(), count) };
        if bytes >= 0 {
            return Ok(());
        }
        Err(refusal())
    }

    /// Throws away the frames that wait in the queue: they were meant for a guest that is gone.
    /// Returns how many there were.
    pub fn discard_waiting(&self) -> usize {
        let mut bytes = [0u8; 2 * VNET_HEADER];
        let window = [Segment::new(bytes.as_mut_ptr(), bytes.len())];
        (0..DISCARD_MAX)
            .take_while(|_| matches!(self.read_frame(&window), Ok(Some(_))))
            .count()
    }
}

/// Why the last write failed.
#[cold]
fn refusal() -> WriteError {
    let error = io::Error::last_os_error();
    match error.raw_os_error().unwrap_or_default() {
        libc::EAGAIN | libc::ENOBUFS => WriteError::Full,
        libc::EFAULT => WriteError::Inaccessible,
        other => WriteError::Refused(other),
    }
}

fn iov_count(segments: &[Segment]) -> libc::c_int {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "at most 1024"
    )]
    let count = segments.len().min(IOV_MAX) as libc::c_int;
    count
}

/// To wait for frames with.
impl AsRawFd for TapFd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Opens one more queue of `name`.
fn new_queue(name: &str, multi_queue: bool, more: libc::c_int) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CLONE_DEVICE)
        .map_err(|error| io::Error::new(error.kind(), format!("{CLONE_DEVICE}: {error}")))?;
    let multi_queue = if multi_queue {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    let mut request = IfReq::with_flags(name, FLAGS | multi_queue | more);
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    check(answer).map(|()| file)
}

fn set_int(file: &File, what: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the ioctls that are passed here read one `int`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), what, &raw const value) })
}

fn check_queues(name: &str, queues: u16) -> Result<(), TapError> {
    if queues == 0 || queues > QUEUES_MAX {
        return Err(TapError::Queues {
            name: name.into(),
            queues,
        });
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), TapError> {
    match bad_name(name) {
        None => Ok(()),
        Some(what) => Err(TapError::Name {
            name: name.into(),
            what,
        }),
    }
}

fn failed(name: &str, what: &'static str, source: io::Error) -> TapError {
    let name = name.into();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, what },
        _ => TapError::System { name, what, source },
    }
}

#[cfg(test)]
mod tests;
