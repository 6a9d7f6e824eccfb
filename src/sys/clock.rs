//! A clock that costs next to nothing: the CPU's time-stamp counter where it runs evenly.

use std::fs;
use std::time::Instant;

/// Counts ticks from its making on. Copies count the same ticks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    /// The counter at `start`, when it is used.
    first: Option<u64>,
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::new()
    }
}

impl Clock {
    /// A clock that begins now. Without an even counter its ticks are the system's nanoseconds.
    #[must_use]
    pub fn new() -> Clock {
        Clock {
            start: Instant::now(),
            first: runs_evenly().then(counter),
        }
    }

    /// Ticks since the clock was made.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        match self.first {
            Some(first) => counter().wrapping_sub(first),
            None => u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Nanoseconds of a tick, from all the time since the clock was made: the longer that is, the
    /// better it is known. Some milliseconds make it good to a thousandth.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    pub fn nanos_per_tick(&self) -> f64 {
        let ticks = self.now().max(1) as f64;
        match self.first {
            Some(_) => self.start.elapsed().as_nanos() as f64 / ticks,
            None => 1.0,
        }
    }
}

/// Whether the counter has one rate for ever and is the same on all cores, as the kernel sees it.
fn runs_evenly() -> bool {
    if !cfg!(target_arch = "x86_64") {
        return false;
    }
    let Ok(text) = fs::read_to_string("/proc/cpuinfo") else {
        return false;
    };
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| {
        let has = |name| flags.split_whitespace().any(|flag| flag == name);
        has("constant_tsc") && has("nonstop_tsc")
    })
}

#[inline]
fn counter() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reading the counter has no effect; every x86-64 CPU has it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ticks_are_as_long_as_the_systems_time() {
        let clock = Clock::new();
        let (start, first) = (Instant::now(), clock.now());
        while start.elapsed() < Duration::from_millis(20) {}
        let ticks = clock.now() - first;
        let span = start.elapsed().as_nanos();
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        let ratio = ticks as f64 * clock.nanos_per_tick() / span as f64;
        assert!((0.95..1.05).contains(&ratio), "{ratio}");
    }

    #[test]
    fn copies_count_the_same_ticks() {
        let clock = Clock::new();
        let before = clock.now();
        let copy = clock;
        assert!(copy.now() >= before);
    }
}
