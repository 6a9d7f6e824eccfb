//! A qcow2 image on the logged disk: how it is at first, and what is in it after a power cut.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::journal::{Found, SECTOR};

const CLUSTER: usize = 4096;

/// An empty image of a disk of `sectors` sectors: header, refcount table with one block, L1 table,
/// a cluster each.
pub fn empty(sectors: usize) -> Vec<u8> {
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let bytes = (sectors * SECTOR) as u64;
    // One L2 table has 512 entries.
    let tables = u32::try_from(bytes.div_ceil(512 * CLUSTER as u64)).expect("a small disk");
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12u32.to_be_bytes());
    put(24, &bytes.to_be_bytes());
    put(36, &tables.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    // Counts of 16 bits; bytes of the header.
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

/// What QEMU finds in the image that `disk` has.
///
/// # Errors
/// What QEMU finds wrong with it, but for clusters that nothing points to.
pub fn content(disk: &[Found], dir: &Path) -> Result<Vec<Found>, String> {
    let sector = |found: &Found| match found {
        Found::Data(data) => data.clone(),
        Found::Untouched | Found::Discarded => vec![0; SECTOR],
    };
    let (image, raw) = (dir.join("image"), dir.join("raw"));
    let bytes: Vec<u8> = disk.iter().flat_map(sector).collect();
    fs::write(&image, bytes).expect("room for the image");
    let run = |arguments: &[&str], files: &[&Path], fine: &[i32]| {
        let output = Command::new("qemu-img")
            .args(arguments)
            .args(files)
            .output();
        let output = output.expect("qemu-img (package qemu-utils) starts");
        let code = output.status.code();
        let is_fine = code.is_some_and(|code| fine.contains(&code));
        is_fine
            .then_some(())
            .ok_or(format!("qemu-img {arguments:?}: {output:?}"))
    };
    // 3: leaked clusters.
    run(&["check", "-f", "qcow2"], &[&image], &[0, 3])?;
    run(
        &["convert", "-f", "qcow2", "-O", "raw"],
        &[&image, &raw],
        &[0],
    )?;
    let bytes = fs::read(&raw).expect("what it has written");
    let sectors = bytes.chunks_exact(SECTOR);
    Ok(sectors.map(|data| Found::Data(data.to_vec())).collect())
}
