//! Directories and data for one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A number that no other test of this process has, beside the process's own.
pub fn unique() -> String {
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A directory that is removed at the end.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new(name: &str) -> TempDir {
        TempDir::within(&std::env::temp_dir(), name)
    }

    pub fn within(parent: &Path, name: &str) -> TempDir {
        let dir = parent.join(format!("vringd-{name}-{}", unique()));
        fs::create_dir_all(&dir).expect("a temporary directory");
        TempDir(dir)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// A file of pseudo-random bytes; returns them too.
    pub fn random_file(&self, file: &str, bytes: usize, seed: u64) -> (PathBuf, Vec<u8>) {
        let (path, data) = (self.path(file), random_bytes(seed, bytes));
        fs::write(&path, &data).expect("a file in the temporary directory");
        (path, data)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Pseudo-random bytes that depend on `seed` alone.
pub fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// SHA-256 of a part of a file, as `sha256sum` prints it: a check by another program.
pub fn sha256(path: &Path, skip_mib: u64, count_mib: u64) -> String {
    let command = format!(
        "dd if={} bs=1M skip={skip_mib} count={count_mib} status=none | sha256sum | cut -d' ' -f1",
        path.display()
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &command])
        .output()
        .expect("sh runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// SHA-256 of bytes, by the same program.
pub fn sha256_of(bytes: &[u8]) -> String {
    let dir = TempDir::new("sum");
    let path = dir.path("bytes");
    fs::write(&path, bytes).expect("a file in the temporary directory");
    let output = std::process::Command::new("sha256sum").arg(&path).output();
    let output = output.expect("sha256sum runs");
    String::from_utf8_lossy(&output.stdout)
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}
