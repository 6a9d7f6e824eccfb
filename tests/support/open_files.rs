//! Files that another process has open: the same open files, not the same paths.
#![expect(unsafe_code, reason = "pidfd_open(2), pidfd_getfd(2)")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

fn opened(answer: libc::c_long) -> File {
    let fd = i32::try_from(answer).expect("a descriptor");
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel made the descriptor for us, and nobody else has it.
    unsafe { File::from_raw_fd(fd) }
}

/// Those of the process `pid` that are `path`.
pub fn open_files(pid: u32, path: &Path) -> Vec<File> {
    // SAFETY: the call touches no memory.
    let process = opened(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) });
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let entries = entries.map(|entry| entry.expect("a descriptor"));
    let same = entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == path));
    same.map(|entry| {
        let fd: u32 = entry
            .file_name()
            .to_string_lossy()
            .parse()
            .expect("a number");
        let process = process.as_raw_fd();
        // SAFETY: the call touches no memory.
        opened(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, fd, 0) })
    })
    .collect()
}
