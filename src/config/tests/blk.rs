//! What is refused about disks.

use super::*;

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
            "socket=/b,backend=rma:1G",
            "--blk disk0: backend = \"rma:1G\": unknown backend \"rma\" (known: ram, null)",
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
        (
            "socket=/b,backend=ram:1M,link=echo",
            "--blk disk0: link = \"echo\": unknown key (known: name, socket, mode, path, backend, \
             queues, read_only, direct, cache, lock, fault, discard, serial, block_size, cores, \
             ring_reset, call_max_used, call_max_us, \
             socket_owner, socket_group, socket_mode)",
        ),
    ] {
        assert_eq!(blk_flags(list).unwrap_err().to_string(), message, "{list}");
    }
}
