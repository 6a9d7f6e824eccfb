//! Keys of encrypted disks: where they come from, and that nothing of them stays behind.
//!
//! A key is read straight into the place where it stays, which is wiped when the key goes. It has
//! no copy, and neither `Debug` nor an error shows a byte of it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::socket;

/// Bytes of a key for AES-256-XTS: one for the data and one for the tweaks.
pub const KEY_BYTES: usize = 64;
/// How far a source that is too long is read, to say how long it is.
const COUNTED_BYTES: usize = 1 << 20;
/// Permission of everybody to read.
const OTHERS_READ: u32 = 0o004;

/// Where the key of a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// In a file.
    File(PathBuf),
    /// Behind a descriptor that the daemon was started with.
    Fd(RawFd),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeySource::File(path) => write!(f, "key_file = {path:?}"),
            KeySource::Fd(fd) => write!(f, "key_fd = {fd}"),
        }
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[error("{source_named}: {reason}")]
pub struct KeyError {
    /// Where it should have been.
    pub source_named: KeySource,
    /// What is wrong.
    pub reason: KeyReason,
}

/// What is wrong with the source of a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyReason {
    /// It can't be opened.
    #[error("open: {0}")]
    Open(io::Error),
    /// It can't be read.
    #[error("read: {0}")]
    Read(io::Error),
    /// The descriptor is not open.
    #[error("the file descriptor is not open")]
    NotOpen,
    /// The descriptor is this process's own, or has been taken over already.
    #[error("the file descriptor was not passed to this process, or is in use already")]
    NotPassed,
    /// It holds fewer or more bytes than a key has.
    #[error("{0} bytes, a key for aes-256-xts has exactly {KEY_BYTES}")]
    Size(usize),
    /// It holds so much that nobody counts.
    #[error("more than {COUNTED_BYTES} bytes, a key for aes-256-xts has exactly {KEY_BYTES}")]
    Endless,
    /// XTS is not secure with two equal keys, and the standard forbids them.
    #[error("the two halves of the key are equal")]
    EqualHalves,
}

/// The key of a disk.
pub struct DiskKey {
    /// Not inline: what is moved leaves a copy behind.
    bytes: Box<[u8; KEY_BYTES]>,
}

impl Drop for DiskKey {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl ZeroizeOnDrop for DiskKey {}

impl fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiskKey(..)")
    }
}

impl DiskKey {
    /// Reads the key from `source`.
    ///
    /// # Errors
    /// [`KeyError`] names the source and the reason.
    pub fn load(source: &KeySource) -> Result<DiskKey, KeyError> {
        let named = |reason| KeyError {
            source_named: source.clone(),
            reason,
        };
        let mut file = open(source).map_err(named)?;
        if let Ok(metadata) = file.metadata() {
            let mode = metadata.mode() & 0o7777;
            if metadata.is_file() && mode & OTHERS_READ != 0 {
                tracing::warn!("{source}: everybody can read this key (mode {mode:04o})");
            }
        }
        DiskKey::read(&mut file).map_err(named)
    }

    fn read(from: &mut impl Read) -> Result<DiskKey, KeyReason> {
        let mut key = DiskKey {
            bytes: Box::new([0; KEY_BYTES]),
        };
        let mut size = fill(from, &mut key.bytes[..]).map_err(KeyReason::Read)?;
        // A key that is too long may be a key all the same: what is counted is wiped too.
        let mut more = Zeroizing::new([0; 512]);
        loop {
            match fill(from, &mut more[..]).map_err(KeyReason::Read)? {
                0 => break,
                bytes => size += bytes,
            }
            if size > COUNTED_BYTES {
                return Err(KeyReason::Endless);
            }
        }
        if size != KEY_BYTES {
            return Err(KeyReason::Size(size));
        }
        let (data, tweak) = key.bytes.split_at(KEY_BYTES / 2);
        if data == tweak {
            return Err(KeyReason::EqualHalves);
        }
        Ok(key)
    }

    /// The key; for the cipher alone.
    pub(super) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.bytes
    }

    /// A key for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_test(bytes: &[u8; KEY_BYTES]) -> DiskKey {
        DiskKey {
            bytes: Box::new(*bytes),
        }
    }
}

