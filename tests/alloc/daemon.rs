//! A daemon in this process: what its workers allocate while `vringd bench` loads their devices
//! depends on the sessions, and not on how many frames and requests pass.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::thread::JoinHandleExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use vringd::cli::{self, Action};
use vringd::config::{self, Machine};
use vringd::{daemon, sys};

use crate::support::deadline::wait_until;
use crate::support::tmp::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// The thread whose calls are counted here.
static WORKER: AtomicI32 = AtomicI32::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

/// The allocator was called.
pub(super) fn called() {
    let worker = WORKER.load(Ordering::Relaxed);
    // SAFETY: it has no argument, and can't fail.
    if worker != 0 && worker == unsafe { libc::gettid() } {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

/// A daemon in a thread of this process.
struct Daemon {
    thread: std::thread::JoinHandle<bool>,
    sockets: Vec<PathBuf>,
}

impl Daemon {
    /// With one worker on core 1.
    fn start(devices: &[String], sockets: Vec<PathBuf>) -> Daemon {
        let mut arguments = vec!["vringd", "run", "--core", "1"];
        arguments.extend(devices.iter().flat_map(|d| d.split(' ')));
        let invocation = cli::parse(arguments).expect("a command line");
        let Action::Run(given) = invocation.action else {
            panic!("it runs");
        };
        let machine = Machine {
            online_cores: sys::cpu::online_cores().unwrap(),
            user_id: sys::users::user_id,
            group_id: sys::users::group_id,
        };
        let thread = std::thread::spawn(move || {
            let config = config::load(&given, &machine).expect("settings");
            let reload = || config::load(&given, &machine);
            daemon::run(config, &reload).expect("it starts")
        });
        let worker = wait_until("its worker", PATIENCE, worker);
        WORKER.store(worker, Ordering::Relaxed);
        let there = || sockets.iter().all(|socket| socket.exists()).then_some(());
        wait_until("its sockets", PATIENCE, there);
        Daemon { thread, sockets }
    }

    /// How often its worker allocates or frees during a load on the devices numbered so.
    fn calls_during(&self, bench: &[&str], devices: &[usize]) -> u64 {
        let before = CALLS.load(Ordering::Relaxed);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
        command.arg("bench").args(bench).arg("--json");
        for (&device, option) in devices.iter().zip(["--socket", "--far"]) {
            command.arg(option).arg(&self.sockets[device]);
        }
        let output = command.output().expect("the bench runs");
        assert!(output.status.success(), "{output:?}");
        // What ends a session is done once the next may come.
        self.idle();
        CALLS.load(Ordering::Relaxed) - before
    }

    /// Waits until the sessions before have ended: a device has one at a time.
    fn idle(&self) {
        const GET_FEATURES: u32 = 1;
        const VERSION: u32 = 1;
        for socket in &self.sockets {
            let mut session = UnixStream::connect(socket).expect("its socket");
            session.set_read_timeout(Some(PATIENCE)).unwrap();
            for word in [GET_FEATURES, VERSION, 0] {
                session.write_all(&word.to_le_bytes()).unwrap();
            }
            let mut answer = [0; 20];
            session.read_exact(&mut answer).expect("features");
        }
    }

    fn stop(self) {
        WORKER.store(0, Ordering::Relaxed);
        // SAFETY: the thread is not joined yet; it takes the signal from a file descriptor.
        let sent = unsafe { libc::pthread_kill(self.thread.as_pthread_t(), libc::SIGTERM) };
        assert_eq!(sent, 0);
        assert!(self.thread.join().expect("no panic"), "all was drained");
    }
}

/// The only worker of this process.
fn worker() -> Option<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.map(Result::unwrap).find_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let found = name.trim_end() == "worker-1";
        found.then(|| task.file_name().to_str().unwrap().parse().unwrap())
    })
}

fn file_of_a_mebibyte(dir: &TempDir) -> PathBuf {
    let path = dir.path("disk");
    std::fs::write(&path, vec![7; 1 << 20]).expect("room for a small disk");
    path
}

/// In a process of its own, since a daemon tells its sockets on the standard output.
#[test]
fn a_worker_allocates_nothing_for_a_frame_or_a_request() {
    const HERE: &str = "VRINGD_TEST_ALLOC";
    if std::env::var_os(HERE).is_some() {
        return loads();
    }
    let name = std::thread::current().name().expect("a test").to_owned();
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    let output = command
        .args(["--exact", &name, "--nocapture"])
        .env(HERE, "");
    let output = output.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complained}");
    assert!(said.contains("ready"), "{said}");
}

fn loads() {
    let dir = TempDir::new("alloc-daemon");
    let sockets = ["e", "a", "b", "s", "t", "r", "f"].map(|name| dir.path(name));
    let at = |device: usize| sockets[device].display();
    let file = file_of_a_mebibyte(&dir);
    let devices = [
        format!("--net name=e,socket={},queues=2,link=echo", at(0)),
        format!("--net name=a,socket={},link=wire:b", at(1)),
        format!("--net name=b,socket={}", at(2)),
        format!("--net name=s,socket={},link=switch:lan", at(3)),
        format!("--net name=t,socket={},link=switch:lan", at(4)),
        format!("--blk name=r,socket={},backend=ram:1M", at(5)),
        format!("--blk name=f,socket={},path={}", at(6), file.display()),
    ];
    let daemon = Daemon::start(&devices, sockets.to_vec());
    let flood = ["net", "--mergeable", "--core", "0", "--duration"];
    let disk = [
        "blk",
        "--rw",
        "randrw",
        "--iodepth",
        "32",
        "--cpus-allowed",
        "0",
        "--runtime",
    ];
    let loads: [(&[&str], &[usize]); 5] = [
        (&flood, &[0]),
        (&flood, &[1, 2]),
        (&flood, &[3, 4]),
        (&disk, &[5]),
        (&disk, &[6]),
    ];
    let mut all = 0;
    for format in ["split", "packed"] {
        for (bench, on) in loads {
            let calls = ["20ms", "100ms", "20ms", "100ms", "20ms"].map(|time| {
                let bench = [bench, &[time, "--format", format]].concat();
                daemon.calls_during(&bench, on)
            });
            let [_, long, short, longer, last] = calls;
            all += calls.iter().sum::<u64>();
            // Who lets go of an answer last, worker or session, is chance, and frees it.
            let most = short.max(last) + 4;
            assert!(
                long.min(longer) <= most,
                "{format} {bench:?} {on:?}: {calls:?}"
            );
        }
    }
    assert!(all > 0, "sessions begin and end: it counts");
    daemon.stop();
}
