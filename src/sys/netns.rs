//! Network namespaces by name: something is done in one, by a thread that enters it and ends.
//!
//! Linux: network_namespaces(7), ip-netns(8), which keeps named ones in /run/netns.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;

/// Where `ip netns add` puts names.
const NAMED: &str = "/run/netns";

/// Why nothing was done in a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// There is none of that name.
    #[error("there is no network namespace {0:?} (`ip netns list` has the names)")]
    Missing(PathBuf),
    /// It is something else.
    #[error("{0:?} is not a network namespace")]
    NotNetns(PathBuf),
    /// The kernel does not let us in.
    #[error("no permission to enter the network namespace {0:?} (CAP_SYS_ADMIN)")]
    Permission(PathBuf),
    /// A system call failed.
    #[error("can't enter the network namespace {path:?}: {source}")]
    System {
        /// Where it is.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Runs `job` in the namespace `name`: one that `ip netns` made, or the path to its file. The
/// calling thread stays where it is.
///
/// # Errors
/// [`NetnsError`]; `job` did not run then.
pub fn within<T: Send>(name: &str, job: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    // A path with a slash in front replaces what it is joined to.
    let path = Path::new(NAMED).join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound => NetnsError::Missing(path),
                _ => refused(path, error),
            });
        }
    };
    thread::scope(|scope| {
        let enter = || {
            // SAFETY: no pointers; the namespace becomes this thread's alone.
            if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(job())
        };
        let spawned = thread::Builder::new().spawn_scoped(scope, enter);
        match spawned.map(thread::ScopedJoinHandle::join) {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Ok(Err(error))) | Err(error) => Err(refused(path, error)),
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
        }
    })
}

fn refused(path: PathBuf, source: io::Error) -> NetnsError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => NetnsError::Permission(path),
        Some(libc::EINVAL) => NetnsError::NotNetns(path),
        _ => NetnsError::System { path, source },
    }
}
