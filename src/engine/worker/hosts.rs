//! When the host's interfaces are in a worker's epoll.
//!
//! While somebody waits for a socket, the kernel looks whom to wake with each frame that it has
//! sent or received: a tenth of the time that it has for a short one. So they are watched by a
//! worker that sleeps, and not for long after; and only those that somebody reads. The queue of a
//! tap can't be waited for while it is detached, nor later by who began to then, and says at once
//! that it has an error: it is attached before its vring starts or goes on, and watched after that.

use std::io;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::Worker;
use super::park::raw;
use crate::engine::link::End;

/// Turns with work after a sleep before the host's interfaces are not watched any more: more than
/// a worker makes that sleeps now and then.
pub(super) const TURNS_WATCHED: u32 = 1024;
/// Already there (errno 17 on every Linux).
const EEXIST: i32 = 17;

impl Worker {
    /// Has the host's interfaces wake us, or lets them be.
    pub(super) fn watch_hosts(&self, watch: bool) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        let sources = self.live.iter().map(|&at| &self.links[at].source);
        let fds = sources.filter_map(|source| match source {
            End::Tap(at) => Some(raw(&self.ports.taps[*at])),
            End::Xdp(at) => Some(raw(&self.ports.xdps[*at])),
            End::Vring(_) | End::Sink(_) | End::Gate(_) => None,
        });
        let mut answer = Ok(());
        for fd in fds {
            let how = if watch {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            match self.epoll.ctl(how, fd, event) {
                // One queue may be there twice.
                Err(error) if error.raw_os_error() == Some(EEXIST) => {}
                Err(error) => answer = Err(error),
                Ok(()) => {}
            }
        }
        answer
    }

    /// Lets the host's interfaces be until the next sleep, if they are watched.
    pub(super) fn let_hosts_be(&mut self) {
        if self.hosts_watched {
            // What stays in costs time and no more.
            let _ = self.watch_hosts(false);
            self.hosts_watched = false;
        }
    }

    /// A turn with work and without sleep: after many the interfaces are let be.
    pub(super) fn stay_awake(&mut self) {
        self.turns_awake += 1;
        if self.turns_awake == TURNS_WATCHED {
            self.let_hosts_be();
        }
    }
}
