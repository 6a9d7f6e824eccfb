//! Uplinks: ports of a switch behind which is an interface of the host and not a guest.

use std::io;
use std::sync::Arc;

use crate::device::net::{NetCounters, QueueCounters, Tally};
use crate::host::limit::PortLimits;
use crate::host::net::{DropReason, Frame, FrameBurst, FrameSink, FrameSource, Verdict};
use crate::host::switch::{AGEING, PortRules};
use crate::host::tap::{self, TapQueue};
use crate::host::xdp::XdpQueue;
use crate::memory::Segments;
use crate::sys::tap::Tap;
use crate::sys::xdp::Xdp;

use super::build::EngineOptions;
use super::counted;
use super::link::HostPorts;

/// The interface behind an uplink.
#[derive(Debug, Clone)]
pub enum Host {
    /// A tap, of which one queue is used.
    Tap(Arc<Tap>),
    /// An interface through AF_XDP, of which one queue is used.
    Xdp(Arc<Xdp>),
}

/// An uplink, before the engine starts.
#[derive(Debug, Clone)]
pub struct Uplink {
    /// Number of the switch.
    pub switch: usize,
    /// What is chosen about the port.
    pub rules: PortRules,
    /// What is behind it.
    pub host: Host,
    /// What is counted: `tx` is what the host sends into the switch, `rx` what it is given.
    pub counters: Arc<NetCounters>,
    /// How much that may be.
    pub limits: Arc<PortLimits>,
}

impl Uplink {
    /// The host's side is told what we can do.
    pub(super) fn start(&self) -> io::Result<()> {
        match &self.host {
            Host::Tap(tap) => {
                tap::leave_all_undone(tap)?;
                tap.set_attached(0, true)
            }
            Host::Xdp(xdp) => xdp.set_receiving(0, true),
        }
    }

    /// What the kernel counts of its interface, by name.
    pub fn host_counters(&self) -> Vec<(&'static str, u64)> {
        match &self.host {
            Host::Tap(tap) => counted::of_tap(tap),
            Host::Xdp(xdp) => counted::of_xdp(xdp),
        }
    }
}

impl EngineOptions {
    /// Seconds after which the switch with this number forgets a station.
    pub(super) fn ageing_of(&self, switch: usize) -> u32 {
        let own = self.ageing.iter().find(|(number, _)| *number == switch);
        own.map_or(AGEING, |(_, ageing)| *ageing)
    }
}

/// A host port, by its place in the worker's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostEnd {
    /// A tap queue.
    Tap(usize),
    /// A queue of an interface.
    Xdp(usize),
}

/// An uplink on its worker, as its switch sees it.
#[derive(Debug)]
pub(crate) struct HostOutlet {
    end: HostEnd,
    counters: Arc<QueueCounters>,
    limits: Arc<PortLimits>,
}

impl HostOutlet {
    /// Opens the uplink among `ports`; `None` when its interface has no queue left.
    pub(crate) fn open(uplink: &Uplink, ports: &mut HostPorts) -> Option<HostOutlet> {
        let end = match &uplink.host {
            Host::Tap(tap) => {
                ports.taps.push(TapQueue::new(tap, 0)?.with_pool());
                HostEnd::Tap(ports.taps.len() - 1)
            }
            Host::Xdp(xdp) => {
                ports.xdps.push(XdpQueue::take(xdp)?);
                HostEnd::Xdp(ports.xdps.len() - 1)
            }
        };
        Some(HostOutlet {
            end,
            counters: Arc::clone(uplink.counters.pair(0)?),
            limits: Arc::clone(&uplink.limits),
        })
    }

    /// Where it is.
    pub(crate) fn end(&self) -> HostEnd {
        self.end
    }

    /// Fills the empty `burst` with what the host sends.
    pub(crate) fn receive(&self, ports: &mut HostPorts, burst: &mut FrameBurst) -> usize {
        let count = match self.end {
            HostEnd::Tap(at) => ports.taps[at].receive(burst),
            HostEnd::Xdp(at) => {
                ports.xdps[at].go_on();
                ports.xdps[at].receive(burst)
            }
        };
        if count > 0 && self.limits.ingress.is_on() {
            self.limits.ingress.police(&mut burst.frames);
        }
        count
    }

    /// Ends the burst, whose frames are all decided.
    pub(crate) fn complete(&self, ports: &mut HostPorts, burst: &mut FrameBurst) {
        if self.limits.ingress.is_on() {
            self.limits.ingress.charge_frames(&burst.frames);
        }
        self.counters.tx.add(&tally(&burst.frames));
        match self.end {
            HostEnd::Tap(at) => ports.taps[at].complete(burst),
            HostEnd::Xdp(at) => ports.xdps[at].complete(burst),
        }
    }

    /// Gives the host what it has room for; the rest is dropped. Returns whether a frame's memory
    /// was not accessible.
    pub(crate) fn transmit(
        &self,
        ports: &mut HostPorts,
        frames: &mut [Frame],
        segments: &Segments,
    ) -> bool {
        let limit = &self.limits.egress;
        if limit.is_on() {
            limit.police(frames);
        }
        let fault = match self.end {
            HostEnd::Tap(at) => {
                ports.taps[at].transmit(frames, segments);
                ports.taps[at].take_guest_fault()
            }
            HostEnd::Xdp(at) => {
                ports.xdps[at].transmit(frames, segments);
                ports.xdps[at].flush();
                false
            }
        };
        for frame in frames.iter_mut().filter(|f| f.verdict == Verdict::Retry) {
            frame.verdict = Verdict::Dropped(DropReason::HostFull);
        }
        if limit.is_on() {
            limit.charge_sent(frames);
        }
        self.counters.rx.add(&tally(frames));
        fault
    }
}

fn tally(frames: &[Frame]) -> Tally {
    let mut tally = Tally::default();
    frames.iter().for_each(|frame| tally.frame(frame));
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_has_its_ageing_time_or_the_usual() {
        let options = EngineOptions {
            ageing: vec![(3, 10), (0, 1_000_000)],
            ..EngineOptions::default()
        };
        let times = [0, 1, 2, 3].map(|switch| options.ageing_of(switch));
        assert_eq!(times, [1_000_000, 300, 300, 10]);
    }
}
