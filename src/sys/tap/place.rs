//! Which tap is meant, and how its queues are come by: by name, from whoever started us, or from
//! the character device of a macvtap.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::sys::netns;
use crate::sys::socket::{self, close_on_exec};

use super::dropped::{Dropped, Side};
use super::{FLAGS, Tap, TapError, VNET_HEADER, check, check_name, check_queues, failed};
use crate::sys::ifreq::{IfReq, InterfaceSocket};

/// Flags that a queue must have been opened with: those of [`FLAGS`].
const NEEDED: [(libc::c_int, &str); 3] = [
    (libc::IFF_TAP, "IFF_TAP"),
    (libc::IFF_NO_PI, "IFF_NO_PI"),
    (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
];

/// A tap as the operator names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapSource {
    /// An interface, which is made when it is not there.
    Name(String),
    /// Descriptors that this process was started with, one for each queue.
    Fds(Vec<RawFd>),
    /// A macvtap interface, which is there.
    Macvtap(String),
}

/// A tap and the network namespace that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapPlace {
    /// Which tap.
    pub source: TapSource,
    /// Its namespace, by name or path; none: that of this process.
    pub netns: Option<String>,
    /// One that is made here stays when its last queue is closed.
    pub persist: bool,
}

impl fmt::Display for TapSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TapSource::Name(name) => write!(f, "tap:{name}"),
            TapSource::Fds(fds) => {
                let fds: Vec<_> = fds.iter().map(ToString::to_string).collect();
                write!(f, "tap:fd={}", fds.join("+"))
            }
            TapSource::Macvtap(name) => write!(f, "macvtap:{name}"),
        }
    }
}

impl Tap {
    /// Opens the tap at `place`, as [`Tap::open`] does; that of descriptors keeps its MTU.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open_at(place: &TapPlace, queues: u16, mtu: Option<u16>) -> Result<Tap, TapError> {
        let open = || match &place.source {
            TapSource::Name(name) => {
                let tap = Tap::open(name, queues, mtu)?;
                if place.persist && tap.created {
                    tap.keep()?;
                }
                Ok(tap.with_dropped(Side::Sent))
            }
            TapSource::Fds(fds) => Tap::inherited(fds),
            TapSource::Macvtap(name) => {
                Ok(Tap::macvtap(name, queues, mtu)?.with_dropped(Side::Received))
            }
        };
        match &place.netns {
            None => open(),
            Some(name) => match netns::within(name, open) {
                Ok(opened) => opened,
                Err(source) => Err(TapError::Netns {
                    name: place.source.to_string(),
                    source,
                }),
            },
        }
    }

    /// The same, with what the kernel drops counted from now on, if it can be asked.
    fn with_dropped(mut self, side: Side) -> Tap {
        self.dropped = Dropped::open(&self.name, side).ok();
        self
    }

    /// Has the interface stay when its last queue is closed.
    fn keep(&self) -> Result<(), TapError> {
        let failed = |error| failed(&self.name, "make it persistent", error);
        let Some(first) = self.fds.first() else {
            return Ok(());
        };
        let on: libc::c_ulong = 1;
        // SAFETY: TUNSETPERSIST takes a number, no pointer, and the file is open.
        check(unsafe { libc::ioctl(first.as_raw_fd(), libc::TUNSETPERSIST, on) }).map_err(failed)
    }

    /// Takes over queues of one tap that somebody else opened.
    fn inherited(fds: &[RawFd]) -> Result<Tap, TapError> {
        let queues = u16::try_from(fds.len()).unwrap_or(u16::MAX);
        let all = TapSource::Fds(fds.to_vec()).to_string();
        check_queues(&all, queues)?;
        let mut name = String::new();
        let mut multi_queue = false;
        let mut files = Vec::with_capacity(fds.len());
        for &fd in fds {
            let error = |reason: String| TapError::Inherited { fd, reason };
            let file = inherit(fd)?;
            let queue = queue_of(&file).map_err(|source| error(source.to_string()))?;
            for (flag, what) in NEEDED {
                if queue.flags & flag == 0 {
                    return Err(error(format!(
                        "is a queue of `{}`, which was opened without {what}",
                        queue.name
                    )));
                }
            }
            multi_queue = queue.flags & libc::IFF_MULTI_QUEUE != 0;
            if !files.is_empty() && name != queue.name {
                return Err(error(format!(
                    "is a queue of `{}`, but the one before it is of `{name}`",
                    queue.name
                )));
            }
            name = queue.name;
            files.push(Arc::new(file));
        }
        // Only now is it certain that they are ours.
        for &fd in fds {
            close_on_exec(fd).map_err(|error| failed(&name, "take its queue over", error))?;
        }
        Tap::of_queues(name, files, multi_queue).ready(None)
    }

    /// Opens queues of the macvtap `name`.
    fn macvtap(name: &str, queues: u16, mtu: Option<u16>) -> Result<Tap, TapError> {
        check_name(name)?;
        check_queues(name, queues)?;
        let system = |what| move |error| failed(name, what, error);
        let socket = InterfaceSocket::new().map_err(system("open a socket to look at it"))?;
        let Some(index) = socket.index(name).map_err(system("look at it"))? else {
            return Err(TapError::NoMacvtap {
                name: name.into(),
                reason: "there is no such interface".into(),
            });
        };
        let path = PathBuf::from(format!("/dev/tap{index}"));
        let mut files = Vec::new();
        for _ in 0..queues {
            files.push(Arc::new(macvtap_queue(name, &path, queues > 1)?));
        }
        Tap::of_queues(name.into(), files, queues > 1).ready(mtu.map(|mtu| (&socket, mtu)))
    }

    fn of_queues(name: String, fds: Vec<Arc<File>>, multi_queue: bool) -> Tap {
        Tap {
            name,
            fds,
            multi_queue,
            created: false,
            header: Arc::new(AtomicUsize::new(VNET_HEADER)),
            dropped: None,
        }
    }
}

