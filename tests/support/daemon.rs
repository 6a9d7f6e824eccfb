//! The daemon under test: the real binary, with its output at hand.
#![expect(
    clippy::disallowed_types,
    reason = "test output, read by another thread"
)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::deadline::wait_until;
use super::netns::Netns;

/// Longer than any start or stop takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `vringd`.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Starts the daemon and waits until it is ready.
    pub fn start(args: &[&str]) -> Daemon {
        Daemon::spawn(Command::new(env!("CARGO_BIN_EXE_vringd")), args)
    }

    /// As [`Daemon::start`], inside a namespace.
    pub fn start_in(netns: &Netns, args: &[&str]) -> Daemon {
        // `ip netns exec` becomes the daemon, so the pid is the daemon's.
        Daemon::spawn(netns.command(env!("CARGO_BIN_EXE_vringd")), args)
    }

    /// As [`Daemon::start`], by a command that becomes the daemon.
    pub fn spawn(mut command: Command, args: &[&str]) -> Daemon {
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        let log = Arc::new(Mutex::new(String::new()));
        let out = child
            .stdout
            .take()
            .map(|out| Box::new(out) as Box<dyn Read + Send>);
        let err = child
            .stderr
            .take()
            .map(|err| Box::new(err) as Box<dyn Read + Send>);
        let readers = [out, err].into_iter().flatten().map(|from| {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    let mut log = log.lock().expect("no reader panics");
                    log.push_str(&line);
                    log.push('\n');
                }
            })
        });
        let mut daemon = Daemon {
            child,
            readers: readers.collect(),
            log,
        };
        wait_until("the daemon is ready", PATIENCE, || {
            let exited = daemon
                .child
                .try_wait()
                .expect("the daemon can be waited for");
            assert!(
                exited.is_none(),
                "the daemon ended with {exited:?}:\n{}",
                daemon.log()
            );
            daemon
                .log()
                .lines()
                .any(|line| line == "ready")
                .then_some(())
        });
        daemon
    }

    /// Everything that it printed so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no reader panics").clone()
    }

    /// Waits for a line with `needle`; returns the last such line.
    pub fn wait_log(&self, needle: &str, timeout: Duration) -> String {
        self.wait_log_after(0, needle, timeout)
    }

    /// As [`Daemon::wait_log`], in what was printed after the first `position` bytes.
    pub fn wait_log_after(&self, position: usize, needle: &str, timeout: Duration) -> String {
        let what = format!("a log line with {needle:?}");
        wait_until(&what, timeout, || {
            let log = self.log();
            let line = log[position..].lines().rfind(|line| line.contains(needle));
            line.map(ToOwned::to_owned)
        })
    }

    /// Everything that is counted now, as the lines that say it.
    fn counters(&self) -> String {
        let position = self.log().len();
        self.signal(libc::SIGUSR1);
        // Workers come last: no line is left to be taken for one of the next time.
        self.wait_log_after(position, "counters worker=0 ", PATIENCE);
        self.log().split_off(position)
    }

    /// The value in the last line among all counters that has this in it.
    fn counter_in(&self, what: &str, name: &str) -> u64 {
        let all = self.counters();
        let line = all.lines().rfind(|line| line.contains(what));
        value_in(line.unwrap_or_else(|| panic!("no {what} in {all}")), name)
    }

    /// The value of a worker's counter now.
    pub fn worker_counter(&self, worker: usize, name: &str) -> u64 {
        self.counter_in(&format!("counters worker={worker} "), name)
    }

    /// The value of a device's counter now.
    pub fn counter(&self, device: &str, name: &str) -> u64 {
        self.counter_in(&format!("counters device={device} "), name)
    }

    /// What of a device was dropped so far, by name, where it is not nothing.
    pub fn drops(&self, device: &str) -> Vec<String> {
        let (all, start) = (self.counters(), format!("counters device={device} "));
        let lines = all.lines().filter(|line| line.contains(&start));
        let words = lines.flat_map(str::split_whitespace);
        words
            .filter(|word| word.contains("drop") && !word.ends_with("=0"))
            .map(ToOwned::to_owned)
            .collect()
    }

    /// The sum over a device's queues of what is counted for each, as `name` of `rx` or `tx`.
    pub fn queue_counter(&self, device: &str, direction: &str, name: &str) -> u64 {
        let all = self.queue_counters(device);
        let of_name = all.into_iter().filter_map(|(key, value)| {
            let of_queue = key.strip_prefix(direction)?.strip_prefix("_q")?;
            let (_, counted) = of_queue.split_once('_')?;
            (counted == name).then_some(value)
        });
        of_name.sum()
    }

    /// What is counted for one queue of a device now, as `rx_q0_good_packets`; 0 for a queue that
    /// was never in use.
    pub fn one_queue_counter(&self, device: &str, key: &str) -> u64 {
        let mut all = self.queue_counters(device).into_iter();
        all.find_map(|(name, value)| (name == key).then_some(value))
            .unwrap_or(0)
    }

    /// What is counted for each queue of a device now.
    fn queue_counters(&self, device: &str) -> Vec<(String, u64)> {
        let (all, start) = (self.counters(), format!("xstats device={device} "));
        let lines = all.lines().filter(|line| line.contains(&start));
        let words = lines.flat_map(str::split_whitespace);
        let pair = |word: &str| {
            let (name, value) = word.split_once('=')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        words.filter_map(pair).collect()
    }

    /// The share of one core that the daemon uses over `span`.
    pub fn cpu_share(&self, span: Duration) -> f64 {
        let (start, before) = (Instant::now(), self.cpu_seconds());
        std::thread::sleep(span);
        (self.cpu_seconds() - before) / start.elapsed().as_secs_f64()
    }

    /// Seconds of CPU time that it used so far.
    fn cpu_seconds(&self) -> f64 {
        /// Clock ticks per second of /proc/PID/stat; the same on every Linux that we run on.
        const TICKS_PER_SECOND: f64 = 100.0;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.expect("the daemon runs");
        let after_name = stat.rsplit(')').next().expect("a name in parentheses");
        // utime and stime, fields 14 and 15 of the line.
        let times = after_name.split_whitespace().skip(11).take(2);
        times
            .map(|ticks| ticks.parse::<f64>().expect("a number"))
            .sum::<f64>()
            / TICKS_PER_SECOND
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &pid])
            .status();
        assert!(
            sent.expect("kill runs").success(),
            "signal {signal} to {pid}"
        );
    }

    /// Ends it by SIGTERM; returns its exit status and all that it printed.
    pub fn stop(mut self) -> (ExitStatus, String) {
        self.signal(libc::SIGTERM);
        let status = wait_until("the daemon ends", PATIENCE, || {
            self.child.try_wait().expect("the daemon can be waited for")
        });
        for reader in self.readers.drain(..) {
            reader.join().expect("no reader panics");
        }
        (status, self.log())
    }
}

/// The number after `name=` in a line.
fn value_in(line: &str, name: &str) -> u64 {
    let value = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(&format!("{name}=")));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {line}"))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the daemon said:\n{}---", self.log());
        }
    }
}
