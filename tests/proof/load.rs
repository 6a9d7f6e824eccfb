//! fio with its own checks, and file systems under load, on the disk of a guest.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::guest::{Disk, Guest, GuestConfig, Tools};
use crate::support::tmp::TempDir;

const SOON: Duration = Duration::from_secs(20);
/// Seconds that a load lasts.
const SHORT: u32 = 8;
const DISK_BYTES: u64 = 512 << 20;
/// FLUSH, MQ, DISCARD, WRITE_ZEROES, RING_EVENT_IDX, VERSION_1.
const BITS: [u32; 6] = [9, 12, 13, 14, 29, 32];
const PACKED: u64 = 1 << 34;

/// The daemon's own word on what a session negotiated.
pub fn assert_negotiated(daemon: &Daemon, device: &str, packed: bool) {
    let line = daemon.wait_log(&format!("negotiated device={device} "), SOON);
    assert_eq!(line.contains("VIRTIO_F_RING_PACKED"), packed, "{line}");
    assert_eq!(line.contains("rings=packed"), packed, "{line}");
    for name in [
        "VIRTIO_BLK_F_MQ",
        "VIRTIO_BLK_F_DISCARD",
        "VIRTIO_BLK_F_FLUSH",
    ] {
        assert!(line.contains(name), "{line}");
    }
}

/// What the guest's driver says of a disk.
pub fn has_features(guest: &mut Guest, disk: &str, packed: bool) {
    let features = guest.features(&format!("/sys/block/{disk}/device"));
    assert_eq!(features & PACKED != 0, packed, "{features:#x}");
    for bit in BITS {
        assert_ne!(features & (1 << bit), 0, "bit {bit} of {features:#x}");
    }
    let queues = guest.ok(&format!("ls /sys/block/{disk}/mq | wc -l"));
    assert_eq!(queues, "2", "a hardware queue for each CPU");
}

/// A guest with one disk of a file, on two queues.
struct Loaded {
    guest: Guest,
    daemon: Daemon,
    seconds: u32,
    _image: PathBuf,
    _dir: TempDir,
}

impl Loaded {
    fn start(packed: bool) -> Loaded {
        let dir = TempDir::new("load");
        let image = dir.path("disk.img");
        let file = File::create(&image).expect("an image");
        file.set_len(DISK_BYTES).expect("a sparse file");
        let socket = dir.path("disk0.sock");
        let blk = format!(
            "name=disk0,socket={},path={},queues=2",
            socket.display(),
            image.display()
        );
        let daemon = Daemon::start(&["run", "--core", "1", "--idle", "adaptive", "--blk", &blk]);
        let mut guest = Guest::boot(&GuestConfig {
            disks: vec![Disk {
                socket,
                queues: 2,
                packed,
                extra: ",discard=on,write-zeroes=on",
            }],
            tools: Some(Tools::default()),
            ..GuestConfig::default()
        });
        assert_negotiated(&daemon, "disk0", packed);
        has_features(&mut guest, "vda", packed);
        Loaded {
            guest,
            daemon,
            seconds: super::soak().unwrap_or(SHORT),
            _image: image,
            _dir: dir,
        }
    }

    /// Runs a line that takes as long as a load, and the machine as long again.
    fn run(&mut self, line: &str) -> (i32, String) {
        let patience = Duration::from_secs(60 + 6 * u64::from(self.seconds));
        self.guest.run_within(line, patience)
    }

    fn ok(&mut self, line: &str) -> String {
        let (status, output) = self.run(line);
        assert_eq!(status, 0, "{line}: {output}\n{}", self.guest.said());
        output.trim().to_owned()
    }

    /// Nothing went wrong that the guest did not notice.
    fn finish(self) {
        for counter in ["errors", "ring_faults", "unaligned"] {
            assert_eq!(self.daemon.counter("disk0", counter), 0, "{counter}");
        }
        for counter in ["discards", "flushes", "writes", "reads"] {
            assert_ne!(self.daemon.counter("disk0", counter), 0, "{counter}");
        }
        drop(self.guest);
        let (status, log) = self.daemon.stop();
        assert!(status.success(), "{log}");
    }
}

const FIO: &str = "fio --name=blocks --filename=/dev/vda --direct=1 --ioengine=libaio \
    --iodepth=16 --numjobs=2 --offset_increment=128m --cpus_allowed=0-1 \
    --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 --group_reporting --eta=never";

/// fio writes blocks of random sizes with their checksums, each of them trimmed before in every
/// other pass, and reads all of them back; two jobs on two CPUs at once.
fn fio_finds_what_it_wrote(loaded: &mut Loaded) {
    let seconds = loaded.seconds;
    let passes = loaded.ok(&format!(
        "end=$(($(date +%s) + {seconds})); pass=0; while [ $(date +%s) -lt $end ]; do \
         pass=$((pass + 1)); for rw in randtrimwrite randwrite; do \
         {FIO} --size=8m --bsrange=512-64k --fsync=100 --rw=$rw --randseed=$pass \
         >/tmp/fio 2>&1 || {{ cat /tmp/fio; exit 1; }}; \
         grep -q 'err= 0' /tmp/fio || exit 1; done; done; echo $pass"
    ));
    assert_ne!(passes, "0");
    println!("{passes} passes of fio, with trims and without");
}

