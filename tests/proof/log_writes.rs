//! The log of dm-log-writes (Linux, Documentation/admin-guide/device-mapper/log-writes.rst).
//!
//! The target logs what a disk has for certain: a write once a flush after it has completed, or at
//! once if it was FUA. Whatever is not in the log before a mark, a power cut at that mark may take.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

/// An entry of the log, in bytes of the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// This data is at this offset; a flush alone has none.
    Write { offset: u64, data: Vec<u8> },
    /// The range was given back.
    Discard { offset: u64, bytes: u64 },
    /// A mark with its text.
    Mark(String),
}

/// A log, read from its beginning.
pub struct Log {
    file: File,
    /// Bytes of a sector of the log, which offsets and lengths are counted in.
    sector: u64,
    next: u64,
    left: u64,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Log {
    /// Reads the superblock: magic, version, number of entries, bytes of a sector.
    pub fn open(path: &Path) -> Log {
        let file = File::open(path).expect("the log's device");
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0).expect("a superblock");
        assert_eq!(word(&head, 0), MAGIC, "no log of dm-log-writes");
        assert_eq!(word(&head, 8), 1, "version");
        let sector = u32::from_le_bytes(head[24..].try_into().expect("four bytes"));
        Log {
            file,
            sector: sector.into(),
            next: sector.into(),
            left: word(&head, 16),
        }
    }

    fn read(&mut self, bytes: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(bytes).expect("a short entry")];
        let read = self.file.read_exact_at(&mut data, self.next);
        read.unwrap_or_else(|error| panic!("log at {}: {error}", self.next));
        self.next += bytes;
        data
    }
}

impl Iterator for Log {
    type Item = Entry;

    /// An entry is a sector with where, how long, flags and length of the mark, which follows
    /// there; the data is in the sectors behind it, but for discards.
    fn next(&mut self) -> Option<Entry> {
        self.left = self.left.checked_sub(1)?;
        let head = self.read(self.sector);
        let [offset, bytes] = [0, 8].map(|at| word(&head, at) * self.sector);
        let flags = word(&head, 16);
        if flags & MARK != 0 {
            let length = usize::try_from(word(&head, 24)).expect("a short mark");
            let text = &head[32..32 + length];
            // The kernel may count a closing zero.
            let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
            return Some(Entry::Mark(String::from_utf8_lossy(text).into_owned()));
        }
        Some(if flags & DISCARD != 0 {
            Entry::Discard { offset, bytes }
        } else {
            let data = self.read(bytes);
            Entry::Write { offset, data }
        })
    }
}