fn open(source: &KeySource) -> Result<File, KeyReason> {
    match source {
        KeySource::File(path) => File::open(path).map_err(KeyReason::Open),
        &KeySource::Fd(fd) => {
            match socket::is_inherited(fd) {
                Ok(true) => {}
                Ok(false) => return Err(KeyReason::NotPassed),
                Err(_) => return Err(KeyReason::NotOpen),
            }
            let copy = socket::duplicate(fd).map_err(KeyReason::Open)?;
            socket::close_on_exec(fd).map_err(KeyReason::Open)?;
            Ok(File::from(copy))
        }
    }
}

/// Reads until `to` is full or there is no more; returns the bytes read.
fn fill(from: &mut impl Read, to: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < to.len() {
        match from.read(&mut to[done..]) {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                to.zeroize();
                return Err(error);
            }
        }
    }
    Ok(done)
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use super::*;
    use std::io::Write as _;
    use vmm_sys_util::tempfile::TempFile;

    const GOOD: [u8; KEY_BYTES] = {
        let mut bytes = [0; KEY_BYTES];
        let mut at = 0;
        while at < KEY_BYTES {
            bytes[at] = b'A' + (at % 57) as u8;
            at += 1;
        }
        bytes
    };

    /// One byte at a time, as a pipe may give them.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let count = to.len().min(1);
            self.0.read(&mut to[..count])
        }
    }

    fn file(bytes: &[u8]) -> (TempFile, KeySource) {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        let source = KeySource::File(file.as_path().to_owned());
        (file, source)
    }

    #[test]
    fn exactly_64_bytes_are_a_key() {
        let (_file, source) = file(&GOOD);
        assert_eq!(DiskKey::load(&source).unwrap().bytes(), &GOOD);
        assert_eq!(DiskKey::read(&mut Slow(&GOOD)).unwrap().bytes(), &GOOD);
    }

    #[test]
    fn any_other_size_is_refused_by_name_and_size() {
        for size in [0, 1, 32, 63, 65, 128, 577, 5000] {
            let bytes: Vec<u8> = GOOD.iter().copied().cycle().take(size).collect();
            let (file, source) = file(&bytes);
            let error = DiskKey::load(&source).unwrap_err().to_string();
            let path = file.as_path().display();
            let want = format!(
                "key_file = \"{path}\": {size} bytes, a key for aes-256-xts has exactly 64"
            );
            assert_eq!(error, want);
            let slow = DiskKey::read(&mut Slow(&bytes)).unwrap_err();
            assert!(matches!(slow, KeyReason::Size(found) if found == size));
        }
        let endless = DiskKey::load(&KeySource::File("/dev/zero".into())).unwrap_err();
        assert!(matches!(endless.reason, KeyReason::Endless), "{endless}");
    }

    #[test]
    fn a_weak_or_absent_key_is_refused() {
        let (_file, source) = file(&[7; KEY_BYTES]);
        let error = DiskKey::load(&source).unwrap_err().to_string();
        assert!(
            error.ends_with("the two halves of the key are equal"),
            "{error}"
        );
        let missing = DiskKey::load(&KeySource::File("/no/such/key".into())).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "key_file = \"/no/such/key\": open: No such file or directory (os error 2)"
        );
        let directory = DiskKey::load(&KeySource::File("/".into())).unwrap_err();
        assert!(
            matches!(directory.reason, KeyReason::Read(_)),
            "{directory}"
        );
        let closed = DiskKey::load(&KeySource::Fd(-1)).unwrap_err();
        assert!(matches!(closed.reason, KeyReason::NotOpen), "{closed}");
    }

    #[test]
    fn a_descriptor_must_be_passed_and_is_taken_once() {
        use std::os::fd::AsRawFd as _;
        let (file, _) = file(&GOOD);
        let file = File::open(file.as_path()).unwrap();
        let source = KeySource::Fd(file.as_raw_fd());
        let ours = DiskKey::load(&source).unwrap_err();
        assert!(matches!(ours.reason, KeyReason::NotPassed), "{ours}");
        socket::pass_on(&file).unwrap();
        assert_eq!(DiskKey::load(&source).unwrap().bytes(), &GOOD);
        let again = DiskKey::load(&source).unwrap_err();
        assert!(matches!(again.reason, KeyReason::NotPassed), "{again}");
    }

    #[test]
    fn debug_shows_nothing_and_drop_wipes() {
        fn wipes<T: ZeroizeOnDrop>(_: &T) {}
        let mut key = DiskKey::for_test(&GOOD);
        assert_eq!(format!("{key:?}"), "DiskKey(..)");
        wipes(&key);
        key.bytes.zeroize();
        assert_eq!(key.bytes(), &[0; KEY_BYTES]);
    }
}
