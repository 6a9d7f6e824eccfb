//! A file system in memory, gone at the end.

use std::path::PathBuf;
use std::process::Command;

use crate::support::missing;
use crate::support::tmp::TempDir;

/// A file system that is mounted.
pub struct Mounted(TempDir);

impl Mounted {
    /// One of `kind`; `None` where it can't be mounted.
    pub fn new(kind: &str, options: &str) -> Option<Mounted> {
        let dir = TempDir::new(kind);
        let mut mount = Command::new("mount");
        mount
            .args(["-t", kind, "-o", options, "none"])
            .arg(dir.path(""));
        if !mount.status().expect("mount runs").success() {
            return missing(&format!("no {kind} can be mounted here"));
        }
        Some(Mounted(dir))
    }

    /// Where it is.
    pub fn dir(&self) -> &TempDir {
        &self.0
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A loop device lets go of its file a little later.
        let umount = ["-l".into(), self.0.path("")];
        let _ = Command::new("umount").args(umount).status();
    }
}
