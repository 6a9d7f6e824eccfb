//! The command from outside: exit statuses and what is printed where.
//!
//! Only what ends before the daemon starts; the messages themselves are held by `config`.

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::process::{Command, Output};

    use vmm_sys_util::tempdir::TempDir;

    fn vringd(arguments: &[&str]) -> Output {
        // Status 124 where a daemon starts that must not.
        Command::new("timeout")
            .args(["20", env!("CARGO_BIN_EXE_vringd")])
            .args(arguments)
            .env_remove("VRINGD_LOG")
            .output()
            .unwrap()
    }

    fn text(bytes: &[u8]) -> &str {
        str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_refused_setting_is_one_line_on_stderr_and_status_2() {
        for (arguments, line) in [
            (
                &["run", "--net", "socket=/n,link=tpa:tap0"][..],
                "vringd: --net net0: link = \"tpa:tap0\": \
                 unknown link kind \"tpa\" (known: tap, macvtap, xdp, wire, switch, echo, sink)\n",
            ),
            (
                &["run", "--net", "socket=/n,link=echo,mtu=67"],
                "vringd: --net net0: mtu = \"67\": not in 68..=65535\n",
            ),
            (
                &["run", "--net", "socket=/n,link=echo,mtu=65536"],
                "vringd: --net net0: mtu = \"65536\": not in 68..=65535\n",
            ),
            (
                &["check", "--config", "/no/such.toml"],
                "vringd: --config \"/no/such.toml\": cannot be read: \
                 No such file or directory (os error 2)\n",
            ),
            (
                &["run"],
                "vringd: no device: \
                 give at least one --net or --blk, or [[net]] or [[blk]] in the file\n",
            ),
        ] {
            let output = vringd(arguments);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
            assert_eq!(text(&output.stderr), line);
            assert_eq!(text(&output.stdout), "");
        }
    }

    #[test]
    fn a_refused_run_leaves_no_socket() {
        let directory = TempDir::new().unwrap();
        let socket = directory.as_path().join("s");
        let good = format!("socket={},link=echo", socket.display());
        let output = vringd(&["run", "--net", &good, "--net", "socket=/n,link=none"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(!socket.exists());
    }

    #[test]
    fn check_tells_valid_from_invalid() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("vringd.toml");
        let file = path.to_str().unwrap();
        fs::write(&path, "[[net]]\nsocket = \"/n\"\nlink = \"echo\"\n").unwrap();
        let output = vringd(&["check", "--config", file]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "valid: 1 network ports, 0 disks\n");
        fs::write(&path, "[[net]]\nsocket = \"/n\"\nlink = \"ohce\"\n").unwrap();
        let output = vringd(&["check", "--config", file]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).starts_with(&format!("vringd: {file}:3: net net0: link = ")));
    }

    #[test]
    fn wrong_usage_is_status_2_and_help_is_0_on_stdout() {
        assert_eq!(vringd(&["run", "--nets", "x"]).status.code(), Some(2));
        assert_eq!(vringd(&[]).status.code(), Some(2));
        let help = vringd(&["--help"]);
        assert_eq!(help.status.code(), Some(0));
        assert!(text(&help.stdout).contains("vringd run --core 1"));
        assert_eq!(text(&help.stderr), "");
    }

    #[test]
    fn a_malformed_log_filter_is_refused() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
        let output = command
            .arg("run")
            .env("VRINGD_LOG", "a=loud")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).starts_with("vringd: VRINGD_LOG = \"a=loud\": "));
    }

    /// The keys of a device, which are told where one is not known.
    fn known(kind: &str) -> BTreeSet<String> {
        let output = vringd(&["run", &format!("--{kind}"), "no_such_key=1"]);
        let message = text(&output.stderr);
        let (_, keys) = message.split_once("(known: ").expect(message);
        let (keys, _) = keys.split_once(')').expect(message);
        let keys: BTreeSet<_> = keys.split(", ").map(str::to_owned).collect();
        assert!(keys.contains("name"), "{message}");
        keys
    }

    #[test]
    fn help_names_every_key_and_no_other() {
        let output = vringd(&["run", "--help"]);
        // However its lines are cut.
        let help: Vec<_> = text(&output.stdout).split_whitespace().collect();
        let help = help.join(" ");
        for (kind, first) in [
            ("net", &["socket", "link", "host"][..]),
            ("blk", &["socket", "path", "backend"]),
            ("group", &["name"]),
            ("switch", &["name"]),
        ] {
            let (_, flag) = help
                .split_once(&format!("--{kind} <KEY=VALUE,...>"))
                .unwrap();
            let flag = flag.split(" -").next().unwrap();
            let (needed, more) = flag.split_once(" Also: ").expect(flag);
            let word = |c: char| !c.is_ascii_alphanumeric() && c != '_';
            for key in first {
                assert!(
                    needed.split(word).any(|word| word == *key),
                    "{kind}: {needed}"
                );
            }
            let more = more.trim().split(", ").chain(first.iter().copied());
            let more: BTreeSet<_> = more.map(str::to_owned).collect();
            assert_eq!(more, known(kind), "--{kind}");
        }
    }

    /// The words in backquotes where a section of the manual begins to tell of a key: in the first
    /// column of a table, or in a line that begins with one.
    fn in_manual(section: &str) -> Vec<&'static str> {
        let manual = include_str!("../docs/operations.md");
        let head = format!("\n{section}\n");
        let (_, rest) = manual.split_once(&head).expect(section);
        let own = rest.split("\n##").next().unwrap();
        let told = own
            .lines()
            .filter_map(|line| match line.strip_prefix("| ") {
                Some(row) => row.split(" |").next(),
                None => Some(line),
            });
        let told = told.filter(|line| line.starts_with('`'));
        told.flat_map(|line| line.split('`').skip(1).step_by(2))
            .collect()
    }

    #[test]
    fn the_manual_has_every_key() {
        let every = "### Keys of every device";
        for (kind, sections) in [
            ("net", &[every, "### `[[net]]`, `--net`", "## Switches"][..]),
            ("blk", &[every, "### `[[blk]]`, `--blk`"]),
            ("group", &["### `[[group]]`, `--group`"]),
            ("switch", &["### `[[switch]]`, `--switch`"]),
        ] {
            let found: Vec<_> = sections.iter().flat_map(|name| in_manual(name)).collect();
            let known = known(kind);
            let without: Vec<_> = known
                .iter()
                .filter(|key| !found.contains(&&***key))
                .collect();
            assert!(
                without.is_empty(),
                "{kind}: {without:?} are not in {sections:?}"
            );
        }
    }

    #[test]
    fn the_documented_file_is_valid() {
        let manual = include_str!("../docs/operations.md");
        let (_, rest) = manual.split_once("```toml\n").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let directory = TempDir::new().unwrap();
        let disk = directory.as_path().join("disk0.img");
        fs::write(&disk, [0; 512]).unwrap();
        let path = directory.as_path().join("vringd.toml");
        // The core, the group and the disk of the example need not exist on this machine.
        let example = example
            .replace("/var/lib/vringd/disk0.img", disk.to_str().unwrap())
            .replace("\"kvm\"", "\"root\"")
            .replace("cores = [1]", "cores = [0]");
        fs::write(&path, example).unwrap();
        let output = vringd(&["check", "--config", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
}
