//! `Batch`: how many frames a link takes at a time, and how long it waits for them.
//!
//! Every burst makes a handful of cache lines change hands (both indices, the lines that both sides
//! have just written), whatever its size. While frames keep coming, a burst of 256 therefore costs
//! both sides less per frame than eight of 32. With few frames in flight it is the other way round:
//! whoever takes them all leaves the other side without work, and small bursts keep both busy. How
//! many frames are in flight nobody tells us, so the size is found by trying: a step up is kept
//! when it moves more frames, a step down when it loses none. Rates go up and down by themselves by
//! more than a step is worth, so a trial goes to and fro between the two and takes the middle of
//! what it saw.

use std::time::{Duration, Instant};

use super::endpoint::GuestSource;

/// One size of bursts.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// Frames that a burst waits for.
    wait_for: u16,
    /// Frames that a burst takes.
    take: usize,
}

const fn step(wait_for: u16, take: usize) -> Step {
    Step { wait_for, take }
}

/// The sizes, from the one that suits few frames in flight to the one for many.
const LADDER: [Step; 6] = [
    step(1, 8),
    step(1, 32),
    step(1, 256),
    step(64, 256),
    step(128, 256),
    step(256, 256),
];

/// Where a link begins.
const FIRST: usize = 1;

/// Bursts smaller than this say that the driver waits for us: nothing is gained by waiting for it.
const WORTH_WAITING: usize = 16;

/// A wait ends when the ring has not grown for as long as the driver took, of late, for two of its
/// own bursts: between these bounds.
const QUIET_MIN: Duration = Duration::from_nanos(1500);
const QUIET_MAX: Duration = Duration::from_micros(6);

/// Frames that drivers like to add at a time.
const DRIVER_BURST: f64 = 32.0;

/// A wait ends after this long in any case.
const WAIT_MAX: Duration = Duration::from_micros(40);

/// Small bursts must not each pay for a look at the clock.
const FRAMES_PER_LOOK: usize = 64;

/// How long a step is measured before it is compared.
const WINDOW: Duration = Duration::from_millis(3);

/// Windows without a trial after one that failed; doubled with each failure in a row.
const REST_MIN: u32 = 3;
/// The longest rest between two trials.
const REST_MAX: u32 = 192;

/// Windows with the step that is tried, each after one with the step that is kept.
const PAIRS: usize = 7;

/// A higher step must move this share more; a lower one may lose that share.
const GAIN: f64 = 1.02;
const LOSS: f64 = 0.99;
/// A trial that moves less than this share ends at once.
const HOPELESS: f64 = 0.75;

/// A rate outside these shares of the one before says that the load is another one now, or the
/// cores are at another distance, and what failed may be worth a trial again.
const SAME: core::ops::Range<f64> = 0.6..1.6;

/// What is tried next, in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trial {
    /// One step up.
    Up,
    /// The highest step: where each step gains little, the sum of all is seen better.
    Top,
    /// One step down.
    Down,
}

impl Trial {
    fn next(self) -> Trial {
        match self {
            Trial::Up => Trial::Top,
            Trial::Top => Trial::Down,
            Trial::Down => Trial::Up,
        }
    }

    /// The step to try from `kept`, if there is one.
    fn step(self, kept: usize) -> Option<usize> {
        let top = LADDER.len() - 1;
        match self {
            Trial::Up => (kept < top).then_some(kept + 1),
            Trial::Top => (kept + 1 < top).then_some(top),
            Trial::Down => kept.checked_sub(1),
        }
    }
}

/// The self-tuning target of one link.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The step in use: `kept`, or the one that is being tried.
    step: usize,
    /// The step that has proved best.
    kept: usize,
    /// The kind of the trial that runs or comes next.
    trial: Trial,
    /// Of the trial that runs: frames over those of the window before, with the step that is kept.
    ratios: Vec<f64>,
    /// Frames per second in the last window with the step that is kept.
    rate: f64,
    /// Windows until the next trial.
    rest: u32,
    /// How long to rest after the next trial that fails.
    next_rest: u32,
    /// How long a ring that does not grow is waited for.
    quiet: Duration,
    /// Frames of the last burst.
    last: usize,
    since: Option<Instant>,
    frames: u64,
    /// Frames since the last look at the clock.
    unlooked: usize,
}

