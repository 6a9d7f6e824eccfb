//! Programs of this machine in the initramfs of a guest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::guest::Tools;
use super::tmp::TempDir;

/// `initrd`, or a file in `dir` of it and an archive with the programs: a kernel unpacks one after
/// the other.
pub fn with_programs(initrd: PathBuf, tools: &Tools, dir: &TempDir) -> PathBuf {
    if tools.programs.is_empty() {
        return initrd;
    }
    let (root, joined) = (dir.path("root"), dir.path("initrd"));
    let mut files = BTreeSet::new();
    for program in &tools.programs {
        files.extend(libraries(program));
        let name = program.file_name().expect("a program's path");
        let to = inside(&root, &Path::new("/proof").join(name));
        // Most of a test binary is what debuggers read.
        let mut strip = Command::new("strip");
        succeed(strip.arg("-o").arg(&to).arg(program), "binutils");
    }
    for file in &files {
        fs::copy(file, inside(&root, file)).expect("a library can be copied");
    }
    fs::copy(&initrd, &joined).expect("the initramfs can be copied");
    let to = File::options().append(true).open(&joined);
    let pack = "find . | cpio -o -H newc --quiet";
    let mut sh = Command::new("sh");
    let sh = sh.args(["-c", pack]).current_dir(&root);
    succeed(sh.stdout(to.expect("the copy")), "cpio");
    fs::remove_dir_all(root).expect("the tree can be removed");
    joined
}

/// Where `file` is in the tree under `root`, in a directory that is there.
fn inside(root: &Path, file: &Path) -> PathBuf {
    let to = root.join(file.strip_prefix("/").expect("an absolute path"));
    fs::create_dir_all(to.parent().expect("a directory")).expect("it can be made");
    to
}

/// The shared libraries that a program is linked with.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let text = String::from_utf8(output.stdout).expect("paths in UTF-8");
    let words = text.split_whitespace();
    words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

fn succeed(command: &mut Command, package: &str) {
    let output = command.stderr(Stdio::piped()).spawn();
    let output = output.and_then(std::process::Child::wait_with_output);
    let output = output.unwrap_or_else(|error| panic!("package {package}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
