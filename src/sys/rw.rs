//! Reads and writes of a file that the calling thread does itself.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::memory::Segment;

/// Segments that one call takes (IOV_MAX). With more, it does only the first.
const SEGMENTS_PER_CALL: usize = 1024;

/// preadv(2) into guest memory: the bytes read, or the error number.
///
/// # Errors
/// What the system says.
#[inline]
pub fn read(file: &File, offset: u64, segments: &[Segment]) -> Result<u32, i32> {
    let (list, count, offset) = call(offset, segments)?;
    if let &[one] = segments {
        // SAFETY: the segment is mapped as long as it is valid; see below.
        return moved(unsafe {
            libc::pread(file.as_raw_fd(), one.base().cast(), one.len(), offset)
        });
    }
    // SAFETY: a segment is laid out as an iovec, and `count` of them are there; the memory is
    // mapped as long as the caller's segments are, and what the kernel can't write to is EFAULT.
    let read = unsafe { libc::preadv(file.as_raw_fd(), list, count, offset) };
    moved(read)
}

/// pwritev(2) from guest memory: the bytes written, or the error number.
///
/// # Errors
/// What the system says.
#[inline]
pub fn write(file: &File, offset: u64, segments: &[Segment]) -> Result<u32, i32> {
    let (list, count, offset) = call(offset, segments)?;
    if let &[one] = segments {
        // SAFETY: as in `read`; the memory is only read.
        return moved(unsafe {
            libc::pwrite(file.as_raw_fd(), one.base().cast(), one.len(), offset)
        });
    }
    // SAFETY: as in `read`; the memory is only read.
    let written = unsafe { libc::pwritev(file.as_raw_fd(), list, count, offset) };
    moved(written)
}

/// The arguments as the system takes them.
#[inline]
fn call(
    offset: u64,
    segments: &[Segment],
) -> Result<(*const libc::iovec, libc::c_int, libc::off_t), i32> {
    let count = segments.len().min(SEGMENTS_PER_CALL);
    let count = libc::c_int::try_from(count).map_err(|_| libc::EINVAL)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| libc::EINVAL)?;
    Ok((segments.as_ptr().cast(), count, offset))
}

#[inline]
fn moved(result: isize) -> Result<u32, i32> {
    // One call moves less than 2 GiB.
    u32::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error();
        error.raw_os_error().unwrap_or(libc::EIO)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, GuestRam, Segments, copy};
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn a_list_that_is_too_long_is_done_in_part() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let mut list = Segments::with_capacity(1500);
        for at in 0..1500 {
            ram.translate(at * 8, 8, Access::Write, &mut list).unwrap();
        }
        let bytes: Vec<u8> = (0..12000).map(|i| u8::try_from(i % 251).unwrap()).collect();
        copy::write(list.as_slice(), 0, &bytes);
        let file = TempFile::new().unwrap();
        let done = write(file.as_file(), 100, list.as_slice());
        assert_eq!(done, Ok(8192));
        assert_eq!(std::fs::read(file.as_path()).unwrap()[100..], bytes[..8192]);
        copy::zero(list.as_slice(), 0, 12000);
        let done = read(file.as_file(), 4196, list.as_slice());
        assert_eq!(done, Ok(4096));
        let mut back = vec![0; 4096];
        copy::read(list.as_slice(), 0, &mut back);
        assert!(back == bytes[4096..8192], "other bytes");
    }

    #[test]
    fn what_the_system_says_is_told() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let no_file = File::from(std::os::fd::OwnedFd::from(ours));
        let nothing = read(&no_file, 0, &[]);
        assert_eq!(nothing, Err(libc::ESPIPE));
        let file = TempFile::new().unwrap();
        let far = write(file.as_file(), u64::MAX, &[]);
        assert_eq!(far, Err(libc::EINVAL), "no offset");
    }
}