/// A copy of `fd`, if it is the operator's to give.
fn inherit(fd: RawFd) -> Result<File, TapError> {
    let error = |reason: String| TapError::Inherited { fd, reason };
    let file = File::from(socket::inherit(fd).map_err(error)?);
    let system = |source: io::Error| error(source.to_string());
    // SAFETY: no pointers are passed, and `file` is open.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags).map_err(system)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
        .map_err(system)?;
    Ok(file)
}

/// What the kernel says of a queue.
struct Queue {
    name: String,
    flags: libc::c_int,
}

fn queue_of(file: &File) -> io::Result<Queue> {
    let mut request = IfReq::new("");
    // SAFETY: TUNGETIFF writes an `ifreq`, which `request` is.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, request.as_mut_ptr()) };
    match check(answer) {
        Ok(()) => Ok(Queue {
            name: request.name(),
            flags: request.flags(),
        }),
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::EBADFD) => {
                io::Error::other("is that of a tap without an interface (TUNSETIFF)")
            }
            Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP) => {
                io::Error::other("is not that of a tap")
            }
            _ => error,
        }),
    }
}

fn macvtap_queue(name: &str, path: &PathBuf, multi_queue: bool) -> Result<File, TapError> {
    let no_macvtap = |reason: String| TapError::NoMacvtap {
        name: name.into(),
        reason,
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
            return Err(no_macvtap(format!("it has no device {}", path.display())));
        }
        opened => opened.map_err(|error| failed(name, "open its device", error))?,
    };
    let multi_queue = if multi_queue {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    let mut request = IfReq::with_flags(name, FLAGS | multi_queue);
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    check(answer).map_err(|error| failed(name, "set up a queue of it", error))?;
    // Numbers are those of a namespace, and /dev has one device for each.
    match queue_of(&file) {
        Ok(queue) if queue.name == name => Ok(file),
        Ok(queue) => Err(no_macvtap(format!(
            "{} is the device of `{}` in another network namespace",
            path.display(),
            queue.name
        ))),
        Err(error) => Err(failed(name, "look at a queue of it", error)),
    }
}
