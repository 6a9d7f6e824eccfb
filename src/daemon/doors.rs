//! Where the front-ends of a device come from: a socket that they connect to, or one of theirs.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::config::{SocketConfig, SocketSource};
use crate::control::session::FrontEnds;
use crate::sys::connect::Connector;
use crate::sys::link::Wake;
use crate::sys::listen::{ListenError, Listener};

/// Between two attempts to listen again.
const RETRY: Duration = Duration::from_secs(1);

/// Opens what `socket` says.
pub(super) fn open(socket: &SocketConfig) -> Result<Box<dyn FrontEnds>, ListenError> {
    if let (SocketSource::Path(path), true) = (&socket.source, socket.client) {
        return Ok(Box::new(Connecting(Connector::new(path))));
    }
    Ok(Box::new(Listening {
        listener: Some(Listener::open(socket)?),
        socket: socket.clone(),
        said: None,
    }))
}

/// Front-ends listen.
struct Connecting(Connector);

impl FrontEnds for Connecting {
    fn next(&mut self, wake: &Wake) -> io::Result<Option<UnixStream>> {
        self.0.connect_or_exit(wake)
    }

    /// Without an attempt there is no connection.
    fn close(&mut self) {}
}

/// We listen. Closed it is gone, so that a front-end is refused and tries again later: one that
/// waited for its first answer would hold its guest up.
struct Listening {
    socket: SocketConfig,
    listener: Option<Listener>,
    /// Why it can't be opened again, as the log has it.
    said: Option<String>,
}

impl FrontEnds for Listening {
    fn next(&mut self, wake: &Wake) -> io::Result<Option<UnixStream>> {
        let listener = match self.listener.take() {
            Some(listener) => listener,
            None => match Listener::open(&self.socket) {
                Ok(listener) => listener,
                Err(error) => {
                    let text = text(&error);
                    if self.said.as_ref() != Some(&text) {
                        tracing::error!("{text}; tried again every {RETRY:?}");
                    }
                    self.said = Some(text);
                    wake.wait_within(RETRY)?;
                    return Ok(None);
                }
            },
        };
        self.said = None;
        self.listener.insert(listener).accept_or_exit(wake)
    }

    /// What somebody else has opened can't be opened again: there connections wait.
    fn close(&mut self) {
        if matches!(self.socket.source, SocketSource::Path(_)) {
            self.listener = None;
        }
    }
}

/// The error with its reasons.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut reason = error.source();
    while let Some(error) = reason {
        text = format!("{text}: {error}");
        reason = error.source();
    }
    text
}
