//! The two sides of being started by systemd: sockets passed in, and saying that we are ready.
//!
//! Only environment variables and one datagram, so no library is needed; sd_listen_fds(3) and
//! sd_notify(3) describe both.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// SD_LISTEN_FDS_START.
const FIRST_FD: RawFd = 3;

/// Why there is no socket from systemd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// None were passed to this process.
    #[error("systemd passed no sockets to this process (LISTEN_PID and LISTEN_FDS)")]
    NotActivated,
    /// Some were, but none of this name.
    #[error("systemd passed no socket of this name (LISTEN_FDNAMES={0:?})")]
    NoSuchName(String),
    /// Several have the name.
    #[error("systemd passed several sockets of this name (LISTEN_FDNAMES={0:?})")]
    Ambiguous(String),
}

/// The descriptor that systemd passed under this name.
///
/// # Errors
/// When there is no such, or more than one.
pub fn passed_fd(name: &str) -> Result<RawFd, ActivationError> {
    let variable = |key: &str| env::var(key).ok();
    find_fd(name, std::process::id(), variable)
}

fn find_fd(
    name: &str,
    pid: u32,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<RawFd, ActivationError> {
    let number = |key: &str| variable(key).and_then(|text| text.parse::<u32>().ok());
    let count = match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(for_pid), Some(count)) if for_pid == pid && count > 0 => count,
        _ => return Err(ActivationError::NotActivated),
    };
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut found = None;
    for (fd, candidate) in (FIRST_FD..).zip(names.split(':')).take(count as usize) {
        if candidate == name && found.replace(fd).is_some() {
            return Err(ActivationError::Ambiguous(names));
        }
    }
    found.ok_or(ActivationError::NoSuchName(names))
}

/// Sends a state such as `READY=1`; false when nobody asked for it (no NOTIFY_SOCKET).
///
/// # Errors
/// When the socket is named but does not take the message.
pub fn notify(state: &str) -> io::Result<bool> {
    match env::var_os("NOTIFY_SOCKET") {
        Some(socket) if !socket.is_empty() => send_state(&socket, state).map(|()| true),
        _ => Ok(false),
    }
}

/// `socket` is a path, or `@` and a name in the abstract namespace.
fn send_state(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sent = UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    if sent == state.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn find(name: &str, variables: &[(&str, &str)]) -> Result<RawFd, ActivationError> {
        find_fd(name, 42, |key| {
            variables
                .iter()
                .find(|(known, _)| *known == key)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn names_count_up_from_the_third_descriptor() {
        let variables = [
            ("LISTEN_PID", "42"),
            ("LISTEN_FDS", "3"),
            ("LISTEN_FDNAMES", "net0:disk0:net1"),
        ];
        assert_eq!(find("net0", &variables), Ok(3));
        assert_eq!(find("disk0", &variables), Ok(4));
        assert_eq!(find("net1", &variables), Ok(5));
        let names = "net0:disk0:net1".to_owned();
        assert_eq!(
            find("net2", &variables),
            Err(ActivationError::NoSuchName(names))
        );
    }

    #[test]
    fn sockets_for_another_process_are_not_ours() {
        for variables in [
            &[
                ("LISTEN_PID", "41"),
                ("LISTEN_FDS", "1"),
                ("LISTEN_FDNAMES", "a"),
            ][..],
            &[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "a")],
            &[("LISTEN_PID", "42"), ("LISTEN_FDNAMES", "a")],
            &[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", "0"),
                ("LISTEN_FDNAMES", "a"),
            ],
            &[
                ("LISTEN_PID", "x"),
                ("LISTEN_FDS", "1"),
                ("LISTEN_FDNAMES", "a"),
            ],
            &[],
        ] {
            assert_eq!(
                find("a", variables),
                Err(ActivationError::NotActivated),
                "{variables:?}"
            );
        }
    }

    #[test]
    fn names_beyond_the_count_and_double_names_are_refused() {
        let variables = [
            ("LISTEN_PID", "42"),
            ("LISTEN_FDS", "1"),
            ("LISTEN_FDNAMES", "a:b"),
        ];
        assert_eq!(
            find("b", &variables),
            Err(ActivationError::NoSuchName("a:b".to_owned()))
        );
        let variables = [
            ("LISTEN_PID", "42"),
            ("LISTEN_FDS", "2"),
            ("LISTEN_FDNAMES", "a:a"),
        ];
        assert_eq!(
            find("a", &variables),
            Err(ActivationError::Ambiguous("a:a".to_owned()))
        );
        let variables = [("LISTEN_PID", "42"), ("LISTEN_FDS", "2")];
        assert_eq!(
            find("a", &variables),
            Err(ActivationError::NoSuchName(String::new()))
        );
    }

    #[test]
    fn a_state_reaches_a_named_socket() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("notify");
        let receiver = UnixDatagram::bind(&path).unwrap();
        send_state(path.as_os_str(), "READY=1").unwrap();
        let mut buffer = [0; 32];
        let length = receiver.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }

    #[test]
    fn a_state_reaches_an_abstract_socket() {
        let name = format!("vringd-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let receiver = UnixDatagram::bind_addr(&address).unwrap();
        send_state(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        let mut buffer = [0; 32];
        let length = receiver.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STOPPING=1");
    }

    #[test]
    fn a_socket_that_is_gone_is_an_error() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("nobody");
        let error = send_state(path.as_os_str(), "READY=1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
