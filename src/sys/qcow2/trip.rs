//! A panic on demand, out of the middle of the library, for tests of what a panic there costs.
//! Without the feature `testing` there is nothing of it.

use std::fs::File;

/// Where a file's next access panics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trip {
    #[cfg(feature = "testing")]
    at: Option<u64>,
}

#[cfg(not(feature = "testing"))]
impl Trip {
    pub(super) fn of(_file: &File) -> Trip {
        Trip {}
    }

    #[inline]
    pub(super) fn touch(self, _offset: u64, _bytes: u64) {}
}

#[cfg(feature = "testing")]
impl Trip {
    /// What `VRINGD_QCOW2_PANIC=INODE:OFFSET` says of the file.
    pub(super) fn of(file: &File) -> Trip {
        use std::os::unix::fs::MetadataExt;
        let at = || {
            let said = std::env::var("VRINGD_QCOW2_PANIC").ok()?;
            let (inode, offset) = said.split_once(':')?;
            let own = file.metadata().ok()?.ino().to_string() == inode;
            own.then(|| offset.parse().ok())?
        };
        Trip { at: at() }
    }

    pub(super) fn touch(self, offset: u64, bytes: u64) {
        if let Some(at) = self.at {
            let there = (offset..offset.saturating_add(bytes)).contains(&at);
            assert!(!there, "a panic at {at:#x}, as a test wants it");
        }
    }
}
