//! `vringd bench net` against a daemon of ours: what it counts, and how it fails.

#[path = "support/mod.rs"]
mod support;

#[cfg(test)]
mod tests {
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::tmp::TempDir;

    /// Longer than any measurement here takes, and any deadline of the command.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// An echo port of two queue pairs and the directory of its socket.
    struct Echo {
        daemon: Daemon,
        socket: String,
        _directory: TempDir,
    }

    impl Echo {
        fn start() -> Echo {
            let directory = TempDir::new("bench");
            let socket = directory.path("s").display().to_string();
            let net = format!("name=n0,socket={socket},link=echo,queues=2");
            Echo {
                daemon: Daemon::start(&["run", "--net", &net]),
                socket,
                _directory: directory,
            }
        }

        fn bench(&self, arguments: &str) -> Output {
            bench(&format!("--socket {} {arguments}", self.socket))
        }
    }

    /// Runs the command to its end, which has to come.
    fn bench(arguments: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vringd"))
            .args(["bench", "net"])
            .args(arguments.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("bench net {arguments} does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.wait_with_output().unwrap()
    }

    fn text(bytes: &[u8]) -> &str {
        str::from_utf8(bytes).unwrap()
    }

    #[track_caller]
    fn fails(output: &Output, status: i32, says: &str) {
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{message}");
        assert!(message.contains(says), "{message}");
        assert_eq!(text(&output.stdout), "");
    }

    #[test]
    fn all_128_queue_pairs_move_frames() {
        let directory = TempDir::new("bench");
        let socket = directory.path("s").display().to_string();
        let net = format!("name=n0,socket={socket},link=echo,queues=128");
        let _daemon = Daemon::start(&["run", "--net", &net]);
        for format in ["split", "packed"] {
            let arguments = format!(
                "--socket {socket} --format {format} --queues 128 --ring-size 64 --size mix \
                 --duration 300ms --json"
            );
            let output = bench(&arguments);
            assert!(output.status.success(), "{}", text(&output.stderr));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{report}"));
            assert!(count("received") >= 128 * 64, "{report}");
            assert_eq!(count("sent"), count("received"), "{report}");
            assert_eq!((count("lost"), count("mismatched")), (0, 0), "{report}");
        }
    }

    #[test]
    fn several_devices_take_turns() {
        let directory = TempDir::new("bench");
        let socket = |number| directory.path(&format!("s{number}")).display().to_string();
        let net = |number| {
            format!(
                "name=n{number},socket={},link=echo,queues=2",
                socket(number)
            )
        };
        let nets: Vec<_> = (0..8).map(net).collect();
        let nets = nets.iter().flat_map(|net| ["--net", net.as_str()]);
        let daemon = Daemon::start(&["run"].into_iter().chain(nets).collect::<Vec<_>>());
        let sockets: String = (0..8).map(|n| format!(" --socket {}", socket(n))).collect();
        let arguments = format!("{sockets} --queues 2 --format packed --size mix --json");
        let output = bench(&format!("{arguments} --duration 300ms"));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{report}"));
        assert_eq!(
            report["sockets"].as_array().map(Vec::len),
            Some(8),
            "{report}"
        );
        assert_eq!(count("sent"), count("received"), "{report}");
        assert_eq!((count("lost"), count("mismatched")), (0, 0), "{report}");
        let served = |number| daemon.counter(&format!("n{number}"), "tx_frames");
        assert!((0..8).all(|number| served(number) >= 2 * 1024), "{report}");
        assert_eq!((0..8).map(served).sum::<u64>(), count("sent"), "{report}");
    }

    /// A limit in the settings holds, and SIGHUP takes over another one while the port is in use.
    #[test]
    fn a_limit_is_changed_by_reading_the_settings_again() {
        let directory = TempDir::new("bench");
        let (socket, file) = (directory.path("s"), directory.path("vringd.toml"));
        let settings = |more: &str| {
            let socket = socket.display();
            let net = format!("[[net]]\nname = \"n0\"\nsocket = \"{socket}\"\nlink = \"echo\"\n");
            std::fs::write(&file, format!("{net}{more}\n")).unwrap();
        };
        settings("ingress_frames = \"20k\"\negress_bits = \"1G\"");
        let daemon = Daemon::start(&["run", "--config", &file.display().to_string()]);
        let arguments = format!("--socket {} --duration 300ms --json", socket.display());
        // What is lost may keep it from measuring anything at all.
        let dropped = || {
            let before = daemon.counter("n0", "tx_drop_policed");
            let output = bench(&arguments);
            (
                output.status.success(),
                daemon.counter("n0", "tx_drop_policed") - before,
            )
        };
        assert!(dropped().1 > 0);

        let reload = |wanted: &str| {
            let position = daemon.log().len();
            daemon.signal(libc::SIGHUP);
            daemon.wait_log_after(position, wanted, PATIENCE);
        };
        settings("ingress_frames = \"many\"");
        reload("the settings stay as they are: ");
        settings("queues = 7");
        reload("net n0: other rates");
        daemon.wait_log("net n0: what else has changed takes a restart", PATIENCE);
        assert_eq!(dropped(), (true, 0));
        settings("ingress_frames = 1000");
        reload("net n0: other rates");
        assert!(dropped().1 > 0);
    }

    #[test]
    fn every_frame_comes_back_in_both_formats_and_modes() {
        let echo = Echo::start();
        let pid = echo.daemon.pid();
        for arguments in [
            "--format split --mode flood",
            "--format packed --mode flood --queues 2 --size mix",
            "--format split --mode pingpong --queues 2",
            "--format packed --mode pingpong --event-idx",
            "--format split --mode flood --queues 2 --in-order --mergeable --event-idx --size 9000",
            "--format packed --in-order --event-idx --ring-size 64 --in-flight 10 --size 60",
        ] {
            let output = echo.bench(&format!("{arguments} --duration 300ms --pid {pid} --json"));
            assert!(
                output.status.success(),
                "{arguments}: {}",
                text(&output.stderr)
            );
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{report}"));
            assert!(count("frames") > 0, "{arguments}: {report}");
            // No frame is shorter than 60 bytes, 480 bits.
            let (gbit, mpps) = (report["gbit_per_s"].as_f64(), report["mpps"].as_f64());
            assert!(
                gbit > mpps.map(|mpps| mpps * 0.479),
                "{arguments}: {report}"
            );
            assert_eq!(count("sent"), count("received"), "{arguments}: {report}");
            assert_eq!(count("lost"), 0, "{arguments}: {report}");
            assert_eq!(count("mismatched"), 0, "{arguments}: {report}");
            assert!(count("backend_cpu_ns") > 0, "{arguments}: {report}");
            let latency = |key: &str| report["latency_ns"][key].as_u64().unwrap();
            assert!(latency("p50") > 0 && latency("p50") <= latency("p99"));
            assert!(latency("p99_9") <= latency("max"), "{arguments}: {report}");
        }
    }

    /// What a run of 300 ms reports: nothing is lost.
    fn measured(socket: &str, arguments: &str) -> Value {
        let output = bench(&format!(
            "--socket {socket} {arguments} --duration 300ms --json"
        ));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["sent"], report["received"], "{arguments}: {report}");
        for key in ["lost", "mismatched"] {
            assert_eq!(report[key], 0, "{arguments}: {report}");
        }
        report
    }

    /// A worker that never sleeps wants no kick. Split rings with EVENT_IDX can't say so: there the
    /// event index is passed once in 2^16 chains of a ring (VIRTIO 1.3 §2.7.7.2).
    #[test]
    fn who_polls_is_not_kicked_and_who_sleeps_is() {
        let directory = TempDir::new("bench");
        let [spins, sleeps] = ["spin", "interrupt"].map(|idle| {
            let socket = directory.path(idle).display().to_string();
            let net = format!("name=n0,socket={socket},link=echo,queues=2");
            (
                Daemon::start(&["run", "--idle", idle, "--net", &net]),
                socket,
            )
        });
        for rings in ["split", "packed", "split --event-idx", "packed --event-idx"] {
            let arguments = format!("--format {rings} --queues 2");
            let report = measured(&spins.1, &arguments);
            let count = |key: &str| report[key].as_u64().unwrap();
            let most = match rings {
                "split --event-idx" => 2 * (count("frames") / (1 << 16) + 2),
                _ => 0,
            };
            assert!(count("frames") > 0 && count("kicks") <= most, "{report}");
            let report = measured(&sleeps.1, &format!("{arguments} --mode pingpong"));
            assert!(report["kicks"].as_u64() > Some(0), "{report}");
        }
    }

    /// The longest rings that there are, full, and more than once around.
    #[test]
    fn rings_of_32768_descriptors_are_used_to_the_last() {
        let echo = Echo::start();
        for format in ["split", "packed"] {
            let report = measured(
                &echo.socket,
                &format!("--format {format} --ring-size 32768"),
            );
            assert_eq!(report["in_flight"], 32768, "{report}");
            assert!(report["received"].as_u64() > Some(32768), "{report}");
        }
    }

    /// Tables and rings of any size, with what else there is; frames come from both ends of a wire,
    /// too, and one larger than a buffer takes several.
    #[test]
    fn indirect_descriptors_and_rings_of_any_size_lose_nothing() {
        let directory = TempDir::new("bench");
        let socket = |name| directory.path(name).display().to_string();
        let port = |name, link| format!("name={name},socket={},{link}", socket(name));
        let nets = [
            ("e", "link=echo,queues=2"),
            ("a", "link=wire:b,hold_us=50000"),
            ("b", "link=wire:a,hold_us=50000"),
        ];
        let nets = nets.map(|(name, link)| port(name, link));
        let nets = nets.iter().flat_map(|net| ["--net", net.as_str()]);
        let daemon = Daemon::start(&["run"].into_iter().chain(nets).collect::<Vec<_>>());
        for (arguments, size) in [
            ("--chains indirect --size mix", 1024),
            (
                "--chains indirect --in-order --event-idx --mergeable --size 9000",
                1024,
            ),
            (
                "--format packed --chains indirect --queues 2 --size mix",
                1024,
            ),
            (
                "--format packed --ring-size 1000 --queues 2 --event-idx",
                1000,
            ),
            (
                "--format packed --ring-size 7 --in-order --chains indirect",
                7,
            ),
            ("--format packed --ring-size 32767 --in-order", 32767),
            (
                "--format packed --ring-size 3 --mode pingpong --chains indirect",
                3,
            ),
        ] {
            let position = daemon.log().len();
            let report = measured(&socket("e"), arguments);
            assert!(report["frames"].as_u64() > Some(0), "{report}");
            let indirect = arguments.contains("indirect");
            let chains = if indirect { "indirect" } else { "direct" };
            assert_eq!(
                (&report["chains"], &report["ring_size"]),
                (&chains.into(), &size.into())
            );
            let line = daemon.wait_log_after(position, "negotiated device=e ", PATIENCE);
            assert_eq!(line.contains("INDIRECT_DESC"), indirect, "{line}");
        }
        for arguments in [
            "--chains indirect --size mix",
            "--format packed --chains indirect --ring-size 100 --size 9000 --mergeable",
        ] {
            there_and_back(&directory, arguments);
        }
    }

    /// `script` gives it a terminal.
    #[test]
    fn who_looks_on_sees_the_rate_once_a_second_and_then_the_table() {
        let directory = TempDir::new("bench");
        let socket = directory.path("s").display().to_string();
        let net = format!("name=n0,socket={socket},link=echo");
        let _daemon = Daemon::start(&["run", "--net", &net]);
        let vringd = env!("CARGO_BIN_EXE_vringd");
        let seen = |more: &str| {
            let command = format!("{vringd} bench net --socket {socket} --duration 2500ms {more}");
            let script = ["-qec", &command, "/dev/null"];
            let output = Command::new("script").args(script).output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stdout));
            text(&output.stdout).to_owned()
        };
        let shown = seen("");
        let rates: Vec<f64> = shown
            .split('\r')
            .filter_map(|line| line.split_once(" s ")?.1.strip_suffix(" Mpps "))
            .map(|rate| rate.trim().parse().unwrap())
            .collect();
        assert_eq!(rates.len(), 2, "{shown:?}");
        assert!(rates.iter().all(|rate| *rate > 0.0), "{shown:?}");
        let table = shown.rfind(" s ").unwrap() < shown.find("latency").unwrap();
        assert!(table, "the table comes last: {shown:?}");
        // Whoever reads by program is not disturbed.
        let report = seen("--json");
        assert!(
            serde_json::from_str::<Value>(report.trim()).is_ok(),
            "{report:?}"
        );
    }

    #[test]
    fn frames_that_are_only_sent_count_when_they_are_taken() {
        let directory = TempDir::new("bench");
        let socket = directory.path("s").display().to_string();
        let net = format!("name=n0,socket={socket},link=sink");
        let daemon = Daemon::start(&["run", "--net", &net]);
        for (arguments, bytes) in [
            ("--format split", 64),
            ("--format packed --tso --size 65535 --ring-size 64", 65535),
        ] {
            let taken = || daemon.counter("n0", "tx_drop_sink");
            let before = taken();
            let output = bench(&format!(
                "--socket {socket} --mode send {arguments} --duration 300ms --json"
            ));
            assert!(output.status.success(), "{}", text(&output.stderr));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{report}"));
            assert!(count("frames") > 0, "{report}");
            assert_eq!((count("sent"), count("lost")), (count("received"), 0));
            assert_eq!(taken() - before, count("sent"), "{report}");
            let gbit = report["mpps"]
                .as_f64()
                .map(|mpps| mpps * f64::from(bytes) * 8e-3);
            let told = report["gbit_per_s"].as_f64();
            assert!(
                gbit.zip(told)
                    .is_some_and(|(a, b)| (a - b).abs() < 0.01 * a),
                "{report}"
            );
        }
    }

    /// What a run between two ports reports: every frame sent came back.
    fn there_and_back(directory: &TempDir, arguments: &str) -> Value {
        let [near, far] = ["a", "b"].map(|name| directory.path(name).display().to_string());
        let output = bench(&format!(
            "--socket {near} --far {far} {arguments} --duration 300ms --json"
        ));
        assert!(
            output.status.success(),
            "{arguments}: {}",
            text(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        for (key, value) in [("lost", 0), ("mismatched", 0)] {
            assert_eq!(report[key], value, "{arguments}: {report}");
        }
        assert!(report["frames"].as_u64() > Some(0), "{report}");
        assert_eq!(report["sent"], report["received"], "{arguments}: {report}");
        report
    }

    #[test]
    fn frames_go_there_and_back_between_two_ports() {
        for links in [
            ["link=wire:b,hold_us=50000", "queues=2"],
            ["link=switch:s", "link=switch:s"],
        ] {
            let directory = TempDir::new("bench");
            let [near, far] = [("a", links[0]), ("b", links[1])].map(|(name, link)| {
                let socket = directory.path(name);
                format!("name={name},socket={},{link}", socket.display())
            });
            let daemon = Daemon::start(&["run", "--net", &near, "--net", &far]);
            for arguments in [
                "--mode pingpong",
                "--format packed --in-order --mode pingpong",
                "--format split --mergeable --size 9000 --in-flight 64",
                "--format packed --event-idx --size mix --in-flight 256",
            ] {
                let moved = || ["rx_frames", "tx_frames"].map(|name| daemon.counter("b", name));
                let before = moved();
                let report = there_and_back(&directory, arguments);
                let after = moved();
                assert!(
                    before[0] < after[0] && before[1] < after[1],
                    "the far end takes and sends, {before:?} to {after:?}: {report}"
                );
            }
        }
    }

    #[test]
    fn a_far_end_that_is_not_there_is_named() {
        let echo = Echo::start();
        let output = echo.bench("--far /nowhere/s --duration 100ms");
        fails(&output, 2, "/nowhere/s");
    }

    #[test]
    fn without_json_there_is_a_table() {
        let echo = Echo::start();
        let output = echo.bench("--duration 50ms");
        assert!(output.status.success(), "{}", text(&output.stderr));
        for word in ["split rings", "Mpps", "p99.9", " 0 lost, 0 mismatched"] {
            assert!(text(&output.stdout).contains(word), "{output:?}");
        }
        assert_eq!(text(&output.stderr), "");
    }

    #[test]
    fn wrong_usage_names_the_flag_and_the_value_with_status_2() {
        for (arguments, says) in [
            ("--size 59", "vringd: --size \"59\": not in 60..=9000\n"),
            ("--format round", "vringd: --format \"round\": unknown ring"),
            ("--ring-size 1000", "vringd: --ring-size \"1000\": expected"),
            ("--core 4000", "vringd: --core \"4000\": core 4000"),
            ("--pid 0", "vringd: --pid \"0\": no such process\n"),
        ] {
            fails(&bench(&format!("--socket /none {arguments}")), 2, says);
        }
    }

    #[test]
    fn a_back_end_that_lacks_something_or_is_absent_is_status_2() {
        let says = "vringd: --socket \"/none\": can't connect: No such file";
        fails(&bench("--socket /none"), 2, says);
        let echo = Echo::start();
        fails(&echo.bench("--queues 3"), 2, "vringd: --queues \"3\": ");
    }

    /// Starts a measurement, does `harm` to the daemon in the midst of it, and returns what the
    /// command said then.
    fn harmed(harm: impl FnOnce(&Daemon)) -> Output {
        let echo = Echo::start();
        let daemon = &echo.daemon;
        let output = std::thread::scope(|scope| {
            let output = scope.spawn(|| echo.bench("--duration 60s"));
            wait_until("frames are echoed", PATIENCE, || {
                (daemon.counter("n0", "rx_frames") > 0).then_some(())
            });
            harm(daemon);
            output.join().unwrap()
        });
        // A stopped process would not end by itself.
        daemon.signal(libc::SIGKILL);
        output
    }

    #[test]
    fn a_back_end_that_is_killed_ends_the_measurement() {
        let output = harmed(|daemon| daemon.signal(libc::SIGKILL));
        fails(&output, 1, "vringd: the back-end went away after");
    }

    #[test]
    fn a_back_end_that_stops_answering_ends_the_measurement() {
        let output = harmed(|daemon| daemon.signal(libc::SIGSTOP));
        fails(&output, 1, "vringd: the back-end sends nothing back: ");
    }
}
