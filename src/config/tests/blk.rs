//! What is refused about disks.

use super::*;

/// Some file.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

#[test]
fn refused_blk_flags_name_key_and_value() {
    for (list, message) in [
        ("socket=/b", "--blk disk0: path (or backend) is missing"),
        (
            "socket=/b,path=/x,backend=ram:1G",
            "--blk disk0: path and backend exclude each other",
        ),
        (
            "socket=/b,path=/no/such/disk",
            "--blk disk0: path = \"/no/such/disk\": No such file or directory (os error 2)",
        ),
        (
            "socket=/b,path=",
            "--blk disk0: path = \"\": must not be empty",
        ),
        (
            "socket=/b,path=/dev/null",
            "--blk disk0: path = \"/dev/null\": neither a file nor a block device",
        ),
        (
            "socket=/b,path=/",
            "--blk disk0: path = \"/\": neither a file nor a block device",
        ),
        (
            "socket=/b,path=DISK,encrypt=rot13,key_file=/k",
            "--blk disk0: encrypt = \"rot13\": unknown cipher \"rot13\" (known: aes-256-xts)",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts",
            "--blk disk0: key_file (or key_fd) is missing",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_file=/k,key_fd=5",
            "--blk disk0: key_file and key_fd exclude each other",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_file=",
            "--blk disk0: key_file = \"\": must not be empty",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_fd=2",
            "--blk disk0: key_fd = \"2\": not in 3..=2147483647",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_fd=2147483648",
            "--blk disk0: key_fd = \"2147483648\": not in 3..=2147483647",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_file=/k,encrypt_sector=1K",
            "--blk disk0: encrypt_sector = \"1K\": expected 512 or 4096",
        ),
        (
            "socket=/b,path=DISK,encrypt=aes-256-xts,key_file=/k,encrypt_sector=4K",
            "--blk disk0: encrypt_sector = \"4K\": \
             only has a meaning with block_size = 4096",
        ),
        (
            "socket=/b,backend=ram:1G,encrypt=aes-256-xts,key_file=/k",
            "--blk disk0: encrypt = \"aes-256-xts\": only has a meaning with path",
        ),
        (
            "socket=/b,path=DISK,key_fd=5",
            "--blk disk0: key_fd = \"5\": only has a meaning with encrypt",
        ),
        (
            "socket=/b,path=DISK,encrypt_sector=512",
            "--blk disk0: encrypt_sector = \"512\": \
             only has a meaning with encrypt",
        ),
        (
            "socket=/b,backend=rma:1G",
            "--blk disk0: backend = \"rma:1G\": unknown backend \"rma\" (known: ram, null; \
             a file or a device is given by path)",
        ),
        (
            "socket=/b,backend=ram",
            "--blk disk0: backend = \"ram\": backend \"ram\" needs an argument, as in \"ram:1G\"",
        ),
        (
            "socket=/b,backend=null:big",
            "--blk disk0: backend = \"null:big\": \
             expected a size such as 512, 64K, 100M, 10G or 1T",
        ),
        (
            "socket=/b,backend=ram:0",
            "--blk disk0: backend = \"ram:0\": expected a size above zero",
        ),
        (
            "socket=/b,backend=ram:513",
            "--blk disk0: backend = \"ram:513\": \
             513 bytes are not a multiple of the block size 512",
        ),
        (
            "socket=/b,backend=ram:512,block_size=4096",
            "--blk disk0: backend = \"ram:512\": \
             512 bytes are not a multiple of the block size 4096",
        ),
        (
            "socket=/b,backend=ram:99999999T",
            "--blk disk0: backend = \"ram:99999999T\": too large",
        ),
        (
            "socket=/b,backend=ram:1M,block_size=1024",
            "--blk disk0: block_size = \"1024\": expected 512 or 4096",
        ),
        (
            "socket=/b,backend=ram:1M,direct=true",
            "--blk disk0: direct = \"true\": only has a meaning with path",
        ),
        (
            "socket=/b,backend=ram:1M,lock=auto",
            "--blk disk0: lock = \"auto\": only has a meaning with path",
        ),
        (
            "socket=/b,backend=ram:1M,fault=eio=3+panic=1",
            "--blk disk0: fault = \"eio=3+panic=1\": unknown fault \"panic\" (known: eio, enospc, \
             eintr, eagain, short, delay_us, reorder, drop_flush)",
        ),
        (
            "socket=/b,backend=ram:1M,fault=eintr=1",
            "--blk disk0: fault = \"eintr=1\": not in 2..=1073741824",
        ),
        (
            "socket=/b,path=DISK,format=vmdk",
            "--blk disk0: format = \"vmdk\": unknown format \"vmdk\" (known: raw, qcow2)",
        ),
        (
            "socket=/b,path=DISK,format=raw,backing_dir=/i",
            "--blk disk0: backing_dir = \"/i\": only has a meaning with format = \"qcow2\"",
        ),
        (
            "socket=/b,path=DISK,format=qcow2,backing_dir=",
            "--blk disk0: backing_dir = \"\": must not be empty",
        ),
        (
            "socket=/b,backend=ram:1M,format=raw",
            "--blk disk0: format = \"raw\": only has a meaning with path",
        ),
        (
            "socket=/b,backend=ram:1M,on_enospc=wait",
            "--blk disk0: on_enospc = \"wait\": unknown on_enospc \"wait\" (known: report, hold)",
        ),
        (
            "socket=/b,backend=ram:1M,io_timeout=99ms",
            "--blk disk0: io_timeout = \"99ms\": expected \"off\" or a duration from 100ms",
        ),
        (
            "socket=/b,backend=ram:1M,cache=none",
            "--blk disk0: cache = \"none\": unknown cache \"none\" (known: \
             writeback, writethrough)",
        ),
        (
            "socket=/b,backend=ram:1M,read_only=maybe",
            "--blk disk0: read_only = \"maybe\": expected true or false",
        ),
        (
            "socket=/b,backend=ram:1M,serial=123456789012345678901",
            "--blk disk0: serial = \"123456789012345678901\": \
             21 bytes long, at most 20 are possible",
        ),
        (
            "socket=/b,backend=ram:1M,serial=é",
            "--blk disk0: serial = \"é\": \
             has 'é', only printable ASCII characters are possible",
        ),
    ] {
        let list = list.replace("DISK", FILE);
        assert_eq!(blk_flags(&list).unwrap_err().to_string(), message, "{list}");
    }
}

#[test]
fn an_encrypted_disk_has_a_key_and_a_sector() {
    let list = format!("socket=/b,path={FILE},block_size=4K,encrypt=aes-256-xts");
    let how = |more: &str| {
        blk_flags(&format!("{list},{more}")).unwrap().blks[0]
            .encrypt
            .clone()
    };
    let key = KeySource::File(PathBuf::from("/k"));
    let want = EncryptConfig { key, sector: 512 };
    assert_eq!(how("key_file=/k"), Some(want));
    let key = KeySource::Fd(5);
    let want = EncryptConfig { key, sector: 4096 };
    assert_eq!(how("key_fd=5,encrypt_sector=4096"), Some(want));
}

#[test]
fn a_descriptor_holds_the_key_of_one_disk() {
    let disk =
        |name| format!("name={name},socket=/{name},path={FILE},encrypt=aes-256-xts,key_fd=5");
    let given = Given {
        blks: vec![disk("a"), disk("b")],
        ..Given::default()
    };
    assert_eq!(
        load(&given, &machine()).unwrap_err().to_string(),
        "--blk b: key_fd = \"5\": already used by blk a"
    );
}
