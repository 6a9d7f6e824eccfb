//! A daemon with one disk.

use std::path::PathBuf;

use vringd::testing::driver::Driver;

use super::front_end::FrontEnd;
use crate::support::daemon::Daemon;
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
