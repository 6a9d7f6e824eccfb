//! A real QEMU guest: Debian's kernel and a busybox initramfs (scripts/guest-image), driven over a
//! serial port.
//!
//! The guest runs under TCG: what is measured here is right and wrong, not speed.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::deadline::wait_until;
use super::initrd;
use super::tmp::TempDir;

/// A boot takes about 5 s, a loaded machine a multiple.
const BOOT: Duration = Duration::from_secs(90);
const COMMAND: Duration = Duration::from_secs(60);
/// How often a line is sent of which the guest gets a part.
const LINE_TRIES: usize = 5;

/// A disk of the guest.
#[derive(Clone)]
pub struct Disk {
    pub socket: PathBuf,
    pub queues: u16,
    pub packed: bool,
    /// More properties of the device, each with a leading comma.
    pub extra: &'static str,
}

/// A network card of the guest.
#[derive(Clone)]
pub struct Nic {
    pub socket: PathBuf,
    pub queues: u16,
    pub packed: bool,
    pub mac: &'static str,
    /// More properties of the device, each with a leading comma.
    pub extra: &'static str,
}

/// What the guest is made of.
#[derive(Clone, Default)]
pub struct GuestConfig {
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    /// QEMU listens at the sockets of all of these, and back-ends connect.
    pub listens: bool,
    /// Others, as QEMU names them.
    pub devices: Vec<&'static str>,
    /// The guest for proofs on disks (scripts/guest-image --tools), and what it has besides.
    pub tools: Option<Tools>,
}

/// What a guest with tools has besides.
#[derive(Clone, Default)]
pub struct Tools {
    /// Raw files that QEMU itself serves: block devices after those of [`GuestConfig::disks`].
    pub drives: Vec<PathBuf>,
    /// Such files too: each the only namespace of an NVMe controller.
    pub nvme: Vec<PathBuf>,
    /// Programs of this machine, which are in the guest's /proof.
    pub programs: Vec<PathBuf>,
}

/// A running guest.
pub struct Guest {
    qemu: Child,
    shell: UnixStream,
    qmp: UnixStream,
    dir: TempDir,
}

/// The kernel and initramfs, built once.
fn image() -> [PathBuf; 2] {
    static IMAGE: OnceLock<()> = OnceLock::new();
    IMAGE.get_or_init(|| build_image(&[]));
    ["vmlinuz", "initrd.gz"].map(|file| built("guest", file))
}

/// The same of the guest for proofs on disks.
fn tools_image() -> [PathBuf; 2] {
    static IMAGE: OnceLock<()> = OnceLock::new();
    IMAGE.get_or_init(|| build_image(&["--tools"]));
    ["vmlinuz", "initrd"].map(|file| built("guest-tools", file))
}

fn built(image: &str, file: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("build").join(image).join(file)
}

fn build_image(arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest-image");
    let done = Command::new(script).args(arguments).status();
    let done = done.expect("scripts/guest-image runs").success();
    assert!(done, "no guest image {arguments:?}");
}

/// QEMU's version.
fn version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let output = Command::new("qemu-system-x86_64").arg("--version").output();
        let output = output.expect("qemu-system-x86_64 (package qemu-system-x86) runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split("version ").nth(1).expect("a version");
        let parts = version.split(|c: char| !c.is_ascii_digit());
        let mut numbers = parts.map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    })
}

/// What QEMU does at its sockets: listen; or connect, and reconnect quickly, for which the word
/// changed with version 9.2.
fn way(config: &GuestConfig) -> &'static str {
    if config.listens {
        "server=on,wait=off"
    } else if version() >= (9, 2) {
        "reconnect-ms=100"
    } else {
        "reconnect=1"
    }
}

/// MSI-X vectors of a network card. QEMU 7.2 without KVM crashes when a vhost-user card's vectors
/// are unmasked (whatever the back-end): it gets none there.
fn vectors(queues: u16) -> u16 {
    if version() < (8, 0) {
        0
    } else {
        2 * queues + 2
    }
}

