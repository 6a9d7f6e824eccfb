//! `Limit`: how much may pass in a second, in pieces and in size, for any number of workers.
//!
//! For each of the two there is one number: the time at which everything that passed would have
//! passed at the rate allowed (the generic cell rate algorithm). What comes after it may pass, and
//! moves it on by its own share; so what has passed is exact in the long run, however late or
//! in whatever bursts it is asked for. The number never lies further back than the burst, which is
//! what a pause can save up. Workers share it without a lock; without a limit nothing is touched.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::net::{DropReason, Frame, Verdict};

mod disk;
mod turns;

pub use disk::{BURST_DISK, Direction, DiskLimits, DiskRates, LimitSet, QueueLimits};

/// Parts of a nanosecond that time is counted in: the share of a small frame is few nanoseconds.
const TICKS_PER_NANO: u64 = 16;
const TICKS_PER_SECOND: u64 = 1_000_000_000 * TICKS_PER_NANO;
/// What a pause saves up unless something else is chosen.
pub const BURST_DEFAULT: Duration = Duration::from_millis(10);

/// What is chosen about a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Frames or requests in a second, at least 1; `None` for as many as come.
    pub count: Option<u64>,
    /// Bits or bytes in a second, at least 1; `None` for as many as come.
    pub size: Option<u64>,
    /// How much may pass at once after a pause: what the rate gives in this time.
    pub burst: Duration,
}

impl Default for Rates {
    fn default() -> Rates {
        Rates {
            count: None,
            size: None,
            burst: BURST_DEFAULT,
        }
    }
}

/// One of the two rates.
#[derive(Debug, Default)]
struct Bucket {
    /// Per second; 0 for no limit.
    rate: AtomicU64,
    /// When what has passed is paid for, in ticks.
    due: AtomicU64,
}

impl Bucket {
    /// Ticks that one unit takes; 0 without a limit.
    #[expect(clippy::cast_precision_loss, reason = "a rate, good to 2^-52")]
    fn share(&self) -> f64 {
        match self.rate.load(Relaxed) {
            0 => 0.0,
            rate => TICKS_PER_SECOND as f64 / rate as f64,
        }
    }

    /// Ticks that may be spent at `now`; negative while something is still to be paid for.
    #[expect(clippy::cast_possible_wrap, reason = "ticks of centuries fit")]
    fn credit(&self, now: u64, burst: u64) -> i64 {
        let due = self.due.load(Relaxed).max(now.saturating_sub(burst));
        now as i64 - due as i64
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "ticks, not negative"
    )]
    fn charge(&self, now: u64, burst: u64, units: u64) {
        let share = self.share();
        if share > 0.0 {
            let ticks = (units as f64 * share) as u64;
            let floor = now.saturating_sub(burst);
            let paid = |due: u64| Some(due.max(floor).saturating_add(ticks));
            let _ = self.due.fetch_update(Relaxed, Relaxed, paid);
        }
    }
}

/// A limit, shared by all that it holds for. Changed at any time.
#[derive(Debug, Default)]
pub struct Limit {
    is_on: AtomicBool,
    count: Bucket,
    size: Bucket,
    /// In ticks.
    burst: AtomicU64,
}

/// The one clock of all limits.
fn elapsed() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Ticks on it.
fn now() -> u64 {
    ticks(elapsed())
}

/// A span of time in ticks.
fn ticks(span: Duration) -> u64 {
    let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
    nanos.saturating_mul(TICKS_PER_NANO)
}

/// What may pass now, for one burst.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    credit: [i64; 2],
    share: [f64; 2],
}

impl Allowance {
    /// As much as comes.
    const FREE: Allowance = Allowance {
        credit: [0; 2],
        share: [0.0; 2],
    };

    /// Whether one more of `size` may pass; counts it then. The last one may be larger than what
    /// is left: it is paid for later.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "ticks of one piece"
    )]
    pub fn take(&mut self, size: u64) -> bool {
        if !self.is_left() {
            return false;
        }
        self.credit[0] -= self.share[0] as i64;
        self.credit[1] -= (size as f64 * self.share[1]) as i64;
        true
    }

    /// Whether anything may pass.
    #[inline]
    pub fn is_left(&self) -> bool {
        self.credit[0] >= 0 && self.credit[1] >= 0
    }

    /// Ticks until something may pass.
    fn owed(&self) -> u64 {
        let least = self.credit[0].min(self.credit[1]);
        if least < 0 { least.unsigned_abs() } else { 0 }
    }
}

impl Limit {
    /// Chooses other rates, from now on.
    pub fn set(&self, rates: Rates) {
        self.set_at(now(), rates);
    }

