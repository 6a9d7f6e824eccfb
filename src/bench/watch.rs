//! What is looked at while a measurement runs: the back-end's CPU time, and how far it is.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::BenchError;

/// CPU time of all threads of a process until now, in nanoseconds.
///
/// # Errors
/// When the process is gone.
pub(super) fn cpu_time(pid: Option<u32>) -> Result<Option<u64>, BenchError> {
    let Some(pid) = pid else {
        return Ok(None);
    };
    let directory = format!("/proc/{pid}/task");
    let unreadable = |source: io::Error| BenchError::CpuTime {
        pid,
        path: directory.clone(),
        source,
    };
    let mut sum = 0;
    for task in fs::read_dir(&directory).map_err(unreadable)? {
        let path = task.map_err(unreadable)?.path().join("schedstat");
        // A thread may end between the two looks.
        let Ok(text) = fs::read_to_string(path) else {
            continue;
        };
        let time = text
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok());
        sum += time.unwrap_or(0);
    }
    Ok(Some(sum))
}

/// The line that shows on a terminal that something is going on.
#[derive(Debug)]
pub(super) struct Line {
    shown: bool,
    next: Option<Instant>,
    start: Instant,
    done: u64,
    unit: (f64, &'static str),
}

impl Line {
    /// A line that counts in `unit`, so many at a time, with its name; none when `quiet` or without
    /// a terminal.
    pub(super) fn new(quiet: bool, unit: (f64, &'static str)) -> Line {
        let start = Instant::now();
        let wanted = !quiet && io::stderr().is_terminal();
        Line {
            shown: false,
            next: wanted.then(|| start + Duration::from_secs(1)),
            start,
            done: 0,
            unit,
        }
    }

    /// Shows the rate once in a second; `done` is the count until `now`.
    #[expect(clippy::cast_precision_loss, reason = "a rate for the eye")]
    pub(super) fn show(&mut self, now: Instant, done: u64) {
        let Some(next) = self.next.filter(|next| now >= *next) else {
            return;
        };
        let span = (now - next + Duration::from_secs(1)).as_secs_f64();
        let (many, unit) = self.unit;
        let rate = (done - self.done) as f64 / span / many;
        let seconds = (now - self.start).as_secs();
        let _ = write!(io::stderr(), "\r{seconds:4} s {rate:10.3} {unit} ");
        (self.done, self.shown) = (done, true);
        self.next = Some(now + Duration::from_secs(1));
    }
}

impl Drop for Line {
    /// What is printed next has a line of its own.
    fn drop(&mut self) {
        if self.shown {
            let _ = writeln!(io::stderr());
        }
    }
}
