//! How a worker sleeps, and what wakes it.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::EpollEvent;

use crate::engine::link::Armed;
use crate::sys::uring::Uring;

use super::{URING_DONE, Worker};

/// Sleep at most this long when something may come without a kick.
const BOUNDED_SLEEP_MS: i32 = 1;

impl Worker {
    /// Turns kicks on, looks once more at everything, sleeps, and turns kicks off again.
    pub(super) fn park(&mut self) {
        // Nobody keeps time while we sleep.
        self.flush_calls(true);
        self.cx.mailbox.parking().announce();
        // Before they are looked at: a frame that comes between wakes us.
        let watched = self.hosts_watched || self.watch_hosts(true).is_ok();
        self.hosts_watched = watched;
        let armed = self.arm().max(self.set_alarm());
        if armed != Armed::Work && self.cx.mailbox.is_empty() {
            let bounded = !watched || armed == Armed::Bounded || self.kickless > 0 || self.stopping;
            let timeout = if bounded { BOUNDED_SLEEP_MS } else { -1 };
            self.counters.parks.add(1);
            self.counters.bounded_parks.add(u64::from(bounded));
            self.sleep(timeout);
        }
        self.cx.mailbox.parking().awake();
        self.turns_awake = 0;
        self.discard_in = 0;
        for &slot in &self.started {
            if let Some(endpoint) = &mut self.slots.0[slot].endpoint {
                endpoint.vring().disarm();
            }
        }
        self.idle.woke();
    }

    /// Sleeps until something is to be looked at, at most `timeout` ms if that is not negative.
    fn sleep(&mut self, timeout: i32) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            // EINTR is a wake-up like any other: everything is polled after it.
            let count = self.epoll.wait(timeout, &mut events).unwrap_or(0);
            // The kernel says twice that an operation is done: when it is, and when we let it tell
            // us. The second is known already.
            let stale = matches!(&events[..count], [one] if one.data() == URING_DONE)
                && !self.cx.uring.as_mut().is_some_and(Uring::has_work);
            if !stale {
                return;
            }
        }
    }

    /// Sees to it that a sleep ends when some disk must be polled whatever comes, or a disabled
    /// vring keeps its frames no longer. An alarm that was set for an earlier sleep may still end
    /// this one: that does no harm.
    fn set_alarm(&mut self) -> Armed {
        let (armed, mut least) = self.arm_disabled();
        if armed == Armed::Work {
            return armed;
        }
        for &slot in &self.disks {
            if let Some(wait) = self.slots.disk(slot).and_then(|disk| disk.wait()) {
                least = Some(least.map_or(wait, |least| least.min(wait)));
            }
        }
        match least {
            None => Armed::Sleep,
            Some(Duration::ZERO) => Armed::Work,
            Some(wait) => match self.alarm.reset(wait, None) {
                Ok(()) => Armed::Sleep,
                Err(_) => Armed::Bounded,
            },
        }
    }

    fn arm(&mut self) -> Armed {
        let completions = self.cx.uring.as_mut().is_some_and(Uring::has_work);
        let mut armed = if completions {
            Armed::Work
        } else {
            Armed::Sleep
        };
        for link in &mut self.links {
            armed = armed.max(link.arm(&mut self.slots, &mut self.ports));
        }
        for inbound in &mut self.inbounds {
            if inbound.has_work() {
                armed = Armed::Work;
            }
        }
        for &slot in &self.disks {
            // What is in flight is answered on a paused ring too.
            let held = self.slots.0[slot].paused || self.slots.0[slot].stopping.is_some();
            if let Some(disk) = self.slots.disk(slot) {
                armed = armed.max(disk.arm(!held));
            }
        }
        armed
    }
}

pub(super) fn raw(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}
