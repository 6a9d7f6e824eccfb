//! A real QEMU guest whose disk grows while it runs: what its kernel sees, and where its data goes.

mod support;

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::path::Path;
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::guest::{Disk, Guest, GuestConfig};
    use super::support::tmp::{TempDir, sha256};

    const SOON: Duration = Duration::from_secs(20);
    const MIB: u64 = 1 << 20;

    /// As `truncate -s`.
    fn set_len(path: &Path, bytes: u64) {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(bytes).unwrap();
    }

    fn wait_size(guest: &mut Guest, disk: &str, bytes: u64) {
        let sectors = (bytes / 512).to_string();
        wait_until("the guest's size of the disk", SOON, || {
            (guest.ok(&format!("cat /sys/block/{disk}/size")) == sectors).then_some(())
        });
    }

    #[test]
    fn a_guest_sees_its_disks_grow_and_uses_what_is_new() {
        let dir = TempDir::new("resize");
        let (image, _) = dir.random_file("disk.img", 16 << 20, 3);
        File::create(dir.path("other.img")).unwrap();
        set_len(&dir.path("other.img"), 8 * MIB);
        let blk = |name: &str| {
            let socket = dir.path(&format!("{name}.sock"));
            let path = dir.path(&format!("{name}.img"));
            format!(
                "name={name},socket={},path={}",
                socket.display(),
                path.display()
            )
        };
        let args = ["run", "--core", "1", "--blk", &blk("disk")];
        let daemon = Daemon::start(&[&args[..], &["--blk", &blk("other")]].concat());
        let disk = |name: &str, packed| Disk {
            socket: dir.path(&format!("{name}.sock")),
            queues: 1,
            packed,
            extra: "",
        };
        let mut guest = Guest::boot(&GuestConfig {
            disks: vec![disk("disk", true), disk("other", false)],
            ..GuestConfig::default()
        });
        wait_size(&mut guest, "vda", 16 * MIB);
        guest.ok("mke2fs -q /dev/vdb >/dev/null 2>&1");
        for (from, to) in [(16, 40), (40, 64)] {
            set_len(&image, to * MIB);
            wait_size(&mut guest, "vda", to * MIB);
            let seen = guest.ok("dmesg | grep 'vda.*new size' | tail -n 1");
            let blocks = format!("new size: {} 512-byte logical blocks", to * 2048);
            assert!(seen.contains(&blocks), "{seen}");
            // All that is new, from its first byte to its last.
            let mib = to - from;
            let wrote = guest.ok(&format!(
                "dd if=/dev/urandom of=/tmp/x bs=1M count={mib} 2>/dev/null && \
                 dd if=/tmp/x of=/dev/vda bs=1M seek={from} oflag=direct conv=fsync 2>/dev/null \
                 && sha256sum </tmp/x"
            ));
            assert!(wrote.starts_with(&sha256(&image, from, mib)), "{wrote}");
            let (status, _) =
                guest.run(&format!("dd if=/tmp/x of=/dev/vda bs=1M seek={to} count=1"));
            assert_ne!(status, 0, "nothing is behind it");
            assert_eq!(std::fs::metadata(&image).unwrap().len(), to * MIB);
        }
        // The old part, too.
        let read = guest.ok("dd if=/dev/vda bs=1M count=64 2>/dev/null | sha256sum");
        assert!(read.starts_with(&sha256(&image, 0, 64)), "{read}");
        // A mounted one; split rings.
        guest.ok("mount -t ext4 /dev/vdb /mnt && cp /bin/busybox /mnt/a");
        set_len(&dir.path("other.img"), 24 * MIB);
        wait_size(&mut guest, "vdb", 24 * MIB);
        guest.ok("cmp /bin/busybox /mnt/a && umount /mnt");
        assert_eq!(
            daemon.counter("disk", "errors"),
            0,
            "the guest knows its end"
        );
        // The guest is started anew in the same session.
        set_len(&image, 80 * MIB);
        guest.reset();
        wait_size(&mut guest, "vda", 80 * MIB);
        drop(guest);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }
}
