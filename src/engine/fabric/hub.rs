//! `Hub`: a gate's part in a switch: a burst goes to several ports, each with its share.

use crate::host::net::{BURST_FRAMES_MAX, DropReason, Frame, FrameBurst, Verdict};
use crate::host::switch::Ways;

use super::super::batch::Batch;
use super::super::worker::Slots;
use super::Fabric;

/// Scratch for one burst.
#[derive(Debug)]
pub(super) struct Hub {
    ways: Ways,
    /// The frames for one port.
    share: Vec<Frame>,
    /// Receive vrings that were given some.
    given: Vec<usize>,
}

impl Default for Hub {
    fn default() -> Hub {
        Hub {
            ways: Ways::new(),
            share: Vec::with_capacity(BURST_FRAMES_MAX),
            given: Vec::with_capacity(crate::host::switch::PORTS_MAX),
        }
    }
}

impl Hub {
    /// Moves at most one burst from the vring at `from`, which entered at queue pair `pair` of
    /// `port`. Nothing waits: what a port has no buffers for is dropped.
    pub(super) fn poll(
        &mut self,
        fabric: &Fabric,
        [port, pair]: [usize; 2],
        from: usize,
        slots: &mut Slots,
        burst: &mut FrameBurst,
        batch: &mut Batch,
    ) -> usize {
        let (Some(switch), Some(source)) = (&fabric.switch, slots.source(from)) else {
            return 0;
        };
        burst.limit = batch.collect(source);
        let count = source.receive(burst);
        if count == 0 {
            return 0;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "ports are few, seconds are 32 bits"
        )]
        let (port, now) = (port as u16, fabric.since.elapsed().as_secs() as u32);
        let FrameBurst {
            frames, segments, ..
        } = burst;
        switch.route(port, now, frames, segments, &mut self.ways);
        let mut ports = self.ways.ports;
        while ports != 0 {
            let to = ports.trailing_zeros() as usize;
            ports &= ports - 1;
            self.share.clear();
            let ways = self.ways.list.iter();
            let own = ways.filter(|way| usize::from(way.port) == to);
            self.share.extend(own.map(|way| way.frame));
            let outlet = fabric.outlet(to, pair);
            match outlet.and_then(|outlet| Some((outlet.slot, slots.sink(outlet.slot)?))) {
                Some((slot, sink)) => {
                    sink.transmit(&mut self.share, segments);
                    sink.refuse(&mut self.share);
                    self.given.push(slot);
                }
                None => self.nobody_at(to, frames),
            }
        }
        if let Some(source) = slots.source_in_any_state(from) {
            source.complete(burst);
        }
        for slot in self.given.drain(..) {
            if let Some(sink) = slots.sink(slot) {
                sink.flush();
            }
        }
        count
    }

    /// Nobody receives at `port`: frames for it alone are lost.
    #[cold]
    fn nobody_at(&self, port: usize, frames: &mut [Frame]) {
        let alone = |way: &&crate::host::switch::Way| way.alone && usize::from(way.port) == port;
        for way in self.ways.list.iter().filter(alone) {
            frames[usize::from(way.index)].verdict = Verdict::Dropped(DropReason::PeerDown);
        }
    }
}