impl Batch {
    pub(crate) fn new() -> Batch {
        Batch {
            step: FIRST,
            kept: FIRST,
            trial: Trial::Up,
            ratios: Vec::with_capacity(PAIRS),
            rate: 0.0,
            rest: 0,
            next_rest: REST_MIN,
            quiet: QUIET_MIN,
            last: 0,
            since: None,
            frames: 0,
            unlooked: 0,
        }
    }

    /// Waits while `source` fills, if that has proved worth it. Returns how many frames to take.
    #[inline]
    pub(crate) fn collect(&self, source: &mut (dyn GuestSource + 'static)) -> usize {
        let Step { wait_for, take } = LADDER[self.step];
        if self.last >= WORTH_WAITING && wait_for > 1 {
            wait(source, wait_for, self.quiet);
        }
        take
    }

    /// A burst of `frames` frames moved.
    #[inline]
    pub(crate) fn moved(&mut self, frames: usize) {
        if frames == 0 {
            return;
        }
        self.last = frames;
        self.frames += frames as u64;
        self.unlooked += frames;
        if self.unlooked >= FRAMES_PER_LOOK {
            self.unlooked = 0;
            self.look();
        }
    }

    fn look(&mut self) {
        let now = Instant::now();
        let Some(since) = self.since else {
            self.since = Some(now);
            self.frames = 0;
            return;
        };
        let elapsed = now - since;
        if elapsed < WINDOW {
            return;
        }
        if elapsed > 2 * WINDOW {
            // There was a pause, or there is next to no traffic: that says nothing about the step.
            self.since = Some(now);
            self.frames = 0;
            return;
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "frames of 2 ms are far below 2^52"
        )]
        let rate = self.frames as f64 / elapsed.as_secs_f64();
        self.since = Some(now);
        self.frames = 0;
        self.quiet = Duration::from_secs_f64(2.0 * DRIVER_BURST / rate).clamp(QUIET_MIN, QUIET_MAX);
        self.judge(rate);
    }

    /// A window is over, in which `rate` frames per second moved.
    fn judge(&mut self, rate: f64) {
        if self.step != self.kept {
            self.compare(rate);
            return;
        }
        if !SAME.contains(&(rate / self.rate)) {
            (self.rest, self.next_rest) = (self.rest.min(REST_MIN), REST_MIN);
        }
        self.rate = rate;
        if self.ratios.is_empty() && self.rest > 0 {
            self.rest -= 1;
            return;
        }
        match self.trial.step(self.kept) {
            Some(step) => self.step = step,
            None => self.trial = self.trial.next(),
        }
    }

    /// A window of the trial is over, in which `rate` frames per second moved.
    fn compare(&mut self, rate: f64) {
        let step = core::mem::replace(&mut self.step, self.kept);
        let ratio = rate / self.rate;
        self.ratios.push(ratio);
        if ratio >= HOPELESS && self.ratios.len() < PAIRS {
            return;
        }
        self.ratios.sort_by(f64::total_cmp);
        let enough = if step > self.kept { GAIN } else { LOSS };
        let is_better = ratio >= HOPELESS && self.ratios[PAIRS / 2] > enough;
        self.ratios.clear();
        if is_better {
            (self.kept, self.step, self.next_rest) = (step, step, REST_MIN);
        } else {
            self.trial = self.trial.next();
            self.rest = self.next_rest;
            self.next_rest = (self.next_rest * 2).min(REST_MAX);
        }
    }
}

