//! The thread of one device: accepts a front-end, serves it, and waits for the next.
//!
//! One front-end at a time: another that connects meanwhile waits in the socket's backlog. The
//! device outlives its sessions, the handler of a connection does not. When a session ends, every
//! vring is stopped and guest memory unmapped before the next begins.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::device::DeviceModel;
use crate::engine::VringRunner;

use super::front_door::{FrontDoor, SessionEnd, Shared, lock};
use super::handler::DeviceSession;
use super::state::{SessionFds, SessionState};

/// Where connections come from; `None` when the daemon shuts down.
pub type Accept = Box<dyn FnMut(&EventFd) -> io::Result<Option<UnixStream>> + Send>;

/// A device and what runs its vrings.
#[derive(Debug, Clone)]
pub struct Served {
    /// What the front-end is told.
    pub device: Arc<dyn DeviceModel>,
    /// Who runs its vrings.
    pub runner: Arc<dyn VringRunner>,
}

/// Starts the thread that serves `served` until `exit` is written to. The thread returns whether
/// everything could be stopped cleanly.
///
/// # Errors
/// When the thread can't be started.
pub fn spawn(served: Served, mut accept: Accept, exit: EventFd) -> io::Result<JoinHandle<bool>> {
    let name = format!("ctl-{}", served.device.name());
    std::thread::Builder::new().name(name).spawn(move || {
        let name = format!("{} {}", served.device.kind(), served.device.name());
        let mut clean = true;
        loop {
            match accept(&exit) {
                Ok(Some(socket)) => {
                    tracing::info!("{name}: front-end connected");
                    let (end, stopped) = serve(&served, socket, &exit);
                    clean = stopped;
                    tracing::info!("{name}: session ended: {end}");
                    if matches!(end, SessionEnd::Exit) {
                        return clean;
                    }
                }
                Ok(None) => return clean,
                Err(error) => {
                    tracing::error!("{name}: no more front-ends can connect: {error}");
                    return false;
                }
            }
        }
    })
}

/// Serves one connection from its first message. Returns how it ended, and whether every vring
/// could be stopped.
pub fn serve(served: &Served, socket: UnixStream, exit: &EventFd) -> (SessionEnd, bool) {
    let session = DeviceSession::new(Arc::clone(&served.device), Arc::clone(&served.runner));
    let session = Arc::new(Shared::new(session));
    match FrontDoor::new(socket, Arc::clone(&session)) {
        Ok(mut door) => {
            let end = door.serve(exit);
            let stopped = lock(&session).stop_all().is_ok();
            (end, stopped)
        }
        Err(error) => (SessionEnd::Socket(error), true),
    }
}

/// A session that is saved or resumed in its middle, one message at a time.
pub struct Resumable {
    door: FrontDoor,
    session: Arc<Shared>,
}

impl core::fmt::Debug for Resumable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Resumable")
            .field("state", &lock(&self.session).state)
            .finish()
    }
}

impl Resumable {
    /// A session from its first message.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn begin(served: &Served, socket: UnixStream) -> io::Result<Resumable> {
        let session = DeviceSession::new(Arc::clone(&served.device), Arc::clone(&served.runner));
        let session = Arc::new(Shared::new(session));
        Ok(Resumable {
            door: FrontDoor::new(socket, Arc::clone(&session))?,
            session,
        })
    }

    /// A session that goes on where [`Resumable::save`] left it.
    ///
    /// # Errors
    /// When the state does not fit the device, or its memory can't be mapped.
    pub fn resume(
        served: &Served,
        socket: UnixStream,
        state: SessionState,
        fds: SessionFds,
    ) -> io::Result<Resumable> {
        let device = Arc::clone(&served.device);
        let session = DeviceSession::resume(device, Arc::clone(&served.runner), state, fds)
            .map_err(io::Error::other)?;
        let session = Arc::new(Shared::new(session));
        match FrontDoor::resume(socket, Arc::clone(&session)) {
            Ok(door) => Ok(Resumable { door, session }),
            Err(error) => {
                // The vrings that run again are nobody's now.
                lock(&session).stop_all().map_err(io::Error::other)?;
                Err(error)
            }
        }
    }

    /// Serves one message.
    ///
    /// # Errors
    /// How the session ended.
    pub fn step(&mut self, exit: &EventFd) -> Result<(), SessionEnd> {
        self.door.step(exit)
    }

    /// Stops the vrings and takes everything that is needed to go on elsewhere. The connection
    /// stays open as long as the caller has another handle on it.
    ///
    /// # Errors
    /// When a vring can't be stopped.
    pub fn save(self) -> io::Result<(SessionState, SessionFds)> {
        let mut session = lock(&self.session);
        session.stop_all().map_err(io::Error::other)?;
        Ok((session.state.clone(), core::mem::take(&mut session.fds)))
    }
}
