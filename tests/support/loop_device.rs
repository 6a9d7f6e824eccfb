//! Block devices over files, by the loop driver.

use std::path::Path;
use std::process::Command;

/// A block device over a file, gone at the end.
pub struct Loop(pub String);

impl Loop {
    /// In blocks of `block` bytes; `None` where there are no such devices.
    pub fn over(file: &Path, block: u32) -> Option<Loop> {
        let mut losetup = Command::new("losetup");
        losetup.args(["-f", "--show", "-b", &block.to_string()]);
        let made = losetup.arg(file).output().expect("losetup runs");
        let name = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        if !made.status.success() {
            let why = String::from_utf8_lossy(&made.stderr);
            return super::missing(&format!("no loop devices on this machine: {why}"));
        }
        Some(Loop(name))
    }

    /// It is as large as its file.
    pub fn follow(&self) {
        let status = Command::new("losetup").args(["-c", &self.0]).status();
        assert!(status.expect("losetup runs").success());
    }

    /// What sysfs says of it.
    pub fn told(&self, name: &str) -> String {
        std::fs::read_to_string(self.sysfs(name)).expect("sysfs")
    }

    fn sysfs(&self, name: &str) -> String {
        let device = self.0.trim_start_matches("/dev/");
        format!("/sys/block/{device}/{name}")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