fn device_arguments(config: &GuestConfig) -> Vec<String> {
    let mut args = Vec::new();
    let on = |packed: bool| if packed { "on" } else { "off" };
    for device in &config.devices {
        args.extend(["-device".into(), (*device).into()]);
    }
    for (number, disk) in config.disks.iter().enumerate() {
        let socket = disk.socket.display();
        args.push("-chardev".into());
        args.push(format!(
            "socket,id=disk{number},path={socket},{}",
            way(config)
        ));
        args.push("-device".into());
        args.push(format!(
            "vhost-user-blk-pci,chardev=disk{number},num-queues={},packed={}{}",
            disk.queues,
            on(disk.packed),
            disk.extra
        ));
    }
    let drives = config.tools.iter().flat_map(|tools| &tools.drives);
    for drive in drives {
        args.push("-drive".into());
        args.push(format!(
            "file={},if=virtio,format=raw,cache=unsafe",
            drive.display()
        ));
    }
    let nvme = config.tools.iter().flat_map(|tools| &tools.nvme);
    for (number, file) in nvme.enumerate() {
        let file = file.display();
        args.push("-drive".into());
        args.push(format!(
            "id=nvme{number},file={file},if=none,format=raw,cache=unsafe"
        ));
        args.push("-device".into());
        args.push(format!(
            "nvme,drive=nvme{number},serial=vringd-nvme{number}"
        ));
    }
    for (number, nic) in config.nics.iter().enumerate() {
        args.push("-chardev".into());
        args.push(format!(
            "socket,id=nic{number},path={},{}",
            nic.socket.display(),
            way(config)
        ));
        args.push("-netdev".into());
        args.push(format!(
            "vhost-user,id=net{number},chardev=nic{number},queues={}",
            nic.queues
        ));
        args.push("-device".into());
        args.push(format!(
            "virtio-net-pci,netdev=net{number},mq=on,vectors={},packed={},mac={}{}",
            vectors(nic.queues),
            on(nic.packed),
            nic.mac,
            nic.extra
        ));
    }
    args
}

