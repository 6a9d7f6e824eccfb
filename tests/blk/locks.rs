//! Two users of one image: ours and ours, ours and QEMU's.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::front_end::IN;
use super::served::{Served, assert_same, image};
use crate::support::deadline::wait_until;
use crate::support::tmp::TempDir;
use vringd::testing::driver::SplitDriver;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a daemon says that can't start.
pub fn refused(image: &Path, keys: &str) -> String {
    let dir = TempDir::new("refused");
    let socket = dir.path("s");
    let (socket, image) = (socket.display(), image.display());
    let disk = format!("name=second,socket={socket},path={image}{keys}");
    let mut command = Command::new("timeout");
    command.args(["20", env!("CARGO_BIN_EXE_vringd"), "run", "--core", "1"]);
    let output = command.args(["--blk", &disk]).output();
    text(&output.expect("the daemon starts"))
}

fn text(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// QEMU's own back-end on `image`, with its socket in `dir`.
fn storage_daemon(dir: &TempDir, image: &Path, writable: bool) -> Command {
    let (read_only, writable) = if writable {
        ("off", "on")
    } else {
        ("on", "off")
    };
    let image = image.display();
    let node = format!("driver=file,node-name=disk,filename={image},read-only={read_only}");
    let socket = dir.path("qsd.sock");
    let socket = socket.display();
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=disk,writable={writable},addr.type=unix,\
         addr.path={socket}"
    );
    let mut command = Command::new("timeout");
    command.args(["60", "qemu-storage-daemon", "--blockdev", &node]);
    command.args(["--export", &export]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A running storage daemon, ended at the end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.0.id()).expect("a pid");
        // `timeout` hands the signal on.
        let _ = Command::new("kill").arg(pid.to_string()).status();
        let _ = self.0.wait();
    }
}

fn start(dir: &TempDir, image: &Path, writable: bool) -> Running {
    let child = storage_daemon(dir, image, writable).spawn();
    let child = child.expect("qemu-storage-daemon is installed");
    let socket = dir.path("qsd.sock");
    let running = Running(child);
    wait_until("the storage daemon listens", PATIENCE, || {
        socket.exists().then_some(())
    });
    running
}

#[test]
fn a_second_writer_of_ours_is_refused_by_name() {
    let dir = TempDir::new("locks");
    let (path, _) = image(&dir);
    let on_it = format!("path={}", path.display());
    let first = Served::start(TempDir::new("first"), &on_it);
    for keys in ["", ",read_only=true", ",direct=false"] {
        let message = refused(&path, keys);
        let named = message.contains("second") && message.contains(&*path.to_string_lossy());
        assert!(named && message.contains("writes to it"), "{message}");
    }
    // Whoever says so may.
    let off = format!("{on_it},lock=off");
    drop(Served::start(TempDir::new("off"), &off));
    drop(first);
    drop(Served::start(TempDir::new("again"), &on_it));
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let dir = TempDir::new("locks");
    let (path, model) = image(&dir);
    let on_it = format!("path={},read_only=true", path.display());
    let readers = [(); 2].map(|()| Served::start(TempDir::new("reader"), &on_it));
    let _third = start(&dir, &path, false);
    for reader in &readers {
        let answer = reader.open::<SplitDriver>(0).run(IN, 0, &[], 4096);
        assert_same("read", &answer.data, &model[..4096]);
    }
    let message = refused(&path, "");
    assert!(message.contains("allows nobody to write"), "{message}");
}

#[test]
fn qemu_and_we_keep_each_other_from_writing() {
    let dir = TempDir::new("locks");
    let (path, _) = image(&dir);
    let ours = Served::start(TempDir::new("ours"), &format!("path={}", path.display()));
    let output = storage_daemon(&dir, &path, true).output();
    let message = text(&output.expect("qemu-storage-daemon is installed"));
    assert!(
        message.contains("Failed to get") && message.contains("lock"),
        "{message}"
    );
    drop(ours);
    let theirs = start(&dir, &path, true);
    for keys in ["", ",read_only=true"] {
        let message = refused(&path, keys);
        let named = message.contains(&*path.to_string_lossy());
        assert!(named && message.contains("writes to it"), "{message}");
    }
    drop(theirs);
    drop(Served::start(
        TempDir::new("ours"),
        &format!("path={}", path.display()),
    ));
}
