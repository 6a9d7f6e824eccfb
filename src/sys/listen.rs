//! The socket that front-ends connect to: made by us, inherited by number, or from systemd.
//!
//! A socket of ours has its permissions from the moment it has a name, replaces only a socket
//! file that nobody answers on, and takes its file away again unless somebody has put another
//! one there. What is said over a connection is not known here.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::{socket, systemd};

/// Only this user, unless told otherwise.
const MODE_DEFAULT: u32 = 0o600;
/// Naming a group is meant to let its members in.
const MODE_DEFAULT_WITH_GROUP: u32 = 0o660;

/// Where the socket comes from and who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketConfig {
    /// Where the socket comes from.
    pub source: SocketSource,
    /// User that is to own the socket file.
    pub owner: Option<u32>,
    /// Group of the socket file.
    pub group: Option<u32>,
    /// Permissions of the socket file; without it 0600, or 0660 if there is a `group`.
    pub mode: Option<u32>,
    /// The front-end listens at the path, and we connect to it.
    pub client: bool,
}

/// Where a listening socket comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSource {
    /// Made at this path.
    Path(PathBuf),
    /// Inherited from whoever started this process.
    Fd(i32),
    /// Inherited from systemd, under this name (FileDescriptorName= of the socket unit).
    Systemd(String),
}

impl fmt::Display for SocketSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::Systemd(name) => write!(f, "systemd:{name}"),
        }
    }
}

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
#[error("socket = \"{socket}\": {reason}")]
pub struct ListenError {
    /// The socket as configured.
    pub socket: SocketSource,
    /// What is wrong with it.
    pub reason: ListenReason,
}

/// What is wrong with a socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenReason {
    /// Another process listens there.
    #[error("in use, something answers on it")]
    InUse,
    /// The path leads to a file that is no socket; it is left alone.
    #[error("exists and is not a socket")]
    NotASocket,
    /// The directory that the socket should be in does not exist.
    #[error("the directory {0:?} does not exist")]
    NoDirectory(PathBuf),
    /// The descriptor is not open.
    #[error("the file descriptor {0} is not open")]
    NotOpen(RawFd),
    /// The descriptor is this process's own, or has been taken over already.
    #[error("the file descriptor {0} was not passed to this process, or is in use already")]
    NotPassed(RawFd),
    /// The descriptor is something else than a listening Unix stream socket.
    #[error("the file descriptor {0} is not a listening Unix stream socket")]
    NotAListener(RawFd),
    /// systemd passed no such socket.
    #[error(transparent)]
    Systemd(#[from] systemd::ActivationError),
    /// A system call failed.
    #[error("{doing}: {error}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// What the system answered.
        error: io::Error,
    },
}

/// A socket that front-ends connect to. Dropping it removes the socket file, if this made it.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    made: Option<SocketFile>,
}

impl Listener {
    /// Makes or takes over the socket.
    ///
    /// # Errors
    /// Whatever keeps the socket from listening with the permissions asked for; then nothing is
    /// left behind.
    pub fn open(config: &SocketConfig) -> Result<Self, ListenError> {
        let opened = match &config.source {
            SocketSource::Path(path) => Self::bind(path, config),
            SocketSource::Fd(fd) => Self::adopt(*fd),
            SocketSource::Systemd(name) => systemd::passed_fd(name)
                .map_err(ListenReason::from)
                .and_then(Self::adopt),
        };
        opened.map_err(|reason| ListenError {
            socket: config.source.clone(),
            reason,
        })
    }