impl Guest {
    /// Boots a guest and waits until it takes commands.
    pub fn boot(config: &GuestConfig) -> Guest {
        let dir = TempDir::new("guest");
        let ([kernel, initrd], mib) = match &config.tools {
            None => (image(), 512),
            Some(tools) => {
                let [kernel, initrd] = tools_image();
                ([kernel, initrd::with_programs(initrd, tools, &dir)], 1024)
            }
        };
        let (shell, qmp) = (dir.path("shell.sock"), dir.path("qmp.sock"));
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                &mib.to_string(),
                "-object",
                &format!("memory-backend-memfd,id=mem,size={mib}M,share=on"),
            ])
            .args([
                "-machine",
                "q35,memory-backend=mem",
                "-display",
                "none",
                "-nodefaults",
            ])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", "console=ttyS0 quiet panic=1"])
            .arg("-serial")
            .arg(format!("file:{}", dir.path("console").display()))
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=off", shell.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .args(device_arguments(config))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.path("qemu")).expect("a log file"));
        let mut qemu = command
            .spawn()
            .expect("qemu-system-x86_64 (package qemu-system-x86) runs");
        let connect = |path: &Path, qemu: &mut Child| {
            wait_until("QEMU's sockets", BOOT, || {
                let ended = qemu.try_wait().expect("QEMU can be waited for");
                let said = fs::read_to_string(dir.path("qemu")).unwrap_or_default();
                assert!(ended.is_none(), "QEMU ended with {ended:?}: {said}");
                UnixStream::connect(path).ok()
            })
        };
        let shell = connect(&shell, &mut qemu);
        let qmp = connect(&qmp, &mut qemu);
        let mut guest = Guest {
            qemu,
            shell,
            qmp,
            dir,
        };
        guest.read_until("VRINGD-READY", BOOT);
        guest.qmp("qmp_capabilities");
        guest
    }

    /// What the guest's kernel and QEMU said, for a failing test.
    pub fn said(&self) -> String {
        let read = |file: &str| fs::read_to_string(self.dir.path(file)).unwrap_or_default();
        format!("console:\n{}\nqemu:\n{}", read("console"), read("qemu"))
    }

    /// What QEMU wrote to stderr: it tells there when it falls back.
    pub fn qemu_said(&self) -> String {
        fs::read_to_string(self.dir.path("qemu")).unwrap_or_default()
    }

    /// Reads the shell's output up to a line that begins with `mark`; returns what came before it,
    /// and the rest of that line.
    fn read_until(&mut self, mark: &str, patience: Duration) -> (String, String) {
        let deadline = Instant::now() + patience;
        let mut text = Vec::new();
        let mut byte = [0; 4096];
        self.shell
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a time-out");
        loop {
            if let Some((before, rest)) = split_at_mark(&text, mark) {
                return (before, rest);
            }
            match self.shell.read(&mut byte) {
                Ok(0) => panic!("the guest is gone: {}", self.said()),
                Ok(count) => text.extend_from_slice(&byte[..count]),
                Err(_) => {
                    let text = String::from_utf8_lossy(&text);
                    let late = Instant::now() > deadline;
                    assert!(
                        !late,
                        "no {mark} in {patience:?}, but {text:?}\n{}",
                        self.said()
                    );
                }
            }
        }
    }

    /// Runs a shell line in the guest; its exit status and output.
    pub fn run(&mut self, line: &str) -> (i32, String) {
        self.run_within(line, COMMAND)
    }

    pub fn run_within(&mut self, line: &str, patience: Duration) -> (i32, String) {
        let line = line.trim();
        for _ in 0..LINE_TRIES {
            self.shell
                .write_all(format!("{} {line}\n", line.len()).as_bytes())
                .expect("the guest listens");
            let (output, status) = self.read_until("VRINGD-DONE ", patience);
            if status.trim() != "AGAIN" {
                return (status.trim().parse().expect("an exit status"), output);
            }
        }
        panic!("the guest got no whole line in {LINE_TRIES} tries: {line}");
    }

    /// Runs a shell line that must succeed; returns its output, trimmed.
    pub fn ok(&mut self, line: &str) -> String {
        let (status, output) = self.run(line);
        assert_eq!(status, 0, "{line}: {output}\n{}", self.said());
        output.trim().to_owned()
    }

    /// The feature bits that the guest's driver negotiated for a device under /sys.
    pub fn features(&mut self, sysfs: &str) -> u64 {
        let bits = self.ok(&format!("cat {sysfs}/features"));
        bits.chars()
            .enumerate()
            .fold(0, |all, (bit, c)| all | (u64::from(c == '1') << bit))
    }

    fn qmp(&mut self, command: &str) {
        self.qmp
            .write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes())
            .expect("QEMU listens");
    }

    /// Asks the guest's balloon to leave it so many bytes.
    pub fn balloon(&mut self, bytes: usize) {
        let command = "{\"execute\":\"balloon\",\"arguments\":{\"value\":";
        self.qmp
            .write_all(format!("{command}{bytes}}}}}\n").as_bytes())
            .expect("QEMU listens");
    }

    /// Bytes of the guest's memory that the host has pages for.
    pub fn memory_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        let fds = format!("/proc/{}/fd", self.qemu.id());
        let fds = fs::read_dir(fds).expect("QEMU runs");
        let memory = fds.flatten().find(|fd| {
            let name = fs::read_link(fd.path()).unwrap_or_default();
            name.to_string_lossy().starts_with("/memfd:memory-backend")
        });
        let memory = memory.expect("guest memory in a memfd").path();
        fs::metadata(memory).expect("an open file").blocks() * 512
    }

    /// Resets the machine from outside and waits until it is up again.
    pub fn reset(&mut self) {
        self.qmp("system_reset");
        self.read_until("VRINGD-READY", BOOT);
    }

    /// Reboots the machine from inside and waits until it is up again.
    pub fn reboot(&mut self) {
        self.shell
            .write_all(b"9 reboot -f\n")
            .expect("the guest listens");
        self.read_until("VRINGD-READY", BOOT);
    }

    /// Stops and continues the virtual machine.
    pub fn stop_and_continue(&mut self) {
        self.qmp("stop");
        self.qmp("cont");
    }

    /// Ends QEMU without any warning.
    pub fn kill(mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("--- {}---", self.said());
        }
    }
}

fn split_at_mark(text: &[u8], mark: &str) -> Option<(String, String)> {
    let text = String::from_utf8_lossy(text).replace('\r', "");
    let at = text.find(mark)?;
    let (before, from) = text.split_at(at);
    let (line, _) = from.split_once('\n')?;
    Some((before.to_owned(), line[mark.len()..].to_owned()))
}
