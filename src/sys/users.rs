//! Numbers of users and groups by name, through the C library (so that every source that the
//! host's nsswitch.conf names is asked). Used once at start-up, for the owners of socket files.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;

/// Buffers grow up to here before a lookup is given up: groups with very many members.
const BUFFER_MAX: usize = 1 << 20;

/// A user of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The name.
    pub name: CString,
    /// The user's number.
    pub id: u32,
    /// That of the primary group.
    pub group: u32,
}

/// The number of the user of this name.
///
/// # Errors
/// When the lookup itself fails; an unknown name is `None`.
pub fn user_id(name: &str) -> io::Result<Option<u32>> {
    Ok(user(name)?.map(|user| user.id))
}

/// The user of this name.
///
/// # Errors
/// As for [`user_id`].
pub fn user(name: &str) -> io::Result<Option<User>> {
    look_up(name, |name, buffer| {
        let mut record = MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: `name` is NUL-terminated; record, buffer (with its length) and result are
        // writable and live through the call.
        let error = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                record.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        if found.is_null() {
            return (error, None);
        }
        // SAFETY: a non-null result means that the record has been filled.
        let record = unsafe { record.assume_init() };
        let user = User {
            name: name.to_owned(),
            id: record.pw_uid,
            group: record.pw_gid,
        };
        (error, Some(user))
    })
}

/// The number of the group of this name.
///
/// # Errors
/// As for [`user_id`].
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    look_up(name, |name, buffer| {
        let mut record = MaybeUninit::<libc::group>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: as in `user_id`.
        let error = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                record.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        if found.is_null() {
            return (error, None);
        }
        // SAFETY: as in `user_id`.
        (error, Some(unsafe { record.assume_init() }.gr_gid))
    })
}

fn look_up<T>(
    name: &str,
    call: impl Fn(&CStr, &mut [libc::c_char]) -> (libc::c_int, Option<T>),
) -> io::Result<Option<T>> {
    let Ok(name) = CString::new(name) else {
        return Ok(None);
    };
    let mut buffer = vec![0; 1024];
    loop {
        match call(&name, &mut buffer) {
            (0, found) => return Ok(found),
            (libc::ERANGE, _) if buffer.len() < BUFFER_MAX => buffer.resize(buffer.len() * 4, 0),
            (libc::EINTR, _) => {}
            // getpwnam(3): some systems say "not found" in these words.
            (libc::ENOENT | libc::ESRCH, _) => return Ok(None),
            (error, _) => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_zero_and_nobody_else_is() {
        assert_eq!(user_id("root").unwrap(), Some(0));
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_ne!(user_id("nobody").unwrap(), Some(0));
    }

    #[test]
    fn unknown_and_impossible_names_are_none() {
        for name in ["", "no-such-account-here", "ro\0ot"] {
            assert_eq!(user_id(name).unwrap(), None, "{name:?}");
            assert_eq!(group_id(name).unwrap(), None, "{name:?}");
        }
    }
}
