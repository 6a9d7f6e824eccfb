//! `vringd xdp-helper`: opens what takes capabilities, gives them up, and becomes the daemon (or
//! any other command), which finds the descriptors under the numbers that it was told.
//!
//! What keeps the XDP program at the interface is open in that process, too, and nowhere else: it
//! is gone when the process is.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::config::HelperGiven;
use crate::sys::privileges;
use crate::sys::users;
use crate::sys::xdp::{self, MEMORY_BYTES, XdpError, XdpPlace};

/// Why the command was not run. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// An interface can't be used.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// There is no such user.
    #[error("--user {0:?}: there is no such user")]
    NoUser(String),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Opens what the ports at `places` need and becomes the command; returns only with an error.
pub fn become_command(places: &[XdpPlace], given: &HelperGiven) -> HelperError {
    match prepare(places, given) {
        Ok(error) | Err(error) => error,
    }
}

fn prepare(places: &[XdpPlace], given: &HelperGiven) -> Result<HelperError, HelperError> {
    let system = |what: &str| {
        let what = what.to_owned();
        move |source| HelperError::System { what, source }
    };
    let user = match &given.user {
        None => None,
        Some(name) => {
            let found = users::user(name).map_err(system("--user"))?;
            Some(found.ok_or_else(|| HelperError::NoUser(name.clone()))?)
        }
    };
    let sockets = places.iter().filter_map(|place| place.passed.as_ref());
    let sockets: usize = sockets.map(|passed| passed.sockets.len()).sum();
    xdp::hand_over(places)?;
    // Memory is locked by the command, and counted against its own limit.
    let bytes = MEMORY_BYTES.saturating_mul(sockets as u64);
    if let Err(error) = privileges::lock_memory(bytes) {
        let (limit, kib) = (privileges::lock_limit().unwrap_or(0) >> 10, bytes >> 10);
        tracing::warn!(
            "RLIMIT_MEMLOCK is {limit} KiB and can't be raised (CAP_SYS_RESOURCE): {error}: \
             {sockets} queues of full size would lock {kib} KiB"
        );
    }
    privileges::give_up(user.as_ref()).map_err(system("capabilities can't be given up"))?;
    let (program, arguments) = match given.command.split_first() {
        Some(command) => command,
        None => return Err(system("a command")(io::ErrorKind::InvalidInput.into())),
    };
    let source = Command::new(program).args(arguments).exec();
    let what = format!("{} can't be run", program.display());
    Ok(HelperError::System { what, source })
}
