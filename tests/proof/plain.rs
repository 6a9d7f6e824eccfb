//! An encrypted disk beside dm-crypt: what a guest writes through the daemon, cryptsetup's plain
//! mode reads from the same image, and the other way round.

use std::fs;

use super::load::{assert_negotiated, has_features};
use crate::support::daemon::Daemon;
use crate::support::guest::{Disk, Guest, GuestConfig, Tools};
use crate::support::tmp::{TempDir, random_bytes, sha256};

/// As many MiB for each way, behind one another.
const MIB: usize = 2;

/// The same image twice: decrypted by the daemon, and as it is.
fn disks(dir: &TempDir, name: &str, keys: &str) -> [String; 2] {
    let (image, _) = dir.random_file(&format!("{name}.img"), (3 * MIB) << 20, 3);
    let disk = |way: &str, keys: &str| {
        format!(
            "name={name}-{way},socket={},path={},lock=off,queues=2{keys}",
            dir.path(&format!("{name}-{way}.sock")).display(),
            image.display()
        )
    };
    let key = dir.path("key");
    let plain = format!(",encrypt=aes-256-xts,key_file={}{keys}", key.display());
    [disk("plain", &plain), disk("raw", "")]
}

fn sum(guest: &mut Guest, device: &str, skip: usize, count: usize) -> String {
    guest.ok(&format!(
        "dd if={device} bs=1M skip={skip} count={count} iflag=direct 2>/dev/null | sha256sum"
    ))
}

/// `plain` is the daemon's view of the image, `raw` is given to dm-crypt.
fn both_ways(guest: &mut Guest, plain: &str, raw: &str, options: &str) {
    guest.ok(&format!(
        "DM_DISABLE_UDEV=1 cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \
         --key-file /tmp/key {options} {raw} crypt"
    ));
    let crypt = "/dev/mapper/crypt";
    // The image is noise: both have to decrypt it in the same way before anybody wrote to it.
    let noise = sum(guest, plain, 0, 3 * MIB);
    assert_eq!(sum(guest, crypt, 0, 3 * MIB), noise);
    for (at, from, to) in [(0, plain, crypt), (MIB, crypt, plain)] {
        let wrote = guest.ok(&format!(
            "dd if=/dev/urandom of=/tmp/x bs=1M count={MIB} 2>/dev/null; \
             dd if=/tmp/x of={from} bs=64k seek={} oflag=direct conv=fsync 2>/dev/null; \
             sha256sum </tmp/x",
            at * 16
        ));
        assert_eq!(
            sum(guest, to, at, MIB),
            wrote,
            "written to {from}, read from {to}"
        );
        assert_eq!(sum(guest, from, at, MIB), wrote, "{from}");
    }
    // What nobody wrote is as it was.
    assert_ne!(sum(guest, plain, 0, 3 * MIB), noise);
    let rest = sum(guest, plain, 2 * MIB, MIB);
    assert_eq!(sum(guest, crypt, 2 * MIB, MIB), rest);
    guest.ok("DM_DISABLE_UDEV=1 cryptsetup close crypt");
}

#[test]
fn cryptsetup_and_the_daemon_read_each_others_disks() {
    let dir = TempDir::new("plain");
    let key = random_bytes(43, 64);
    fs::write(dir.path("key"), &key).unwrap();
    let small = disks(&dir, "small", "");
    let large = disks(&dir, "large", ",block_size=4096,encrypt_sector=4096");
    let mut args = vec!["run", "--core", "1", "--idle", "adaptive"];
    for disk in small.iter().chain(&large) {
        args.extend(["--blk", disk]);
    }
    let daemon = Daemon::start(&args);
    let names = ["small-plain", "small-raw", "large-plain", "large-raw"];
    let disks = names.iter().zip([true, false, false, true]);
    let disks = disks.map(|(name, packed)| Disk {
        socket: dir.path(&format!("{name}.sock")),
        queues: 2,
        packed,
        extra: "",
    });
    let mut guest = Guest::boot(&GuestConfig {
        disks: disks.collect(),
        tools: Some(Tools::default()),
        ..GuestConfig::default()
    });
    for (name, packed) in names.iter().zip([true, false, false, true]) {
        assert_negotiated(&daemon, name, packed);
    }
    has_features(&mut guest, "vda", true);
    let octal: String = key.iter().map(|byte| format!("\\0{byte:03o}")).collect();
    guest.ok(&format!("printf '%b' '{octal}' >/tmp/key"));
    let sent = guest.ok("sha256sum </tmp/key");
    assert!(
        sent.starts_with(&crate::support::tmp::sha256_of(&key)),
        "{sent}"
    );
    both_ways(&mut guest, "/dev/vda", "/dev/vdb", "");
    both_ways(&mut guest, "/dev/vdc", "/dev/vdd", "--sector-size 4096");
    // The image is what dm-crypt was given, not what it showed.
    let raw = sum(&mut guest, "/dev/vdb", 0, MIB);
    assert!(
        raw.starts_with(&sha256(&dir.path("small.img"), 0, MIB as u64)),
        "{raw}"
    );
    assert_ne!(sum(&mut guest, "/dev/vda", 0, MIB), raw);
    for name in names {
        assert_eq!(daemon.counter(name, "errors"), 0, "{name}");
    }
}
