//! What the first bytes of a qcow2 image say, looked at before the library does: whether it is one
//! that can be served, and a reason in the operator's words where it isn't.

/// The first four bytes.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the longest part that is looked at.
pub(super) const HEADER_BYTES: usize = 104;

/// As QEMU has them.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const BACKING_NAME_MAX: u32 = 1023;
const CLUSTER_BITS: core::ops::RangeInclusive<u32> = 9..=21;

// Features that a reader must know, by bit.
const FEATURES: [(u64, &str); 5] = [
    (
        1,
        "it was not closed cleanly (qemu-img check -r all repairs it)",
    ),
    (
        2,
        "it is marked as corrupt (qemu-img check -r all may repair it)",
    ),
    (4, "its data are in another file (data_file)"),
    (8, "its clusters are compressed with zstd"),
    (16, "it has extended L2 entries (extended_l2)"),
];

/// An image's own description of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Size of the disk in bytes.
    pub(super) bytes: u64,
    /// Bytes of a cluster, as a power of two.
    pub(super) cluster_bits: u32,
    /// Where its refcount table is, and how long.
    pub(super) refcounts: (u64, u64),
}

/// Whether a file that begins so is a qcow2 image.
pub(super) fn is_qcow2(start: &[u8]) -> bool {
    start.starts_with(&MAGIC)
}

