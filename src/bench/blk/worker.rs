//! A thread that polls its queues: ramp, measured time, what is in flight then, reading back.

use std::time::{Duration, Instant};

use super::super::BenchError;
use super::super::ring::LoadRing;
use super::queue::{Queue, Tally};
use crate::config::Span;
use crate::sync::{AtomicBool, Counter, Ordering};
use crate::sys::clock::Clock;
use crate::sys::cpu;

/// Rounds over all queues between two looks at the time.
const ROUNDS: usize = 256;

/// How far a worker is.
pub(super) const MEASURING: u64 = 1;
pub(super) const MEASURED: u64 = 2;

/// What a worker shows while it runs. One writer: the worker.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shown {
    /// Requests done since the start.
    pub done: Counter,
    /// Requests in flight.
    pub in_flight: Counter,
    /// 0, then [`MEASURING`], then [`MEASURED`].
    pub phase: Counter,
}

/// What a worker is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    /// The core to be on.
    pub core: Option<usize>,
    /// What comes before the measured time.
    pub ramp: Duration,
    /// How long is measured; with loops until the work is done.
    pub span: Span,
    /// Read back what was written.
    pub read_back: bool,
}

/// What a worker found.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Of the measured time.
    pub tally: Tally,
    /// How long that was.
    pub elapsed: Duration,
    /// Blocks that were checked, at any time.
    pub checked: u64,
}

/// A thread's queues.
#[derive(Debug)]
pub(super) struct Worker<'a, R> {
    queues: Vec<Queue<R>>,
    clock: Clock,
    shown: &'a Shown,
    stop: &'a AtomicBool,
    tally: Tally,
    /// Requests done before `tally` began.
    before: u64,
}

impl<'a, R: LoadRing> Worker<'a, R> {
    /// A worker with these queues, in which nothing is in flight.
    pub(super) fn new(
        queues: Vec<Queue<R>>,
        clock: Clock,
        shown: &'a Shown,
        stop: &'a AtomicBool,
    ) -> Worker<'a, R> {
        Worker {
            queues,
            clock,
            shown,
            stop,
            tally: Tally::default(),
            before: 0,
        }
    }

    /// Does it all. `tell` is called when the phase has changed.
    ///
    /// # Errors
    /// What is wrong with the back-end; [`BenchError::Stopped`] when it was told to stop.
    pub(super) fn run(mut self, order: &Order, tell: impl Fn()) -> Result<Outcome, BenchError> {
        if let Some(core) = order.core {
            cpu::pin_to_core(core).map_err(BenchError::Cores)?;
        }
        self.start();
        if !order.ramp.is_zero() {
            self.flood(true, Some(Instant::now() + order.ramp))?;
        }
        self.begin_count();
        self.shown.phase.set(MEASURING);
        tell();
        let start = Instant::now();
        let end = match order.span {
            Span::Runtime(span) => Some(start + span),
            Span::Loops(_) => None,
        };
        self.flood(true, end)?;
        let elapsed = start.elapsed();
        self.show();
        self.shown.phase.set(MEASURED);
        tell();
        let tally = self.begin_count();
        self.flood(false, None)?;
        if order.read_back {
            self.queues.iter_mut().for_each(Queue::read_back);
            self.start();
            self.flood(true, None)?;
        }
        Ok(Outcome {
            tally,
            elapsed,
            checked: self.queues.iter().map(Queue::checked).sum(),
        })
    }

    fn start(&mut self) {
        for queue in &mut self.queues {
            queue.start(&self.clock, &mut self.tally);
        }
    }

    /// Counts from zero; returns what was counted.
    fn begin_count(&mut self) -> Tally {
        self.before += self.tally.all();
        std::mem::take(&mut self.tally)
    }

    fn show(&self) {
        self.shown.done.set(self.before + self.tally.all());
        let in_flight: usize = self.queues.iter().map(Queue::in_flight).sum();
        self.shown.in_flight.set(in_flight as u64);
    }

    /// Polls until `end`, or until nothing is in flight any more.
    fn flood(&mut self, again: bool, end: Option<Instant>) -> Result<(), BenchError> {
        loop {
            for _ in 0..ROUNDS {
                for queue in &mut self.queues {
                    queue.turn(&self.clock, again, &mut self.tally)?;
                }
            }
            self.show();
            if self.stop.load(Ordering::Relaxed) {
                return Err(BenchError::Stopped);
            }
            if end.is_some_and(|end| Instant::now() >= end)
                || self.queues.iter().all(Queue::is_idle)
            {
                return Ok(());
            }
        }
    }
}
