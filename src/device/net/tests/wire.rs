//! `Wire`: the transmit queue of one guest and the receive queue of another, without an engine.

use std::sync::Arc;

use super::super::{QueueCounters, RxHandler, TxHandler, feature};
use super::script::{Script, verdicts};
use crate::host::net::{FrameBurst, Verdict, VnetHeader};

/// A sender that can be filled, and a receiver, each with the features that it acknowledged.
pub(super) struct Wire {
    pub(super) from: Script,
    pub(super) tx: TxHandler,
    pub(super) to: Script,
    pub(super) rx: RxHandler,
    pub(super) counters: Arc<QueueCounters>,
    pub(super) burst: FrameBurst,
}

impl Wire {
    pub(super) fn new(size: u16, sender: u64, receiver: u64) -> Wire {
        let counters = Arc::new(QueueCounters::default());
        Wire {
            from: Script::new(1024),
            tx: TxHandler::new(sender | feature::VERSION_1, 1, Arc::default()),
            to: Script::new(size),
            rx: RxHandler::new(receiver | feature::VERSION_1, size, Arc::clone(&counters)),
            counters,
            burst: FrameBurst::new(),
        }
    }

    /// Offers a frame that asks nothing of its receiver, its header in a segment of its own.
    pub(super) fn send_plain(&mut self, frame: &[u8]) {
        self.send(VnetHeader::default().encode(), frame, &[12]);
    }

    /// Offers a frame with the header `vnet`, both cut at `cuts`.
    pub(super) fn send(&mut self, vnet: [u8; 12], frame: &[u8], cuts: &[usize]) {
        self.from.offer_tx(&[vnet.as_slice(), frame].concat(), cuts);
    }

    /// One burst; the verdicts.
    pub(super) fn turn(&mut self) -> Vec<Verdict> {
        self.tx.receive(&mut self.from, &mut self.burst).unwrap();
        let FrameBurst {
            frames, segments, ..
        } = &mut self.burst;
        self.rx.transmit(&mut self.to, frames, segments).unwrap();
        let verdicts = verdicts(&self.burst);
        self.tx.complete(&mut self.from, &mut self.burst);
        verdicts
    }
}