impl Header {
    /// Understands the start of an image in a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// Why it can't be served.
    pub(super) fn parse(start: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<Header, String> {
        let u32_at = |at: usize| {
            start[at..][..4]
                .iter()
                .fold(0, |n, b| n << 8 | u32::from(*b))
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        if !is_qcow2(start) {
            return Err("format = \"qcow2\": it is none".to_owned());
        }
        let version = u32_at(4);
        if !(2..=3).contains(&version) {
            return Err(format!("qcow2 version {version} is not known"));
        }
        let cluster_bits = u32_at(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(format!("clusters of 2^{cluster_bits} bytes"));
        }
        let crypt = u32_at(32);
        if crypt != 0 {
            return Err(format!("it is encrypted (method {crypt}) by qcow2's means"));
        }
        let features = if version >= 3 { u64_at(72) } else { 0 };
        if let Some((_, why)) = FEATURES.iter().find(|(bit, _)| features & bit != 0) {
            return Err((*why).to_owned());
        }
        if features != 0 {
            return Err(format!(
                "it needs features that are not known ({features:#x})"
            ));
        }
        let name = u32_at(16);
        if name > BACKING_NAME_MAX {
            return Err(format!("the name of its backing file has {name} bytes"));
        }
        let cluster = 1u64 << cluster_bits;
        let table = |what: &str, at: u64, bytes: u64, max: u64| {
            let end = at.checked_add(bytes);
            if bytes > max {
                return Err(format!("its {what} has {bytes} bytes, more than {max}"));
            }
            if !at.is_multiple_of(cluster) || end.is_none_or(|end| end > file_bytes) {
                return Err(format!(
                    "its {what} is at {at:#x}, the file has {file_bytes} bytes"
                ));
            }
            Ok(())
        };
        let l1_bytes = u64::from(u32_at(36)) * 8;
        table("L1 table", u64_at(40), l1_bytes, L1_BYTES_MAX)?;
        let refcounts = u64::from(u32_at(56)) << cluster_bits;
        table(
            "refcount table",
            u64_at(48),
            refcounts,
            REFCOUNT_TABLE_BYTES_MAX,
        )?;
        let bytes = u64_at(24);
        // An L2 table is a cluster of entries of eight bytes.
        let reach = (u128::from(l1_bytes) / 8) << (2 * cluster_bits - 3);
        if u128::from(bytes) > reach {
            return Err(format!("its L1 table is too short for {bytes} bytes"));
        }
        Ok(Header {
            bytes,
            cluster_bits,
            refcounts: (u64_at(48), refcounts),
        })
    }

    /// Looks through the refcount table. The library goes through all blocks that it names to find
    /// a free cluster, so a block that is named again and again would keep it busy for days.
    ///
    /// # Errors
    /// Why the image can't be served.
    pub(super) fn check_refcounts(&self, table: &[u8], file_bytes: u64) -> Result<(), String> {
        let entries = table.chunks_exact(8);
        let entry = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b));
        if table.chunks_exact(8).next().map(entry).unwrap_or_default() == 0 {
            return Err("its refcount table does not count the image's own header".to_owned());
        }
        let mut blocks: Vec<u64> = entries.map(entry).filter(|at| *at != 0).collect();
        blocks.sort_unstable();
        let cluster = 1 << self.cluster_bits;
        let astray = |at: &&u64| !at.is_multiple_of(cluster) || **at >= file_bytes;
        if let Some(at) = blocks.iter().find(astray) {
            return Err(format!(
                "its refcount table names a block at {at:#x}, the file has {file_bytes} bytes"
            ));
        }
        match blocks.windows(2).find(|two| two[0] == two[1]) {
            Some(two) => Err(format!(
                "its refcount table names the block at {:#x} twice",
                two[0]
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `qemu-img create -f qcow2 x 1M` writes.
    fn good() -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[23] = 16;
        header[29] = 0x10;
        header[39] = 1;
        header[45] = 3;
        header[53] = 1;
        header[59] = 1;
        header
    }

    const FILE: u64 = 4 << 16;

    #[test]
    fn a_good_header_is_understood() {
        let want = Header {
            bytes: 1 << 20,
            cluster_bits: 16,
            refcounts: (1 << 16, 1 << 16),
        };
        assert_eq!(Header::parse(&good(), FILE), Ok(want));
    }

    #[test]
    fn a_bad_header_is_refused_with_its_reason() {
        let cases: &[(usize, &[u8], &str)] = &[
            (0, b"RAW!", "it is none"),
            (4, &[0, 0, 0, 9], "version 9"),
            (20, &[0, 0, 0, 40], "2^40"),
            (20, &[255, 255, 255, 255], "2^4294967295"),
            (35, &[2], "method 2"),
            (79, &[1], "not closed cleanly"),
            (79, &[2], "corrupt"),
            (79, &[4], "data_file"),
            (79, &[8], "zstd"),
            (79, &[16], "extended_l2"),
            (72, &[1], "0x100000000000000"),
            (16, &[0, 1, 0, 0], "65536 bytes"),
            (36, &[255, 255, 255, 255], "L1 table has 34359738360"),
            (40, &[255; 8], "L1 table is at 0xffffffffffffffff"),
            (47, &[1], "L1 table is at 0x30001"),
            (45, &[4], "the file has 262144 bytes"),
            (48, &[255; 8], "refcount table is at"),
            (56, &[0, 1, 0, 0], "refcount table has 4294967296"),
            (24, &[1], "too short for 72057594038976512 bytes"),
        ];
        for (at, bytes, want) in cases {
            let mut header = good();
            header[*at..*at + bytes.len()].copy_from_slice(bytes);
            let why = Header::parse(&header, FILE).unwrap_err();
            assert!(why.contains(want), "{why:?} is not {want:?}");
        }
    }

    #[test]
    fn a_refcount_table_names_each_block_once() {
        let header = Header::parse(&good(), FILE).unwrap();
        let check = |blocks: &[u64]| {
            let table: Vec<u8> = blocks.iter().flat_map(|at| at.to_be_bytes()).collect();
            header.check_refcounts(&table, FILE)
        };
        assert_eq!(check(&[0x20000, 0, 0x10000, 0]), Ok(()));
        for table in [&[][..], &[0, 0x10000]] {
            let without = check(table).unwrap_err();
            assert!(without.contains("own header"), "{without}");
        }
        let twice = check(&[0x20000, 0, 0x20000]).unwrap_err();
        assert!(twice.contains("the block at 0x20000 twice"), "{twice}");
        for at in [0x20200, 4 << 16, u64::MAX] {
            let astray = check(&[0x20000, at]).unwrap_err();
            assert!(astray.contains("names a block at"), "{astray}");
        }
    }
}
