//! What an idle daemon costs: almost nothing when it may sleep, a whole core when it must spin.
//!
//! CPU time is read from /proc, over a span in which nothing happens; that span is the one thing
//! here that is waited for by time.

mod support;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use super::support::daemon::Daemon;
    use super::support::tmp::TempDir;

    /// Clock ticks per second of /proc/PID/stat; the same on every Linux that we run on.
    const TICKS_PER_SECOND: f64 = 100.0;
    const SPAN: Duration = Duration::from_secs(2);

    /// Seconds of CPU time that the process used so far.
    fn cpu_seconds(pid: u32) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let after_name = stat.rsplit(')').next().unwrap();
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
        // utime and stime, fields 14 and 15 counted from 1.
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }

    /// The share of one core that the process used over the span.
    fn share(pid: u32) -> f64 {
        let (start, before) = (Instant::now(), cpu_seconds(pid));
        std::thread::sleep(SPAN);
        (cpu_seconds(pid) - before) / start.elapsed().as_secs_f64()
    }

    /// Voluntary context switches of the worker's thread: how often it blocked.
    fn worker_blocks(pid: u32) -> u64 {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap().path();
            if fs::read_to_string(task.join("comm"))
                .unwrap()
                .starts_with("worker-")
            {
                let status = fs::read_to_string(task.join("status")).unwrap();
                let line = status
                    .lines()
                    .find(|l| l.starts_with("voluntary_ctxt_switches"));
                return line
                    .unwrap()
                    .split_whitespace()
                    .nth(1)
                    .unwrap()
                    .parse()
                    .unwrap();
            }
        }
        panic!("no worker thread");
    }

    /// A daemon with `count` devices of both kinds.
    fn devices(dir: &TempDir, idle: &str, count: usize) -> Daemon {
        let mut args = vec!["run", "--core", "1", "--idle", idle]
            .into_iter()
            .map(String::from);
        let mut args: Vec<String> = args.by_ref().collect();
        for number in 0..count / 2 {
            let socket = |kind: &str| {
                dir.path(&format!("{kind}{number}.sock"))
                    .display()
                    .to_string()
            };
            args.push("--net".into());
            args.push(format!("socket={},link=echo", socket("net")));
            args.push("--blk".into());
            args.push(format!("socket={},backend=ram:16M", socket("disk")));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Daemon::start(&args)
    }

    #[test]
    fn sixteen_idle_devices_use_under_one_percent_of_a_core() {
        let dir = TempDir::new("idle");
        let daemon = devices(&dir, "adaptive", 16);
        let used = share(daemon.pid());
        assert!(used < 0.01, "{:.1} % of a core", used * 100.0);
    }

    #[test]
    fn a_spinning_worker_never_blocks() {
        let dir = TempDir::new("spin");
        let daemon = devices(&dir, "spin", 2);
        let before = worker_blocks(daemon.pid());
        let used = share(daemon.pid());
        assert_eq!(worker_blocks(daemon.pid()), before, "it blocked");
        assert!(
            used > 0.5,
            "{:.1} % of a core: it does not spin",
            used * 100.0
        );
    }
}
