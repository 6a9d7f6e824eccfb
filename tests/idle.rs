//! What an idle daemon costs: almost nothing when it may sleep, a whole core when it must spin.
//!
//! CPU time is read from /proc, over a span in which nothing happens; that span is the one thing
//! here that is waited for by time.

mod support;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::netns::Netns;
    use super::support::tmp::TempDir;

    const SPAN: Duration = Duration::from_secs(2);

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
        let used = daemon.cpu_share(SPAN);
        assert!(used < 0.01, "{:.1} % of a core", used * 100.0);
    }

    /// Queues of a tap that no guest uses are detached, and epoll says at once that they have an
    /// error.
    #[test]
    fn an_idle_tap_with_several_queues_uses_under_one_percent_of_a_core() {
        let (dir, netns) = (TempDir::new("idle"), Netns::new());
        let socket = dir.path("n.sock").display().to_string();
        let net = format!(
            "socket={socket},link=tap:vt0,queues=4,netns={}",
            netns.name()
        );
        for idle in ["adaptive", "interrupt"] {
            let daemon = Daemon::start(&["run", "--core", "1", "--idle", idle, "--net", &net]);
            let used = daemon.cpu_share(SPAN);
            assert!(used < 0.01, "{idle}: {:.1} % of a core", used * 100.0);
        }
    }

    #[test]
    fn a_spinning_worker_never_blocks() {
        let dir = TempDir::new("spin");
        let daemon = devices(&dir, "spin", 2);
        let before = worker_blocks(daemon.pid());
        let used = daemon.cpu_share(SPAN);
        assert_eq!(worker_blocks(daemon.pid()), before, "it blocked");
        assert!(
            used > 0.1,
            "{:.1} % of a core: it does not spin",
            used * 100.0
        );
    }
}
