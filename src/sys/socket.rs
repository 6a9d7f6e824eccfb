//! Unix stream sockets below what std offers: create, bind, listen and connect in single steps.
//!
//! std binds with whatever the umask leaves and can't connect without blocking; `listen` needs to
//! set permissions before the socket has a name, and to ask without waiting whether somebody
//! answers. No policy here. unix(7) has the rules.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// A Unix stream socket, close-on-exec and non-blocking.
pub(super) fn create() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    own(fd)
}

/// Gives the socket a name in the file system.
pub(super) fn bind(socket: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let (address, length) = address(path)?;
    // SAFETY: `address` is an initialised sockaddr_un that lives through the call, and `length`
    // is not beyond its size.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

/// Makes the socket accept connections; the kernel caps the backlog at somaxconn.
pub(super) fn listen(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })
}

/// Connects to the name.
pub(super) fn connect(socket: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let (address, length) = address(path)?;
    // SAFETY: as in `bind`.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

/// A copy of a descriptor that this process was started with, close-on-exec. The number comes
/// from outside and may be wrong: then the kernel says so.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; a closed descriptor is an error.
    own(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })
}

/// True for a descriptor that has survived an exec, that is: which this process was started with
/// and has not taken over since. Everything that it opens itself is close-on-exec.
pub(super) fn is_inherited(fd: RawFd) -> io::Result<bool> {
    // SAFETY: no pointers are passed; a closed descriptor is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    check(flags)?;
    Ok(flags & libc::FD_CLOEXEC == 0)
}

/// A copy of `fd`, if it is one that this process was started with and that nobody here has taken
/// over yet; otherwise what is wrong with it.
pub(super) fn inherit(fd: RawFd) -> Result<OwnedFd, String> {
    match is_inherited(fd) {
        Ok(true) => duplicate(fd).map_err(|error| error.to_string()),
        Ok(false) => Err("was not passed to this process, or is in use already".into()),
        Err(_) => Err("is not open".into()),
    }
}

/// What exec would have done for a descriptor that was passed on.
#[cfg(test)]
pub(super) fn pass_on(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })
}

/// Keeps an inherited descriptor away from programs that this process starts.
pub(super) fn close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; a closed descriptor is an error.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })
}

/// True for a Unix stream socket.
pub(super) fn is_unix_stream(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(option(socket, libc::SO_DOMAIN)? == libc::AF_UNIX
        && option(socket, libc::SO_TYPE)? == libc::SOCK_STREAM)
}

/// True for a Unix stream socket that accepts connections.
pub(super) fn is_unix_listener(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(is_unix_stream(socket)? && option(socket, libc::SO_ACCEPTCONN)? == 1)
}

/// Waits until at least one of the two can be read (or has failed), and says which.
pub(super) fn wait_readable(one: &impl AsRawFd, two: &impl AsRawFd) -> io::Result<(bool, bool)> {
    let watch = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [watch(one.as_raw_fd()), watch(two.as_raw_fd())];
    // SAFETY: `fds` has the two initialised entries that the count announces.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok((false, false)),
        Ok(()) => Ok((fds[0].revents != 0, fds[1].revents != 0)),
    }
}

/// Waits so long until `fd` can be read, and says whether it can.
pub(super) fn is_readable_within(fd: &impl AsRawFd, time: Duration) -> io::Result<bool> {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one initialised entry, as the count says.
    match check(unsafe { libc::poll(&raw mut watched, 1, millis) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok(false),
        Ok(()) => Ok(watched.revents != 0),
    }
}

fn option(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of_u32::<libc::c_int>();
    // SAFETY: both pointers are to live variables; `length` is the size of `value`.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    })?;
    Ok(value)
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: sockaddr_un is plain data, for which zeroes are a valid value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    // The last byte stays NUL; an empty path would mean an automatic abstract name.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    address.sun_family = libc::AF_UNIX
        .try_into()
        .expect("address families are small");
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed() as libc::c_char;
    }
    Ok((address, size_of_u32::<libc::sockaddr_un>()))
}

pub(super) fn size_of_u32<T>() -> u32 {
    size_of::<T>()
        .try_into()
        .expect("the structures of the kernel are small")
}

fn own(fd: RawFd) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
