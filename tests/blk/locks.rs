//! Two users of one image: ours and ours, ours and QEMU's. A disk of ours has to do to others, and
//! bear from them, what a disk of a guest of QEMU's does, whatever that is.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use super::front_end::IN;
use super::qcow2::create;
use super::served::{Served, assert_same, image};
use crate::support::tmp::{TempDir, unique};
use vringd::testing::driver::SplitDriver;

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

/// Who has the image as a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum User {
    /// Our daemon.
    Ours,
    /// The same with `lock=off`.
    Unlocked,
    /// QEMU, for its guest. It wants nobody else to write.
    Guest,
    /// QEMU's storage daemon, for vhost-user. Others may write to a raw image.
    Export,
}

/// A disk: whose, and whether it is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Disk(User, bool);

impl Disk {
    const ALL: [Disk; 6] = [
        Disk(User::Ours, true),
        Disk(User::Ours, false),
        Disk(User::Guest, true),
        Disk(User::Guest, false),
        Disk(User::Export, true),
        Disk(User::Export, false),
    ];

    /// QEMU's that this one has to be like.
    fn model(self) -> Disk {
        match self {
            Disk(User::Ours, writes) => Disk(User::Guest, writes),
            other => other,
        }
    }
}

/// Who comes to an image that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Comer {
    Disk(Disk),
    Tool(&'static str),
}

impl Comer {
    /// All who know images of this format.
    fn all(format: &str) -> impl Iterator<Item = Comer> {
        let check = (format == "qcow2").then_some("qemu-img check");
        let tools = ["qemu-img info", "qemu-img info -U", "qemu-io -r", "qemu-io"];
        let tools = tools.into_iter().chain(check).map(Comer::Tool);
        Disk::ALL.into_iter().map(Comer::Disk).chain(tools)
    }

    fn model(self) -> Comer {
        match self {
            Comer::Disk(disk) => Comer::Disk(disk.model()),
            tool => tool,
        }
    }
}

/// An image that several want to use.
struct Image {
    path: PathBuf,
    format: &'static str,
    dir: TempDir,
}

impl Image {
    fn new(format: &'static str) -> Image {
        let dir = TempDir::new("locks");
        let path = match format {
            "raw" => image(&dir).0,
            _ => create(&dir, "disk.qcow2", "cluster_size=64k"),
        };
        Image { path, format, dir }
    }

    /// A program that has it as a disk until it is told to end.
    fn command(&self, Disk(user, writes): Disk) -> Command {
        let mut command = Command::new("timeout");
        command.arg("300");
        let (path, format) = (self.path.display(), self.format);
        let socket = self.dir.path(&unique());
        let socket = socket.display();
        let read_only = if writes { "off" } else { "on" };
        let node = format!(
            "driver={format},node-name=disk,read-only={read_only},file.driver=file,\
             file.filename={path}"
        );
        let ours = |more: &str| {
            format!("socket={socket},path={path},format={format},read_only={read_only}{more}")
        };
        let vringd = [env!("CARGO_BIN_EXE_vringd"), "run", "--core", "1", "--blk"];
        match user {
            User::Ours => command.args(vringd).arg(ours("")),
            User::Unlocked => command.args(vringd).arg(ours(",lock=off")),
            User::Guest => command
                .args(["qemu-system-x86_64", "-M", "q35", "-accel", "tcg"])
                .args(["-S", "-m", "64", "-display", "none", "-nodefaults"])
                .args(["-qmp", "stdio", "-blockdev", &node])
                .args(["-device", "virtio-blk-pci,drive=disk"]),
            User::Export => {
                let writable = if writes { "on" } else { "off" };
                let export = format!(
                    "type=vhost-user-blk,id=e,node-name=disk,writable={writable},\
                     addr.type=unix,addr.path={socket}"
                );
                command
                    .args(["qemu-storage-daemon", "--blockdev", &node])
                    .args(["--export", &export, "--chardev", "stdio,id=qmp"])
                    .args(["--monitor", "chardev=qmp"])
            }
        };
        command
    }

    /// Somebody has it as a disk, or is told why not.
    fn used(&self, disk: Disk) -> Result<Using, String> {
        let mut command = self.command(disk);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        // QEMU answers this once all of its devices are there, and not before, as it greets.
        let ask = r#"{"execute":"qmp_capabilities"} {"execute":"query-version","id":"up"}"#;
        let mut stdin = child.stdin.take().expect("it is piped");
        // Who has ended by now does not read it.
        let _ = stdin.write_all(ask.as_bytes());
        child.stdin = Some(stdin);
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut using = Using(child, out);
        let up = |line: &str| line == "ready" || line.contains(r#""id": "up""#);
        let mut lines = using.1.by_ref().lines().map_while(Result::ok);
        if lines.any(|line| up(&line)) {
            return Ok(using);
        }
        let mut why = String::new();
        let err = using.0.stderr.as_mut().expect("it is piped");
        err.read_to_string(&mut why).expect("text");
        Err(why)
    }

    /// One of QEMU's tools looks at it, or is told why not.
    fn looked_at(&self, tool: &str) -> Result<(), String> {
        let (mut command, path) = (Command::new("timeout"), self.path.as_os_str());
        command.arg("300").args(tool.split_whitespace());
        match tool.starts_with("qemu-io") {
            true => command.args(["-f", self.format, "-c", "read 0 512"]),
            false => command.args(["-f", self.format]),
        };
        let output = command.arg(path).output().expect("it starts");
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(why)
    }

    /// The locked bytes of `file`.
    fn locks(file: &Path) -> Vec<(u64, u64)> {
        let inode = file.metadata().unwrap().ino().to_string();
        let all = std::fs::read_to_string("/proc/locks").unwrap();
        let of_file = all.lines().filter_map(|line| {
            // "1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101"
            let words: Vec<_> = line.split_whitespace().collect();
            let [.., place, first, last] = words[..] else {
                panic!("no lock: {line}");
            };
            let ours = place.rsplit(':').next() == Some(&inode);
            ours.then(|| (first.parse().unwrap(), last.parse().unwrap()))
        });
        let mut found: Vec<_> = of_file.collect();
        found.sort_unstable();
        found
    }
}

/// Somebody who uses an image, and what else is said; ended at the end.
struct Using(Child, BufReader<ChildStdout>);

impl Drop for Using {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.0.id()).expect("a pid");
        // `timeout` hands the signal on.
        let _ = Command::new("kill").arg(pid.to_string()).status();
        let _ = self.0.wait();
    }
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
    for reader in &readers {
        let answer = reader.open::<SplitDriver>(0).run(IN, 0, &[], 4096);
        assert_same("read", &answer.data, &model[..4096]);
    }
    let message = refused(&path, "");
    assert!(message.contains("allows nobody to write"), "{message}");
}

