//! The rules of style that a program can check, over the sources of this crate.

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    const LINES_MAX: usize = 700;
    const FUNCTION_LINES_MAX: usize = 70;
    const COLUMNS_MAX: usize = 100;

    struct Source {
        /// Relative to the root of the checkout.
        path: String,
        text: String,
    }

    fn root() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
    }

    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else {
                out.push(path);
            }
        }
    }

    fn sources(dirs: &[&str]) -> Vec<Source> {
        let mut paths = Vec::new();
        for dir in dirs {
            walk(&root().join(dir), &mut paths);
        }
        // What cargo-fuzz builds lies in fuzz/target.
        paths.retain(|path| path.extension().is_some_and(|e| e == "rs"));
        paths.retain(|path| !path.starts_with(root().join("fuzz/target")));
        paths.sort();
        let read = |path: PathBuf| Source {
            path: path.strip_prefix(root()).unwrap().display().to_string(),
            text: fs::read_to_string(&path).unwrap(),
        };
        paths.into_iter().map(read).collect()
    }

    fn all_rust() -> Vec<Source> {
        sources(&["src", "tests", "benches", "fuzz"])
    }

    /// The source without comments and the test module at its foot.
    fn code(text: &str) -> String {
        let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
        let strip = |line: &str| line.split("//").next().unwrap_or("").to_owned();
        text[..end]
            .lines()
            .map(strip)
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn check(problems: &[String]) {
        assert!(problems.is_empty(), "\n{}", problems.join("\n"));
    }

    #[test]
    fn files_and_lines_are_short() {
        let mut problems = Vec::new();
        for source in all_rust() {
            let lines = source.text.lines().count();
            if lines > LINES_MAX {
                problems.push(format!("{}: {lines} lines", source.path));
            }
            for (number, line) in source.text.lines().enumerate() {
                if line.chars().count() > COLUMNS_MAX {
                    problems.push(format!("{}:{}: too wide", source.path, number + 1));
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn functions_are_short() {
        let mut problems = Vec::new();
        // Tables of cases in tests may be longer.
        for source in sources(&["src"])
            .iter()
            .filter(|s| !s.path.contains("tests"))
        {
            let code = code(&source.text);
            let lines: Vec<&str> = code.lines().collect();
            for (start, line) in lines.iter().enumerate() {
                let body = line.trim_start();
                let is_fn = [
                    "fn ",
                    "pub fn ",
                    "pub(crate) fn ",
                    "pub(super) fn ",
                    "unsafe fn ",
                ]
                .iter()
                .any(|head| body.starts_with(head));
                if !is_fn || body.ends_with(';') || body.ends_with('}') {
                    continue;
                }
                let close = format!("{}}}", " ".repeat(line.len() - body.len()));
                let end = lines[start..]
                    .iter()
                    .position(|l| **l == close)
                    .unwrap_or(0);
                if end > FUNCTION_LINES_MAX {
                    problems.push(format!("{}:{}: {end} lines", source.path, start + 1));
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn every_file_says_what_it_is() {
        let without: Vec<_> = all_rust()
            .into_iter()
            .filter(|source| !source.text.starts_with("//!"))
            .map(|source| source.path)
            .collect();
        check(&without);
    }

    /// Which top-level modules a module may use; the drawing is in src/lib.rs.
    const LAYERS: &[(&str, &[&str])] = &[
        ("sync", &[]),
        ("memory", &["sync"]),
        ("sys", &["memory", "host::blk", "sync"]),
        ("ring", &["memory", "sync", "testing"]),
        ("host", &["memory", "sync", "sys"]),
        ("device", &["host", "ring", "memory", "sync"]),
        (
            "engine",
            &["device", "host", "ring", "memory", "sys", "sync"],
        ),
        (
            "control",
            &["engine", "device", "memory", "ring", "sys", "sync"],
        ),
        // A front-end beside the daemon: nothing of device, engine or control.
        ("bench", &["config", "memory", "ring", "sys", "sync"]),
        (
            "config",
            &["host::fault", "host::limit", "host::switch", "sys"],
        ),
        ("cli", &["config", "logging"]),
        ("logging", &["sys::patience"]),
    ];

    #[test]
    fn modules_use_only_what_lies_below() {
        let mut problems = Vec::new();
        for (module, below) in LAYERS {
            let own = sources(&["src"]).into_iter().filter(|s| {
                let tail = s.path.strip_prefix("src/").unwrap_or(&s.path);
                tail == format!("{module}.rs") || tail.starts_with(&format!("{module}/"))
            });
            for source in own.filter(|s| !s.path.contains("tests")) {
                for line in code(&source.text).lines() {
                    let Some(at) = line.find("crate::") else {
                        continue;
                    };
                    let used = &line[at + "crate::".len()..];
                    let allowed = below
                        .iter()
                        .chain([module])
                        .any(|name| used.starts_with(&format!("{name}::")) || used == *name);
                    // A list of modules in braces is not used in this crate.
                    if !allowed {
                        problems.push(format!("{}: {}", source.path, line.trim()));
                    }
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn crates_are_named_only_where_they_belong() {
        const OWNERS: &[(&str, &[&str])] = &[
            ("vhost::", &["src/control"]),
            ("vm_memory::", &["src/memory"]),
            ("io_uring::", &["src/sys"]),
            ("aws_lc_sys::", &["src/sys"]),
            ("libc::", &["src/memory", "src/sys"]),
            ("clap::", &["src/cli"]),
            ("unsafe {", &["src/memory", "src/sys"]),
            ("unsafe impl", &["src/memory", "src/sys"]),
        ];
        let mut problems = Vec::new();
        for source in sources(&["src"]) {
            for (name, owners) in OWNERS {
                let at_home = owners.iter().any(|owner| source.path.starts_with(owner));
                if !at_home && code(&source.text).contains(name) {
                    problems.push(format!("{}: names {name}", source.path));
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn nothing_is_left_unfinished() {
        // In pieces, so that this file does not find itself.
        let words = [
            ["todo", "!("],
            ["unimplemented", "!("],
            ["dbg", "!("],
            ["XX", "X"],
        ];
        let mut problems = Vec::new();
        for source in all_rust() {
            for word in &words {
                if source.text.contains(&word.concat()) {
                    problems.push(format!("{}: {}", source.path, word.concat()));
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn every_fence_says_what_it_pairs_with() {
        let mut problems = Vec::new();
        for source in sources(&["src"]) {
            let lines: Vec<&str> = source.text.lines().collect();
            for (number, line) in lines.iter().enumerate() {
                let above = number.checked_sub(1).map_or("", |above| lines[above]);
                let is_fence = line.trim_start().starts_with("fence(");
                if is_fence
                    && !above.trim_start().starts_with("//")
                    && !source.path.contains("loom")
                {
                    problems.push(format!("{}:{}", source.path, number + 1));
                }
            }
        }
        check(&problems);
    }

    #[test]
    fn every_ring_fault_is_met_by_a_test() {
        let tests: String = sources(&["src/ring", "src/engine", "tests"])
            .into_iter()
            .filter(|source| source.path.contains("tests"))
            .map(|source| source.text)
            .collect();
        let fault = fs::read_to_string(root().join("src/ring/fault.rs")).unwrap();
        let list = fault.split("pub const ALL").nth(1).unwrap();
        let names = list
            .split("RingFault::")
            .skip(1)
            .map(|rest| rest.split(',').next().unwrap());
        let missing: Vec<_> = names
            .filter(|name| !tests.contains(&format!("RingFault::{name}")))
            .map(ToOwned::to_owned)
            .collect();
        check(&missing);
    }

    /// What is there all the same is not done per burst, or only where somebody asked for it.
    #[test]
    fn the_data_path_has_no_lock_and_no_read_modify_write() {
        const ALLOWED: [(&str, &str); 10] = [
            ("src/device/net/config.rs", "a link that goes up or down"),
            ("src/engine/handle.rs", "the start of a vring"),
            ("src/engine/moves.rs", "a queue that goes to another worker"),
            ("src/host/limit.rs", "a turn under a limit"),
            (
                "src/host/limit/turns.rs",
                "a turn under the limit of a group",
            ),
            ("src/memory/dirty.rs", "a page that is logged"),
            (
                "src/memory/file_map.rs",
                "a page that is used first, or given back",
            ),
            ("src/memory/torn.rs", "memory that went away"),
            ("src/sys/disk.rs", "a file that is opened"),
            ("src/sys/qcow2/part.rs", "a flush by the image's own thread"),
        ];
        let breaks = |line: &str| {
            let has = |words: &[&str]| words.iter().any(|word| line.contains(word));
            // Vrings and slices have a swap, too.
            let swaps = has(&[".swap("]) && has(&["Ordering", "Relaxed"]);
            swaps || has(&[".fetch_", ".compare_exchange", "Mutex", "RwLock"])
        };
        let path = ["ring", "memory", "device", "host", "engine", "sys", "sync"];
        let dirs = path.map(|layer| format!("src/{layer}"));
        let mut broken: Vec<String> = sources(&dirs.each_ref().map(String::as_str))
            .into_iter()
            .filter(|source| !source.path.contains("test"))
            .filter(|source| code(&source.text).lines().any(breaks))
            .map(|source| source.path)
            .collect();
        for (allowed, _) in ALLOWED {
            let at = broken.iter().position(|path| path == allowed);
            broken.remove(at.unwrap_or_else(|| panic!("{allowed} needs no leave any more")));
        }
        check(&broken);
    }

    #[test]
    fn scripts_can_be_run() {
        use std::os::unix::fs::PermissionsExt;
        let mut files = Vec::new();
        walk(&root().join("scripts"), &mut files);
        files.push(root().join(".ci/run"));
        for file in files.iter().filter(|file| file.extension().is_none()) {
            let mode = fs::metadata(file).unwrap().permissions().mode();
            assert!(mode & 0o111 != 0, "{} is not executable", file.display());
        }
    }
}