/// Until `want` frames are there, or no more come.
fn wait(source: &mut (dyn GuestSource + 'static), want: u16, quiet: Duration) {
    let mut have = source.backlog(want);
    // None at all: the turn must go on to others.
    if have >= want || have == 0 {
        return;
    }
    let start = Instant::now();
    let mut grew = start;
    loop {
        core::hint::spin_loop();
        let now_have = source.backlog(want);
        if now_have >= want {
            return;
        }
        let now = Instant::now();
        if now_have > have {
            (have, grew) = (now_have, now);
        } else if now - grew > quiet {
            return;
        }
        if now - start > WAIT_MAX {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs windows with rates as `rate_of` says by step; returns the step that is kept then.
    fn settle(batch: &mut Batch, windows: usize, rate_of: impl Fn(usize) -> f64) -> usize {
        for _ in 0..windows {
            batch.judge(rate_of(batch.step));
        }
        batch.kept
    }

    #[test]
    fn it_climbs_while_a_step_pays_and_comes_down_when_none_does() {
        let mut batch = Batch::new();
        #[expect(clippy::cast_precision_loss, reason = "steps are 0 to 5")]
        let rising = |step: usize| 10.0 + step as f64;
        assert_eq!(settle(&mut batch, 100, rising), LADDER.len() - 1);
        // Fewer frames in flight than the higher steps wait for.
        let falling = |step: usize| if step > 2 { 6.0 } else { 12.0 };
        assert!(settle(&mut batch, 1000, falling) <= 2);
        // A step that makes no difference is not worth the latency.
        assert_eq!(settle(&mut batch, 1000, |_| 12.0), 0);
    }

    #[test]
    fn a_step_that_pays_is_found_in_noise() {
        // A tenth more at the top, in rates that change by more than that from window to window,
        // and halve for whole windows now and then.
        let mut state = 1_u32;
        let mut noisy = |step: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = 0.93 + 0.14 * f64::from(state >> 16) / 65536.0;
            let disturbed = if (state >> 8) & 31 == 0 { 0.5 } else { 1.0 };
            disturbed * noise * if step == LADDER.len() - 1 { 11.0 } else { 10.0 }
        };
        let mut batch = Batch::new();
        let mut at_top = 0;
        for _ in 0..20_000 {
            batch.judge(noisy(batch.step));
            at_top += u32::from(batch.kept == LADDER.len() - 1);
        }
        assert!(
            at_top > 15_000,
            "{at_top} of 20000 windows at the best step"
        );
    }

    #[test]
    fn another_load_is_tuned_anew_without_a_long_rest() {
        let mut batch = Batch::new();
        settle(&mut batch, 4000, |_| 10.0);
        assert_eq!((batch.kept, batch.next_rest), (0, REST_MAX));
        #[expect(clippy::cast_precision_loss, reason = "steps are 0 to 5")]
        let slower = |step: usize| 4.0 + step as f64;
        assert_eq!(settle(&mut batch, 150, slower), LADDER.len() - 1);
    }

    #[test]
    fn failed_trials_become_rare() {
        let mut batch = Batch::new();
        let only_base = |step: usize| if step == FIRST { 10.0 } else { 5.0 };
        let mut lost = 0;
        for _ in 0..4000 {
            lost += u32::from(batch.step != FIRST);
            batch.judge(only_base(batch.step));
        }
        assert!(lost < 60, "{lost} of 4000 windows went to failed trials");
    }

    #[test]
    fn pauses_and_trickles_judge_no_step() {
        let mut batch = Batch::new();
        batch.moved(FRAMES_PER_LOOK);
        batch.since = batch.since.map(|since| since - 3 * WINDOW);
        batch.moved(FRAMES_PER_LOOK);
        assert_eq!((batch.step, batch.rate.to_bits()), (FIRST, 0));
        batch.since = batch.since.map(|since| since - WINDOW);
        batch.moved(FRAMES_PER_LOOK);
        assert!(batch.rate > 0.0, "a window with traffic is judged");
    }
}