/// Every pair of users, each of ours once as the first and once as the second, against the same
/// pair with a guest of QEMU's in our place.
fn we_are_what_a_guest_of_qemus_is(format: &'static str) {
    let image = Image::new(format);
    let mut may = BTreeMap::new();
    for holder in Disk::ALL {
        let _held = image.used(holder).expect("nobody else has it");
        for comer in Comer::all(format) {
            let told = match comer {
                Comer::Disk(disk) => image.used(disk).map(|_| ()),
                Comer::Tool(tool) => image.looked_at(tool),
            };
            if let Err(why) = &told {
                // QEMU's words, and ours.
                let of_lock = [r#"" lock"#, r#"lock = "off""#]
                    .iter()
                    .any(|it| why.contains(it));
                assert!(of_lock, "{comer:?} at {holder:?}: {why}");
            }
            may.insert((holder, comer), told.is_ok());
        }
    }
    for (&(holder, comer), &allowed) in &may {
        let qemu = may[&(holder.model(), comer.model())];
        assert_eq!(allowed, qemu, "{format}: {comer:?} comes to {holder:?}");
    }
    // There is something to be like.
    let guest = |writes| Disk(User::Guest, writes);
    let pairs = [(true, true), (true, false), (false, true), (false, false)];
    let guests = pairs.map(|(first, second)| may[&(guest(first), Comer::Disk(guest(second)))]);
    assert_eq!(guests, [false, false, false, true], "{format}");
    let looks = |tool| may[&(Disk(User::Ours, true), Comer::Tool(tool))];
    assert!(looks("qemu-img info -U") && !looks("qemu-io"), "{format}");
    if format == "qcow2" {
        assert!(!looks("qemu-img info") && !looks("qemu-img check"));
    }
}

#[test]
fn with_raw_images_we_are_what_a_guest_of_qemus_is() {
    we_are_what_a_guest_of_qemus_is("raw");
}

#[test]
fn with_qcow2_images_we_are_what_a_guest_of_qemus_is() {
    we_are_what_a_guest_of_qemus_is("qcow2");
}

#[test]
fn qemu_and_we_name_the_image_that_the_other_one_has() {
    let image = Image::new("raw");
    let path = &*image.path.to_string_lossy();
    let theirs = image.used(Disk(User::Export, true)).unwrap();
    for keys in ["", ",read_only=true"] {
        let message = refused(&image.path, keys);
        let named = message.contains(path) && message.contains("writes to it");
        assert!(named, "{message}");
    }
    drop(theirs);
    let _ours = image.used(Disk(User::Ours, true)).unwrap();
    let message = image.used(Disk(User::Guest, true)).map(|_| ()).unwrap_err();
    assert!(
        message.contains(path) && message.contains("Failed to get"),
        "{message}"
    );
}

/// Bytes 100 to 103 say what one does, 200 to 203 what others may not: read, write, .., resize.
#[test]
fn with_locks_off_nothing_is_locked_and_nobody_looked_for() {
    for format in ["raw", "qcow2"] {
        let image = Image::new(format);
        for (disk, locks) in [
            (Disk(User::Ours, true), &[(100, 101), (201, 201)][..]),
            (Disk(User::Ours, false), &[(100, 100), (201, 201)]),
            (Disk(User::Unlocked, true), &[]),
            (Disk(User::Unlocked, false), &[]),
        ] {
            let _used = image.used(disk).expect("nobody else has it");
            assert_eq!(Image::locks(&image.path), locks, "{format}: {disk:?}");
        }
        for [first, second] in [[User::Unlocked, User::Guest], [User::Guest, User::Unlocked]] {
            let _first = image.used(Disk(first, true)).expect("nobody else has it");
            if let Err(why) = image.used(Disk(second, true)) {
                panic!("{format}: {second:?} after {first:?}: {why}");
            }
        }
    }
}

#[test]
fn a_backing_file_is_locked_where_its_image_is() {
    let dir = TempDir::new("locks");
    let (base, _) = image(&dir);
    let image = create(&dir, "top.qcow2", "backing_file=disk.img,backing_fmt=raw");
    let on_it = format!("format=qcow2,backing_dir={}", dir.path("").display());
    for (more, locks) in [("", &[(100, 100), (201, 201)][..]), (",lock=off", &[])] {
        let keys = format!("path={},{on_it}{more}", image.display());
        let _served = Served::start(TempDir::new("backed"), &keys);
        assert_eq!(Image::locks(&base), locks, "{more}");
    }
}