    fn set_at(&self, now: u64, rates: Rates) {
        self.count.rate.store(rates.count.unwrap_or(0), Relaxed);
        self.size.rate.store(rates.size.unwrap_or(0), Relaxed);
        self.burst.store(ticks(rates.burst), Relaxed);
        // What was paid for at the old rate is not owed at the new one.
        for bucket in [&self.count, &self.size] {
            bucket.due.store(now, Relaxed);
        }
        let is_on = rates.count.is_some() || rates.size.is_some();
        self.is_on.store(is_on, Relaxed);
    }

    /// Whether there is a limit at all.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    /// What may pass now.
    pub fn allowance(&self) -> Allowance {
        self.allowance_at(now(), 0)
    }

    /// What may pass at `now` for somebody who leaves the credit of the last `grace` ticks to
    /// others, but for half a burst's at most: with all of it, he would never get any.
    #[expect(clippy::cast_possible_wrap, reason = "ticks of hours")]
    fn allowance_at(&self, now: u64, grace: u64) -> Allowance {
        let burst = self.burst.load(Relaxed);
        let grace = grace.min(burst / 2) as i64;
        let (share, mut credit) = ([self.count.share(), self.size.share()], [0; 2]);
        for ((credit, share), bucket) in credit.iter_mut().zip(share).zip([&self.count, &self.size])
        {
            if share > 0.0 {
                *credit = bucket.credit(now, burst) - grace;
            }
        }
        Allowance { credit, share }
    }

    /// So many pieces of together `size` have passed.
    pub fn charge(&self, count: u64, size: u64) {
        self.charge_at(now(), count, size);
    }

    fn charge_at(&self, now: u64, count: u64, size: u64) {
        let burst = self.burst.load(Relaxed);
        self.count.charge(now, burst, count);
        self.size.charge(now, burst, size);
    }

    /// When something may pass again; `None` when something may now.
    pub fn wait(&self) -> Option<Duration> {
        let owed = self.allowance().owed();
        (owed > 0).then(|| Duration::from_nanos(owed / TICKS_PER_NANO))
    }
}

/// The limits of a port: frames and bits of Ethernet, without preamble and check sequence.
#[derive(Debug, Default)]
pub struct PortLimits {
    /// What the guest sends.
    pub ingress: Limit,
    /// What the guest receives.
    pub egress: Limit,
}

impl Limit {
    /// Drops what is too much of `frames`. Returns how many. What passed is charged when it is
    /// known to have gone: [`Limit::charge_frames`].
    pub fn police(&self, frames: &mut [Frame]) -> u64 {
        let mut allowance = self.allowance();
        let mut dropped = 0;
        for frame in frames {
            if frame.verdict == Verdict::Retry && !allowance.take(u64::from(frame.bytes) * 8) {
                frame.verdict = Verdict::Dropped(DropReason::Policed);
                dropped += 1;
            }
        }
        dropped
    }

    /// How many of the first `frames` are within the limit: of the others, none may pass. What
    /// passed is charged when it is known to have gone: [`Limit::charge_sent`].
    pub fn within(&self, frames: &[Frame]) -> usize {
        let mut allowance = self.allowance();
        let beyond = frames.iter().position(|frame| {
            frame.verdict == Verdict::Retry && !allowance.take(u64::from(frame.bytes) * 8)
        });
        beyond.unwrap_or(frames.len())
    }

    /// Charges the frames that do not come again. Those that were lost elsewhere have passed here.
    pub fn charge_frames(&self, frames: &[Frame]) {
        let (mut count, mut bits) = (0, 0);
        for frame in frames {
            match frame.verdict {
                Verdict::Retry | Verdict::Dropped(DropReason::Policed) => {}
                Verdict::Sent | Verdict::Dropped(_) => {
                    count += 1;
                    bits += u64::from(frame.bytes) * 8;
                }
            }
        }
        if count > 0 {
            self.charge(count, bits);
        }
    }

