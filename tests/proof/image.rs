//! A qcow2 image on the logged disk: how it is at first, and what is in it after a power cut. Also
//! what is in a file of an ext4 there.

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
    let (image, raw) = (dir.join("image"), dir.join("raw"));
    fs::write(&image, bytes(disk)).expect("room for the image");
    let run =
        |arguments: &[&str], files: &[&Path], fine: &[i32]| run("qemu-img", arguments, files, fine);
    // 3: leaked clusters.
    run(&["check", "-f", "qcow2"], &[&image], &[0, 3])?;
    run(
        &["convert", "-f", "qcow2", "-O", "raw"],
        &[&image, &raw],
        &[0],
    )?;
    Ok(sectors(&fs::read(&raw).expect("what it has written")))
}

/// What the file `name` has in the ext4 that `disk` has, once its journal was replayed.
///
/// # Errors
/// What e2fsck finds wrong with it.
pub fn file(disk: &[Found], name: &str, dir: &Path) -> Result<Vec<Found>, String> {
    let (image, raw) = (dir.join("image"), dir.join("raw"));
    fs::write(&image, bytes(disk)).expect("room for the image");
    // 0 and 1: fine, and the journal was replayed.
    run("e2fsck", &["-p", "-E", "journal_only"], &[&image], &[0, 1])?;
    run("e2fsck", &["-f", "-n"], &[&image], &[0])?;
    let dump = format!("dump /{name} {}", raw.display());
    run("debugfs", &["-R", &dump], &[&image], &[0])?;
    Ok(sectors(&fs::read(&raw).expect("what it has written")))
}

fn bytes(disk: &[Found]) -> Vec<u8> {
    let sector = |found: &Found| match found {
        Found::Data(data) => data.clone(),
        Found::Untouched | Found::Discarded => vec![0; SECTOR],
    };
    disk.iter().flat_map(sector).collect()
}

fn sectors(bytes: &[u8]) -> Vec<Found> {
    let sectors = bytes.chunks_exact(SECTOR);
    sectors.map(|data| Found::Data(data.to_vec())).collect()
}

/// A program of the package qemu-utils or e2fsprogs, which must end with one of these statuses.
fn run(program: &str, arguments: &[&str], files: &[&Path], fine: &[i32]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).args(files).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let code = output.status.code();
    let is_fine = code.is_some_and(|code| fine.contains(&code));
    is_fine
        .then_some(())
        .ok_or_else(|| format!("{program} {arguments:?}: {output:?}"))
}
