//! A daemon with one disk, and how it gets at the file of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vringd::testing::driver::Driver;

use super::front_end::FrontEnd;
use crate::support::daemon::Daemon;
use crate::support::missing;
use crate::support::tmp::TempDir;

/// Bytes of each disk.
pub const DISK: usize = 8 << 20;
pub const SECTOR: usize = 512;

/// A daemon with one disk; `keys` are what it has beside name and socket.
pub struct Served {
    pub daemon: Daemon,
    dir: TempDir,
}

impl Served {
    pub fn start(dir: TempDir, keys: &str) -> Served {
        let socket = dir.path("disk.sock");
        let disk = format!("name=disk0,socket={},{keys}", socket.display());
        let args = ["run", "--core", "1", "--idle", "adaptive", "--blk", &disk];
        let daemon = Daemon::start(&args);
        Served { daemon, dir }
    }

    pub fn open<D: Driver>(&self, features: u64) -> FrontEnd<D> {
        FrontEnd::open(&self.dir.path("disk.sock"), features)
    }

    /// How the daemon gets at the bytes of `file`, which it has open, as the kernel sees it.
    pub fn way(&self, file: &Path) -> Way {
        let process = PathBuf::from(format!("/proc/{}", self.daemon.pid()));
        let maps = fs::read_to_string(process.join("maps")).expect("it runs");
        if maps
            .lines()
            .any(|line| line.ends_with(&*file.to_string_lossy()))
        {
            return Way::Mapped;
        }
        let open = fs::read_dir(process.join("fd")).expect("it runs");
        let open = open.map(|entry| entry.expect("a descriptor").path());
        let open: Vec<_> = open
            .filter(|fd| fs::read_link(fd).is_ok_and(|to| to == file))
            .collect();
        assert!(!open.is_empty(), "{} is not open", file.display());
        let direct = |fd: &PathBuf| {
            let number = fd.file_name().expect("a number");
            let info = fs::read_to_string(process.join("fdinfo").join(number)).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.expect("flags").trim(), 8).unwrap();
            flags & libc::O_DIRECT != 0
        };
        match open.iter().any(direct) {
            true => Way::Direct,
            false => Way::Cached,
        }
    }
}

/// How a daemon gets at the bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// With O_DIRECT.
    Direct,
    /// By calls, through the page cache.
    Cached,
    /// By addresses: the file is in memory.
    Mapped,
}

/// A directory on a disk, with direct I/O in blocks of 512 bytes: /tmp may be in memory, where a
/// file is mapped whatever is asked for. `None` where there is none.
pub fn on_a_disk(name: &str) -> Option<TempDir> {
    let tmp = std::env::temp_dir();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let parents = [&tmp, Path::new("/var/tmp"), target];
    let mut dirs = parents.iter().map(|parent| TempDir::within(parent, name));
    let found = dirs.find(has_direct_io);
    found.or_else(|| missing(&format!("no direct I/O in any of {parents:?}")))
}

fn has_direct_io(dir: &TempDir) -> bool {
    // On tmpfs the flag is taken, and does nothing.
    let tried = "case $(stat -f -c %T .) in tmpfs | ramfs) exit 1 ;; esac
                 dd if=/dev/zero of=probe bs=512 count=1 oflag=direct status=none";
    let mut shell = Command::new("sh");
    let status = shell.args(["-c", tried]).current_dir(dir.path("")).status();
    status.expect("sh runs").success()
}

/// An image of random bytes.
pub fn image(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    dir.random_file("disk.img", DISK, 5)
}

/// Compares without printing megabytes.
pub fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        let (got, want) = (got[at], want[at]);
        panic!("{what}: at byte {at} there is {got:#x}, not {want:#x}");
    }
}