    /// Charges the frames that were delivered.
    pub fn charge_sent(&self, frames: &[Frame]) {
        let sent = frames.iter().filter(|f| f.verdict == Verdict::Sent);
        let (count, bytes) = sent.fold((0, 0), |(count, bytes), frame| {
            (count + 1, bytes + u64::from(frame.bytes))
        });
        if count > 0 {
            self.charge(count, bytes * 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::net::Cast;

    const SECOND: u64 = TICKS_PER_SECOND;

    /// Offers pieces of `size` every `every` ticks for ten seconds; how many pass in each second.
    fn passed(rates: Rates, size: u64, every: u64, at_once: u64) -> Vec<u64> {
        let limit = Limit::default();
        limit.set(rates);
        let burst = limit.burst.load(Relaxed);
        let first = limit.count.due.load(Relaxed);
        let mut seconds = vec![0; 10];
        let mut now = first;
        while now < first + 10 * SECOND {
            let share = [limit.count.share(), limit.size.share()];
            let credit = |bucket: &Bucket, share| {
                if share > 0.0 {
                    bucket.credit(now, burst)
                } else {
                    0
                }
            };
            let mut allowance = Allowance {
                credit: [
                    credit(&limit.count, share[0]),
                    credit(&limit.size, share[1]),
                ],
                share,
            };
            let count = (0..at_once).filter(|_| allowance.take(size)).count() as u64;
            limit.count.charge(now, burst, count);
            limit.size.charge(now, burst, count * size);
            seconds[usize::try_from((now - first) / SECOND).unwrap()] += count;
            now += every;
        }
        seconds
    }

    #[test]
    fn as_much_passes_as_was_chosen_whatever_is_offered() {
        let rates = |count, size| Rates {
            count,
            size,
            ..Rates::default()
        };
        for (rates, size, every, at_once, wanted) in [
            (rates(Some(1000), None), 800, SECOND / 100_000, 1, 1000),
            (rates(Some(1000), None), 800, SECOND / 1000, 256, 1000),
            (rates(Some(7), None), 800, SECOND / 1000, 256, 7),
            (rates(None, Some(8_000_000)), 8000, SECOND / 2000, 2, 1000),
            (rates(None, Some(8_000_000)), 524_400, SECOND / 1000, 1, 15),
            (
                rates(Some(500), Some(80_000_000)),
                8000,
                SECOND / 1000,
                9,
                500,
            ),
            (
                rates(Some(50_000), Some(8_000_000)),
                8000,
                SECOND / 1000,
                9,
                1000,
            ),
            // Below the limit nothing is lost.
            (rates(Some(1000), None), 800, SECOND / 900, 1, 900),
            (
                rates(None, Some(100_000_000_000)),
                512,
                SECOND / 1_000_000,
                1,
                1_000_000,
            ),
        ] {
            let seconds = passed(rates, size, every, at_once);
            let all: u64 = seconds.iter().sum();
            // What the burst gives comes once.
            let slack = wanted / 5 + 10;
            assert!(
                (wanted * 10 - 10..=wanted * 10 + slack).contains(&all),
                "{rates:?}: {seconds:?}"
            );
            for (number, second) in seconds.iter().enumerate().skip(1) {
                let near = second.abs_diff(wanted) <= wanted / 33 + 1;
                assert!(near, "{rates:?}, second {number}: {seconds:?}");
            }
        }
    }

    #[test]
    fn a_pause_saves_up_no_more_than_the_burst() {
        let limit = Limit::default();
        limit.set(Rates {
            count: Some(1000),
            size: None,
            burst: Duration::from_millis(20),
        });
        let burst = limit.burst.load(Relaxed);
        let later = now() + 60 * SECOND;
        let mut allowance = Allowance {
            credit: [limit.count.credit(later, burst), 0],
            share: [limit.count.share(), 0.0],
        };
        let passed = (0..100).filter(|_| allowance.take(1)).count();
        assert_eq!(passed, 21, "twenty saved up, and one on credit");
    }

    #[test]
    fn without_a_limit_all_passes_and_a_limit_comes_and_goes() {
        let limit = Limit::default();
        assert!(!limit.is_on());
        let mut frames = [Frame {
            header: crate::host::net::VnetHeader::PLAIN,
            first: 0,
            count: 1,
            bytes: 1000,
            verdict: Verdict::Retry,
            cast: Cast::Unicast,
        }; 50];
        assert_eq!(limit.police(&mut frames), 0);
        limit.set(Rates {
            count: Some(10),
            size: Some(8_000),
            burst: Duration::from_secs(1),
        });
        assert!(limit.is_on());
        limit.charge(1, 80_000);
        assert!(
            limit
                .wait()
                .is_some_and(|wait| wait > Duration::from_secs(7))
        );
        assert_eq!(limit.police(&mut frames), 50);
        for frame in &mut frames {
            frame.verdict = Verdict::Retry;
        }
        limit.set(Rates::default());
        assert_eq!((limit.is_on(), limit.wait()), (false, None));
        assert_eq!(limit.police(&mut frames), 0);
    }

    #[test]
    fn only_what_is_gone_is_charged() {
        let limit = Limit::default();
        limit.set(Rates {
            count: Some(1),
            ..Rates::default()
        });
        let frame = |verdict| Frame {
            header: crate::host::net::VnetHeader::PLAIN,
            first: 0,
            count: 1,
            bytes: 60,
            verdict,
            cast: Cast::Unicast,
        };
        let due = limit.count.due.load(Relaxed);
        limit.charge_frames(&[
            frame(Verdict::Retry),
            frame(Verdict::Dropped(DropReason::Policed)),
        ]);
        assert_eq!(limit.count.due.load(Relaxed), due);
        limit.charge_frames(&[
            frame(Verdict::Sent),
            frame(Verdict::Dropped(DropReason::Sink)),
        ]);
        assert!(limit.count.due.load(Relaxed) >= due + 2 * SECOND);
    }
}
