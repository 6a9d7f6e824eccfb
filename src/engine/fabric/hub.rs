//! `Hub`: a gate's part in a switch: a burst goes to several ports, each with its share.

use crate::device::net::Tally;
use crate::host::net::{BURST_FRAMES_MAX, DropReason, Frame, FrameBurst, Verdict};
use crate::host::switch::Ways;
use crate::memory::Segments;
use crate::ring::RingFault;

use super::super::batch::Batch;
use super::super::link::HostPorts;
use super::super::worker::Slots;
use super::{Fabric, drop_waiting};

/// Scratch for one burst.
#[derive(Debug)]
pub(super) struct Hub {
    ways: Ways,
    handed: Handed,
}

/// What became of a burst on its ways.
#[derive(Debug)]
struct Handed {
    /// Receive vrings that were given some.
    given: Vec<usize>,
    /// A frame for an uplink was not accessible memory.
    fault: bool,
}

impl Handed {
    /// Gives `frames` to `port`, whose guest receives on queue pair `pair` or another: nothing
    /// waits there. `false` when nobody receives.
    #[inline]
    fn hand(
        &mut self,
        fabric: &Fabric,
        [port, pair]: [usize; 2],
        slots: &mut Slots,
        ports: &mut HostPorts,
        frames: &mut [Frame],
        segments: &Segments,
    ) -> bool {
        if let Some(host) = fabric.host(port) {
            self.fault |= host.transmit(ports, frames, segments);
            return true;
        }
        let outlet = fabric.outlet(port, pair);
        let sink = outlet.and_then(|outlet| Some((outlet.slot, slots.sink(outlet.slot)?)));
        let Some((slot, sink)) = sink else {
            return false;
        };
        sink.transmit(frames, segments);
        sink.refuse(frames, DropReason::PeerFull);
        self.given.push(slot);
        true
    }
}

impl Hub {
    /// For a switch with so many ports.
    pub(super) fn new(ports: usize) -> Hub {
        Hub {
            ways: Ways::new(ports),
            handed: Handed {
                given: Vec::with_capacity(ports),
                fault: false,
            },
        }
    }

    /// Moves at most one burst from the vring at `from`, which entered at queue pair `pair` of
    /// `port`. Nothing waits: what a port has no buffers for is dropped.
    #[expect(
        clippy::too_many_arguments,
        reason = "what a worker owns, piece by piece"
    )]
    pub(super) fn poll(
        &mut self,
        fabric: &Fabric,
        at: [usize; 2],
        from: usize,
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
        batch: &mut Batch,
    ) -> usize {
        let Some(source) = slots.source(from) else {
            return 0;
        };
        burst.limit = batch.collect(source);
        let count = source.receive(burst);
        if count == 0 {
            return 0;
        }
        self.give(fabric, at, slots, ports, burst);
        let fault = core::mem::take(&mut self.handed.fault);
        if let Some(source) = slots.source_in_any_state(from) {
            source.complete(burst);
            if fault {
                source.latch(RingFault::Memory);
            }
        }
        self.flush(slots);
        count
    }

    /// Moves at most one burst from the uplink at `port`.
    pub(super) fn poll_host(
        &mut self,
        fabric: &Fabric,
        port: usize,
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
    ) -> usize {
        let Some(host) = fabric.host(port) else {
            return 0;
        };
        burst.clear();
        burst.limit = BURST_FRAMES_MAX;
        let count = host.receive(ports, burst);
        if count == 0 {
            return 0;
        }
        self.give(fabric, [port, 0], slots, ports, burst);
        host.complete(ports, burst);
        self.flush(slots);
        count
    }

    /// Finds the ways of a burst, and hands it to the ports.
    fn give(
        &mut self,
        fabric: &Fabric,
        [port, pair]: [usize; 2],
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
    ) {
        let Some(switch) = &fabric.switch else {
            return;
        };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "ports are few, seconds are 32 bits"
        )]
        let (port, now) = (port as u16, fabric.since.elapsed().as_secs() as u32);
        let FrameBurst {
            frames, segments, ..
        } = burst;
        switch.route(port, now, frames, segments, &mut self.ways);
        if let Some(to) = self.ways.whole {
            self.give_whole(fabric, [to.into(), pair], slots, ports, frames, segments);
        } else {
            self.give_shares(fabric, pair, slots, ports, frames, segments);
        }
    }

    /// The whole burst to one port.
    fn give_whole(
        &mut self,
        fabric: &Fabric,
        to: [usize; 2],
        slots: &mut Slots,
        ports: &mut HostPorts,
        frames: &mut [Frame],
        segments: &Segments,
    ) {
        if !self.handed.hand(fabric, to, slots, ports, frames, segments) {
            self.forget(fabric, to[0], frames, segments);
            return drop_waiting(frames, DropReason::PeerDown);
        }
        // What the receiver could not take was lost there, and is counted there.
        for frame in frames {
            frame.verdict = Verdict::Sent;
        }
    }

    /// To each port its share.
    fn give_shares(
        &mut self,
        fabric: &Fabric,
        pair: usize,
        slots: &mut Slots,
        host_ports: &mut HostPorts,
        frames: &mut [Frame],
        segments: &Segments,
    ) {
        let mut ports = self.ways.ports;
        while ports != 0 {
            let to = ports.trailing_zeros() as usize;
            ports &= ports - 1;
            let at = [to, pair];
            if self.ways.is_refused(to) {
                self.count_refused(fabric, at);
            }
            let share = self.ways.share(to);
            if !self
                .handed
                .hand(fabric, at, slots, host_ports, share, segments)
            {
                self.nobody_at(fabric, at, frames, segments);
            }
        }
    }

    /// What was given becomes visible, after what the source gets back.
    fn flush(&mut self, slots: &mut Slots) {
        for slot in self.handed.given.drain(..) {
            if let Some(sink) = slots.sink(slot) {
                sink.flush();
            }
        }
    }

    /// Nobody receives at a port: frames for it alone are lost to their sender, those for all to
    /// the port.
    #[cold]
    fn nobody_at(
        &mut self,
        fabric: &Fabric,
        at: [usize; 2],
        frames: &mut [Frame],
        segments: &Segments,
    ) {
        let mut alone = 0;
        for index in self.ways.alone_for(at[0]) {
            frames[index].verdict = Verdict::Dropped(DropReason::PeerDown);
            self.forget(fabric, at[0], &frames[index..=index], segments);
            alone += 1;
        }
        // What the port was refused is dropped, and counted, already.
        let share = self.ways.share(at[0]).iter();
        let for_all = share
            .filter(|frame| frame.verdict == Verdict::Retry)
            .skip(alone);
        let mut tally = Tally::default();
        for_all.for_each(|_| tally.dropped(DropReason::PeerDown));
        fabric.count_lost(at, &tally);
    }

    /// Who was seen at `port`, where nobody is now, may be anywhere.
    #[cold]
    fn forget(&self, fabric: &Fabric, port: usize, frames: &[Frame], segments: &Segments) {
        #[expect(clippy::cast_possible_truncation, reason = "ports are few")]
        let port = port as u16;
        if let Some(switch) = &fabric.switch {
            switch.forget(port, frames, segments, &self.ways);
        }
    }

    /// Counts what a port is not given of its share, which is dropped already.
    #[cold]
    fn count_refused(&mut self, fabric: &Fabric, at: [usize; 2]) {
        let mut tally = Tally::default();
        self.ways.share(at[0]).iter().for_each(|f| tally.frame(f));
        fabric.count_lost(at, &tally);
    }
}