    /// Waits for a connection, or until `exit` can be read (it is not read, so that it can end
    /// any number of waits); then the result is `None`.
    ///
    /// # Errors
    /// What accept(2) says; a connection that was given up before it was accepted is no error.
    pub fn accept_or_exit(&self, exit: &impl AsRawFd) -> io::Result<Option<UnixStream>> {
        loop {
            let (exiting, connecting) = socket::wait_readable(exit, &self.inner)?;
            if exiting {
                return Ok(None);
            }
            if !connecting {
                continue;
            }
            match self.inner.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn bind(path: &Path, config: &SocketConfig) -> Result<Self, ListenReason> {
        remove_stale(path)?;
        let default = match config.group {
            Some(_) => MODE_DEFAULT_WITH_GROUP,
            None => MODE_DEFAULT,
        };
        let mode = Permissions::from_mode(config.mode.unwrap_or(default));
        let socket = bind_private(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => ListenReason::InUse,
            _ => ListenReason::Failed {
                doing: "binding the socket",
                error,
            },
        })?;
        let made = SocketFile::at(path).map_err(failed("examining the socket file"))?;
        // From here on an error removes the file, by dropping `listener`.
        let listener = Self {
            inner: UnixListener::from(socket),
            made: Some(made),
        };
        socket::listen(listener.inner.as_fd()).map_err(failed("listening"))?;
        if config.owner.is_some() || config.group.is_some() {
            lchown(path, config.owner, config.group)
                .map_err(failed("setting the owner or group of the socket file"))?;
        }
        fs::set_permissions(path, mode).map_err(failed("setting the mode of the socket file"))?;
        Ok(listener)
    }

    /// Takes a copy, so that a number from outside can't make two owners of one descriptor.
    fn adopt(fd: RawFd) -> Result<Self, ListenReason> {
        match socket::is_inherited(fd) {
            Ok(true) => {}
            Ok(false) => return Err(ListenReason::NotPassed(fd)),
            Err(_) => return Err(ListenReason::NotOpen(fd)),
        }
        let copy = socket::duplicate(fd).map_err(failed("duplicating the file descriptor"))?;
        match socket::is_unix_listener(copy.as_fd()) {
            Ok(true) => {}
            Ok(false) | Err(_) => return Err(ListenReason::NotAListener(fd)),
        }
        socket::close_on_exec(fd).map_err(failed("setting close-on-exec"))?;
        let inner = UnixListener::from(copy);
        inner
            .set_nonblocking(true)
            .map_err(failed("making the socket non-blocking"))?;
        Ok(Self { inner, made: None })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(made) = &self.made {
            made.remove_if_ours();
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> ListenReason {
    move |error| ListenReason::Failed { doing, error }
}

/// Binds so that nobody else can connect before owner and mode are as configured: Linux gives the
/// file the mode that the socket itself has, so the umask of the process need not be touched.
fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    let socket = File::from(socket::create()?);
    socket.set_permissions(Permissions::from_mode(MODE_DEFAULT))?;
    let socket = OwnedFd::from(socket);
    socket::bind(socket.as_fd(), path)?;
    Ok(socket)
}

/// Makes way for a new socket: a socket file goes if nobody answers, anything else stays.
fn remove_stale(path: &Path) -> Result<(), ListenReason> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return check_directory(path),
        Err(error) => return Err(failed("examining the path")(error)),
    };
    if !found.file_type().is_socket() {
        return Err(ListenReason::NotASocket);
    }
    let probe = socket::create().map_err(failed("making a socket"))?;
    match socket::connect(probe.as_fd(), path).map_err(|error| error.kind()) {
        Err(io::ErrorKind::ConnectionRefused) => match fs::remove_file(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("removing the stale socket file")(error)),
        },
        Err(io::ErrorKind::NotFound) => Ok(()),
        Err(io::ErrorKind::PermissionDenied) => {
            Err(failed("connecting, to see whether it is stale")(
                io::ErrorKind::PermissionDenied.into(),
            ))
        }
        // Connected; or a full backlog, or a socket of another type: somebody holds it.
        Ok(()) | Err(_) => Err(ListenReason::InUse),
    }
}

fn check_directory(path: &Path) -> Result<(), ListenReason> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str() != OsStr::new("") => parent,
        _ => Path::new("."),
    };
    if directory.is_dir() {
        Ok(())
    } else {
        Err(ListenReason::NoDirectory(directory.to_owned()))
    }
}

/// A socket file that we have made, known again by its inode.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let (device, inode) = identity(&path)?;
        Ok(Self {
            path,
            device,
            inode,
        })
    }

    fn remove_if_ours(&self) {
        let socket = self.path.display();
        match identity(&self.path) {
            Ok(identity) if identity == (self.device, self.inode) => {
                if let Err(error) = fs::remove_file(&self.path) {
                    tracing::warn!(%socket, %error, "the socket file could not be removed");
                }
            }
            Ok(_) => tracing::debug!(%socket, "the socket file is another's by now"),
            Err(error) => tracing::debug!(%socket, %error, "the socket file is gone"),
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests;
