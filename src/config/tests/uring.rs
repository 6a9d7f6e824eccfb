//! What a disk may ask of io_uring.

use super::*;

/// Some file.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

fn blk(keys: &str) -> Result<IoOptions, String> {
    let list = format!("socket=/b,{keys}");
    let config = load(&flags(&[], &[&list]), &machine());
    config.map(|all| all.blks[0].io).map_err(|e| e.to_string())
}

#[test]
fn a_disk_asks_for_what_it_is_told_to() {
    let io = |keys: &str| blk(&format!("path={FILE}{keys}")).unwrap();
    assert_eq!(io(""), IoOptions::default());
    assert_eq!(io(",iopoll=false,sqpoll=off"), IoOptions::default());
    let both = io(",iopoll=true,sqpoll=on,direct=true");
    assert!(both.iopoll && both.sqpoll && !both.fixed_buffers);
    let both = io(",fixed_buffers=true,sqpoll=true,direct=false");
    assert!(both.fixed_buffers && both.sqpoll && !both.iopoll);
}

#[test]
fn what_excludes_each_other_is_refused() {
    for (keys, message) in [
        (
            "backend=ram:1M,sqpoll=true",
            "sqpoll = \"true\": only has a meaning with path",
        ),
        (
            "backend=null:1M,fixed_buffers=true",
            "fixed_buffers = \"true\": only has a meaning with path",
        ),
        (
            "path=FILE,direct=false,iopoll=true",
            "iopoll = \"true\": only has a meaning with direct I/O",
        ),
        (
            "path=FILE,iopoll=true,fixed_buffers=true",
            "fixed_buffers and iopoll exclude each other",
        ),
        (
            "path=FILE,encrypt=aes-256-xts,key_file=/k,fixed_buffers=true",
            "fixed_buffers and encrypt exclude each other",
        ),
    ] {
        let wanted = format!("--blk disk0: {message}");
        assert_eq!(blk(&keys.replace("FILE", FILE)), Err(wanted), "{keys}");
    }
}
