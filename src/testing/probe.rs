//! The time that a cache line takes from one core to another and back, measured.
//!
//! On a shared host this time decides what a polling back-end and its front-end can reach, and it
//! changes by itself when the host moves virtual processors. A benchmark therefore measures it
//! before and after each run, and compares only runs that were made under the same conditions.
//! So does what the cores get done: a virtual processor is often one of two threads of a core, and
//! the other one may be somebody else's. Neither is a benchmark of this crate: no line of the
//! daemon runs here.

use crate::sys::cpu::{self, CpuError};
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Round trips of one measurement: enough for the mean to settle, under a second when undisturbed.
pub const ROUND_TRIPS: u32 = 2_000_000;

/// Up to this round trip the two cores are taken to share a cache.
const NEAR_MAX_NS: f64 = 200.0;

/// Above this something else ran on one of the cores.
const FAR_MAX_NS: f64 = 700.0;

/// The time after which a measurement is given up: something else holds one of the cores.
const GIVE_UP: Duration = Duration::from_secs(20);

/// States of the ball: with the thread that returns it, with the one that serves, game over.
const SERVED: u32 = 1;
const RETURNED: u32 = 0;
const STOP: u32 = 2;

/// Why the time between two cores could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The two threads need a core each.
    #[error("both ends of the probe are on core {0}")]
    SameCore(usize),
    /// A thread could not be pinned.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The threads hardly advanced, another program holds one of the cores.
    #[error("only {done} round trips in {seconds} s between cores {cores:?}")]
    Stuck {
        /// Round trips that were made.
        done: u32,
        /// The time they took.
        seconds: u64,
        /// The two cores.
        cores: (usize, usize),
    },
}

/// How far two cores are from one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// A round trip of at most 200 ns.
    Near,
    /// Up to 700 ns.
    Far,
    /// Longer: something else ran meanwhile, and the measurement says nothing.
    Disturbed,
}

impl Distance {
    /// The class that a round trip time falls into.
    #[must_use]
    pub fn of(round_trip_ns: f64) -> Self {
        match round_trip_ns {
            ns if ns <= NEAR_MAX_NS => Self::Near,
            ns if ns <= FAR_MAX_NS => Self::Far,
            _ => Self::Disturbed,
        }
    }

    /// The word that tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Disturbed => "disturbed",
        }
    }
}

/// The word that the two threads hand to and fro, alone on its line: 128 bytes, since some
/// processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Ball(AtomicU32);

impl Ball {
    /// Waits for the other side to write anything but `last`, and returns that.
    ///
    /// Spins without the pause hint: the hint's own length, up to 140 cycles, would be measured.
    fn await_change(&self, last: u32) -> u32 {
        loop {
            let now = self.0.load(Ordering::Acquire);
            if now != last {
                return now;
            }
        }
    }
}

/// The mean round trip in nanoseconds between two cores, over `round_trips` of them.
///
/// The calling thread is not pinned.
///
/// # Errors
/// When the cores are one and the same, can't be used, or are in use by something else.
pub fn round_trip_ns(near: usize, far: usize, round_trips: u32) -> Result<f64, ProbeError> {
    if near == far {
        return Err(ProbeError::SameCore(near));
    }
    let ball = &Ball::default();
    thread::scope(|scope| {
        let (ready, is_ready) = mpsc::channel();
        scope.spawn(move || {
            let pinned = cpu::pin_to_core(far);
            let plays = pinned.is_ok();
            if ready.send(pinned).is_ok() && plays {
                return_all(ball);
            }
        });
        let server = scope.spawn(move || {
            let returner = is_ready.recv().expect("sent before anything can fail");
            let served = returner
                .and_then(|()| cpu::pin_to_core(near))
                .map_err(ProbeError::from)
                .and_then(|()| serve(ball, (near, far), round_trips));
            ball.0.store(STOP, Ordering::Release);
            served
        });
        server.join().expect("serving has no way to panic")
    })
}

/// Hands the ball over and waits for it to come back, again and again.
fn serve(ball: &Ball, cores: (usize, usize), round_trips: u32) -> Result<f64, ProbeError> {
    let start = Instant::now();
    for done in 0..round_trips {
        ball.0.store(SERVED, Ordering::Release);
        ball.await_change(SERVED);
        if done % 256 == 0 && start.elapsed() > GIVE_UP {
            return Err(ProbeError::Stuck {
                done,
                seconds: start.elapsed().as_secs(),
                cores,
            });
        }
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(round_trips))
}

