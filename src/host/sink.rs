//! `SinkPort`: a link that goes nowhere. Every frame is dropped with [`DropReason::Sink`].
//!
//! It measures what a guest can send, and stands in where no receiver is wanted.

use crate::memory::Segments;

use super::net::{DropReason, Frame, FrameSink, Verdict};

/// Drops what it is given.
#[derive(Debug, Default)]
pub struct SinkPort {}

impl SinkPort {
    /// A sink.
    pub fn new() -> SinkPort {
        SinkPort {}
    }
}

impl FrameSink for SinkPort {
    fn transmit(&mut self, frames: &mut [Frame], _segments: &Segments) {
        for frame in frames
            .iter_mut()
            .filter(|frame| frame.verdict == Verdict::Retry)
        {
            frame.verdict = Verdict::Dropped(DropReason::Sink);
        }
    }

    fn flush(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::super::net::{Cast, FrameBurst, VnetHeader};
    use super::*;

    #[test]
    fn a_sink_takes_all_and_keeps_earlier_verdicts() {
        let mut burst = FrameBurst::new();
        let bad = Verdict::Dropped(DropReason::BadChain);
        for verdict in [Verdict::Retry, bad, Verdict::Retry] {
            let header = VnetHeader::default();
            burst.frames.push(Frame {
                header,
                first: 0,
                count: 0,
                bytes: 60,
                verdict,
                cast: Cast::Unicast,
            });
        }
        let mut sink = SinkPort::new();
        sink.transmit(&mut burst.frames, &burst.segments);
        sink.flush();
        let sunk = Verdict::Dropped(DropReason::Sink);
        assert_eq!(
            burst.frames.iter().map(|f| f.verdict).collect::<Vec<_>>(),
            [sunk, bad, sunk]
        );
    }
}
