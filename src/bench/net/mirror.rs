//! One queue pair at the far end: every frame received is sent back from the buffer it came in.

use std::sync::Arc;

use super::super::BenchError;
use super::super::ring::{LoadRing, NotInFlight};
use super::layout::{FRAME_AT, Layout};
use super::pair::{BUFFERS_AT, FAR, NEAR, QueuePair, Side, TURN, Tally, address};
use crate::config::BenchNetConfig;
use crate::memory::GuestRam;

/// A queue pair.
#[derive(Debug)]
pub(super) struct Mirror<R> {
    rx: Side<R>,
    tx: Side<R>,
    /// The receive buffer that each id of the transmit ring sends.
    sends: Box<[u16]>,
}

impl<R: LoadRing> Mirror<R> {
    /// Pair `number` in its places of `ram`, all receive buffers posted.
    ///
    /// # Errors
    /// When the places are not in `ram`, or there are no eventfds.
    pub(super) fn new(
        config: &BenchNetConfig,
        ram: &Arc<GuestRam>,
        layout: &Layout,
        number: u16,
    ) -> Result<Mirror<R>, BenchError> {
        let [mut rx, tx] = Side::both(config, ram, layout, number)?;
        rx.post_all();
        Ok(Mirror {
            rx,
            tx,
            sends: vec![0; usize::from(config.ring_size)].into(),
        })
    }

    /// Sends back what came, up to a turn's worth.
    ///
    /// # Errors
    /// When the device breaks the rules of a ring.
    #[inline]
    pub(super) fn turn(&mut self, tally: &mut Tally) -> Result<(), NotInFlight> {
        let (mut sent, mut posted) = (0, 0);
        while sent < TURN && self.tx.ring.ids().room() > 0 {
            let Some((from, written)) = self.rx.ring.used()? else {
                break;
            };
            let Some(id) = self.tx.ring.ids().take() else {
                break;
            };
            let at = self.rx.at(from);
            // A sender's header has no number of buffers (VIRTIO 1.3 §5.1.6.2.1).
            self.rx.buffers.store16(at + BUFFERS_AT, 0);
            address(&self.rx.buffers, at + usize::from(FRAME_AT), NEAR, FAR);
            self.sends[usize::from(id)] = from;
            let addr = self.rx.place.buffers + at as u64;
            self.tx.post_at(id, addr, written);
            sent += 1;
        }
        if sent > 0 {
            self.tx.publish(tally);
        }
        while posted < TURN
            && let Some((id, _)) = self.tx.ring.used()?
        {
            self.tx.ring.ids().put(id);
            self.rx
                .post(self.sends[usize::from(id)], self.rx.place.capacity);
            posted += 1;
        }
        if posted > 0 {
            self.rx.publish(tally);
        }
        Ok(())
    }
}

impl<R: LoadRing> QueuePair for Mirror<R> {
    type Ring = R;

    fn sides(&self) -> [&Side<R>; 2] {
        [&self.rx, &self.tx]
    }
}