/// Hands every ball back, until told to stop.
fn return_all(ball: &Ball) {
    while ball.await_change(RETURNED) != STOP {
        ball.0.store(RETURNED, Ordering::Release);
    }
}

/// How often [`speeds`] measures, and how long.
const SPEED_SAMPLES: u32 = 3;
const SPEED_TIME: Duration = Duration::from_millis(5);

/// What two cores get done when both are busy, in steps per microsecond of a loop that has always
/// several instructions to choose from: it halves, nearly, while another program uses the second
/// thread of the core. The best of three, so that it takes a program that stays.
///
/// # Errors
/// When the cores are one and the same, or can't be used.
pub fn speeds(cores: [usize; 2]) -> Result<[f64; 2], ProbeError> {
    if cores[0] == cores[1] {
        return Err(ProbeError::SameCore(cores[0]));
    }
    let start = &Barrier::new(2);
    thread::scope(|scope| {
        let speeds = cores.map(|core| {
            scope.spawn(move || {
                let pinned = cpu::pin_to_core(core);
                start.wait();
                let samples = (0..SPEED_SAMPLES).map(|_| steps_per_us());
                pinned.map(|()| samples.fold(0.0, f64::max))
            })
        });
        let [first, second] = speeds.map(|speed| speed.join().expect("has no way to panic"));
        Ok([first?, second?])
    })
}

fn steps_per_us() -> f64 {
    const STEPS: u32 = 10_000;
    let mut lanes = [1_u64, 2, 3, 4, 5, 6, 7, 8];
    let (start, mut steps) = (Instant::now(), 0_u32);
    while start.elapsed() < SPEED_TIME {
        for _ in 0..STEPS {
            for lane in &mut lanes {
                *lane ^= *lane << 7;
                *lane ^= *lane >> 9;
            }
        }
        lanes = black_box(lanes);
        steps += STEPS;
    }
    f64::from(steps) / start.elapsed().as_secs_f64() / 1e6
}

/// Whether a core's `speeds` are those of one state: a core that is shared or not from one
/// measurement to the next has changed by more than this share.
pub fn is_steady(speeds: impl IntoIterator<Item = f64>) -> bool {
    const CHANGE_MAX: f64 = 1.25;
    let bounds = |(least, most): (f64, f64), speed: f64| (least.min(speed), most.max(speed));
    let (least, most) = speeds.into_iter().fold((f64::INFINITY, 0.0), bounds);
    most <= least * CHANGE_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_get_something_done() {
        let cores = cpu::allowed_cores().unwrap();
        if let [one, other, ..] = cores[..] {
            let speeds = speeds([one, other]).unwrap();
            assert!(speeds.iter().all(|&speed| speed > 1.0), "{speeds:?}");
        }
        assert!(matches!(
            speeds([cores[0], cores[0]]),
            Err(ProbeError::SameCore(core)) if core == cores[0]
        ));
        speeds([cores[0], 4095]).unwrap_err();
    }

    #[test]
    fn a_core_that_lost_a_third_is_not_steady() {
        assert!(is_steady([300.0, 330.0, 290.0]));
        assert!(!is_steady([300.0, 200.0]));
        assert!(!is_steady([300.0, 310.0, 460.0]));
    }

    #[test]
    fn classes_meet_at_their_bounds() {
        assert_eq!(Distance::of(90.0), Distance::Near);
        assert_eq!(Distance::of(200.0), Distance::Near);
        assert_eq!(Distance::of(200.1), Distance::Far);
        assert_eq!(Distance::of(700.0), Distance::Far);
        assert_eq!(Distance::of(700.1), Distance::Disturbed);
        assert_eq!(Distance::of(f64::NAN), Distance::Disturbed);
    }

    #[test]
    fn a_round_trip_between_two_cores_takes_time() {
        let cores = cpu::allowed_cores().unwrap();
        if let [near, far, ..] = cores[..] {
            let ns = round_trip_ns(near, far, 1000).unwrap();
            assert!(ns > 1.0 && ns.is_finite(), "{ns} ns");
        }
    }

    #[test]
    fn a_core_that_is_not_there_ends_the_probe() {
        let core = cpu::online_cores().unwrap()[0];
        for (near, far) in [(core, 4095), (4095, core)] {
            let error = round_trip_ns(near, far, 10).unwrap_err();
            assert!(error.to_string().contains("core 4095 is not online"));
        }
        assert!(matches!(
            round_trip_ns(core, core, 10),
            Err(ProbeError::SameCore(c)) if c == core
        ));
    }
}