/// The check can fail: a wrong bit in a block that fio wrote is found.
fn fio_finds_a_wrong_bit(loaded: &mut Loaded) {
    let fio = format!("{FIO} --size=1m --rw=randwrite --bs=4k --randseed=7");
    loaded.ok(&fio);
    loaded.ok(&format!("{fio} --verify_only"));
    loaded.ok(
        "dd if=/dev/vda of=/tmp/b bs=4k skip=100 count=1 iflag=direct 2>/dev/null; \
         b=$(od -An -tu1 -j2000 -N1 /tmp/b); \
         printf \"\\\\0$(printf %o $((b ^ 1)))\" >/tmp/c; \
         dd if=/tmp/c of=/tmp/b bs=1 seek=2000 conv=notrunc 2>/dev/null; \
         dd if=/tmp/b of=/dev/vda bs=4k seek=100 oflag=direct 2>/dev/null",
    );
    let (status, said) = loaded.run(&format!("{fio} --verify_only"));
    assert_ne!(status, 0, "one wrong bit is not noticed: {said}");
    assert!(said.contains("verify"), "{said}");
}

/// Four at once make, grow, overwrite, cut, rename, link and remove files, 64 steps each and until
/// the time is up. `$1` is where, `$2` how many seconds; /tmp/pool has random bytes.
const STRESS: &str = r#"
end=$(($(date +%s) + $2))
cd "$1"
worker() {
    mkdir w$1 && cd w$1 || exit 1
    i=0
    while [ $((i % 16)) -gt 0 ] || [ $i -lt 64 ] || [ "$(date +%s)" -lt "$end" ]; do
        i=$((i + 1))
        a=f$((RANDOM % 40)) b=d$((RANDOM % 4))/f$((RANDOM % 40)) size=$((RANDOM % 64 + 1))
        from="if=/tmp/pool bs=$((RANDOM % 4000 + 97)) skip=$((RANDOM % 200)) count=$size"
        [ -d ${b%/*} ] || mkdir ${b%/*}
        case $((RANDOM % 12)) in
            0|1|2) dd $from of=$a 2>/dev/null ;;
            3) dd $from of=$b 2>/dev/null ;;
            4) dd $from of=$a conv=notrunc seek=$((RANDOM % 50)) 2>/dev/null ;;
            5) dd $from of=$b conv=fsync 2>/dev/null ;;
            6) [ ! -f $a ] || mv $a $b ;;
            7) [ ! -f $b ] || [ -e $a.l ] || ln $b $a.l ;;
            8) rm -f $a ;;
            9) [ ! -f $a ] || truncate -s $((RANDOM * 8)) $a ;;
            10) rm -rf d$((RANDOM % 4)) ;;
            11) ln -sf $b s$((RANDOM % 9)); rm -f f$((RANDOM % 40)).l ;;
        esac || exit 1
    done
    echo $i >>/tmp/count
}
for n in 1 2 3 4; do (worker $n) & pids="$pids $!"; done
status=0
for pid in $pids; do wait $pid || status=1; done
exit $status
"#;

struct FileSystem {
    name: &'static str,
    make: &'static str,
    check: &'static str,
}

const EXT4: FileSystem = FileSystem {
    name: "ext4",
    make: "/usr/sbin/mkfs.ext4 -qF",
    check: "/usr/sbin/e2fsck -fn",
};
const XFS: FileSystem = FileSystem {
    name: "xfs",
    make: "/usr/sbin/mkfs.xfs -qf",
    check: "/usr/sbin/xfs_repair -n",
};

/// A file system is made, filled at random, checked and mounted again: all files are as they were.
fn file_system_survives(loaded: &mut Loaded, kind: &FileSystem) {
    let (seconds, name) = (loaded.seconds, kind.name);
    let script: String = STRESS.lines().map(|line| format!("{line}\\n")).collect();
    let script = script.replace('%', "%%");
    loaded.ok(&format!("rm -f /tmp/count; printf '{script}' >/tmp/stress"));
    loaded.ok("dd if=/dev/urandom of=/tmp/pool bs=1M count=2 2>/dev/null");
    let mount = format!("mount -t {name} /dev/vda /mnt");
    loaded.ok(&format!("{} /dev/vda && {mount}", kind.make));
    loaded.ok(&format!("sh /tmp/stress /mnt {seconds}"));
    let list = "(cd /mnt; find . -type f | sort | xargs sha256sum)";
    let names = "(cd /mnt; find . -type l -o -type d | sort)";
    loaded.ok(&format!("{list} >/tmp/sums; {names} >/tmp/names"));
    let number = |text: String| text.parse::<u32>().expect("a number");
    let files = number(loaded.ok("wc -l </tmp/sums"));
    assert!(files > 8, "only {files} files");
    let steps = loaded.ok("cat /tmp/count");
    println!("{name}: {files} files of {steps:?} steps");
    loaded.ok(&format!(
        "fstrim /mnt && umount /mnt && {} /dev/vda",
        kind.check
    ));
    loaded.ok(&format!("echo 3 >/proc/sys/vm/drop_caches; {mount}"));
    loaded.ok(&format!(
        "{list} | cmp - /tmp/sums && {names} | cmp - /tmp/names"
    ));
    loaded.ok("umount /mnt");
}

/// In a longer run every file system is tried on either ring.
fn kinds(short: FileSystem) -> Vec<FileSystem> {
    if super::soak().is_some() {
        vec![EXT4, XFS]
    } else {
        vec![short]
    }
}

#[test]
fn fio_and_xfs_find_what_they_wrote_on_split_rings() {
    let mut loaded = Loaded::start(false);
    fio_finds_what_it_wrote(&mut loaded);
    for kind in kinds(XFS) {
        file_system_survives(&mut loaded, &kind);
    }
    loaded.finish();
}

#[test]
fn fio_and_ext4_find_what_they_wrote_on_packed_rings() {
    let mut loaded = Loaded::start(true);
    fio_finds_what_it_wrote(&mut loaded);
    fio_finds_a_wrong_bit(&mut loaded);
    for kind in kinds(EXT4) {
        file_system_survives(&mut loaded, &kind);
    }
    loaded.finish();
}
