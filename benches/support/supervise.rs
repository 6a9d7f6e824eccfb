//! A bench in a process of its own, and one above it that leaves nothing of it behind.
//!
//! However the bench ends (a signal to either, a panic, an abort), the other one ends all that the
//! bench has started, which is in one process group, and then removes what has its number in its
//! name: directories and network namespaces. Nothing can be made meanwhile.
#![expect(
    unsafe_code,
    reason = "system calls about processes without a safe wrapper here"
)]

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use vringd::sys::signals::{Signal, Signals};

/// Set for the process that measures.
const MEASURES: &str = "VRINGD_BENCH_MEASURES";

/// Exit status after a signal; 0 as long as none has come.
static ENDED_BY: AtomicU8 = AtomicU8::new(0);

/// Has another process do what this one was started for, and cleans up after it, in `dir` as in the
/// system's directories; `None` in that other process.
pub(crate) fn above(dir: &Path) -> Option<ExitCode> {
    if std::env::var_os(MEASURES).is_some() {
        return None;
    }
    let signals = Signals::block().expect("signals can be blocked");
    // cargo passes no signal on, and ends.
    // SAFETY: no pointers.
    let asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
    assert_eq!(asked, 0, "prctl: {}", std::io::Error::last_os_error());
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1));
    command.env(MEASURES, "1").process_group(0);
    let mut child = command.spawn().expect("this program can be run");
    let group = child.id();
    thread::spawn(move || {
        let number = match signals.wait() {
            Ok(Signal::Interrupt) => libc::SIGINT,
            Ok(Signal::Hangup) => libc::SIGHUP,
            _ => libc::SIGTERM,
        };
        let status = u8::try_from(128 + number).unwrap_or(u8::MAX);
        ENDED_BY.store(status, Ordering::Release);
        end_group(group);
    });
    let status = wait(&mut child);
    clean_up(group, dir);
    let ended_by = ENDED_BY.load(Ordering::Acquire);
    Some(ExitCode::from(if ended_by == 0 {
        status
    } else {
        ended_by
    }))
}

/// The exit status of the child, of whose group nobody is left then.
fn wait(child: &mut Child) -> u8 {
    let status = child.wait().expect("a child of ours");
    end_group(child.id());
    let number = status.code();
    let number = number.or(status.signal().map(|signal| 128 + signal));
    number.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

fn end_group(group: u32) {
    let group = libc::pid_t::try_from(group).expect("the number of a process");
    // SAFETY: no pointers; whether somebody is left of the group does not matter.
    unsafe { libc::kill(-group, libc::SIGKILL) };
}

/// Removes what is left when the bench could not do it itself.
fn clean_up(pid: u32, dir: &Path) {
    for name in names(Path::new("/run/netns")) {
        if name.starts_with(&format!("vt{pid}-")) {
            // What its processes had is free when they are gone.
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
    let system = [
        std::env::temp_dir(),
        "/dev/shm".into(),
        "/var/run/dpdk".into(),
    ];
    for place in system.iter().map(PathBuf::as_path).chain([dir]) {
        let ours = |name: &String| {
            let rest = name.strip_prefix("vringd-");
            rest.is_some_and(|rest| rest.split('-').any(|part| part == pid.to_string()))
        };
        for name in names(place).into_iter().filter(ours) {
            let _ = std::fs::remove_dir_all(place.join(name));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().into_string());
    names.flatten().collect()
}
