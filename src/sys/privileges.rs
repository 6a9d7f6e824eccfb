//! What a process may do: as many files and as much memory as its limits allow, and giving up the
//! rest before it becomes another program. getrlimit(2), capabilities(7).

use std::io;

use super::ifreq::check;
use super::users::User;

/// Of `struct __user_cap_header_struct`, with two of `__user_cap_data_struct`.
const VERSION_3: u32 = 0x2008_0522;

/// Lets this process have as many files open as it can be allowed by itself (RLIMIT_NOFILE). The
/// usual limit is that of programs which use select(2).
///
/// # Errors
/// What the system says.
pub fn raise_open_files() -> io::Result<()> {
    let mut limit = limit_of(libc::RLIMIT_NOFILE)?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is initialised.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })
}

/// Bytes that this process may lock (RLIMIT_MEMLOCK); the greatest number where there is no limit.
///
/// # Errors
/// What getrlimit(2) says.
pub fn lock_limit() -> io::Result<u64> {
    limit_of(libc::RLIMIT_MEMLOCK).map(|limit| limit.rlim_cur)
}

fn limit_of(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is writable.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    Ok(limit)
}

/// Lets this process, and what it becomes, lock `bytes` bytes of memory; on top of what it may lock
/// now if that is possible, since others of the same user count, too. Else as much as it can.
///
/// # Errors
/// The limit is less than `bytes`, and raising it takes CAP_SYS_RESOURCE.
pub fn lock_memory(bytes: u64) -> io::Result<()> {
    let limit = limit_of(libc::RLIMIT_MEMLOCK)?;
    // RLIM_INFINITY is the greatest number, and stays that.
    let wanted = limit.rlim_cur.saturating_add(bytes);
    let most = limit.rlim_max;
    let set = |wanted| {
        let limit = libc::rlimit {
            rlim_cur: wanted,
            rlim_max: most.max(wanted),
        };
        // SAFETY: `limit` is initialised.
        check(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) })
    };
    set(wanted).or_else(|error| {
        set(most)?;
        if most < bytes { Err(error) } else { Ok(()) }
    })
}

/// Whether no limit of locked memory applies to the calling thread (CAP_IPC_LOCK).
pub fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let mut header = [VERSION_3, 0];
    let mut data = [0u32; 6];
    // SAFETY: header and data are as long as version 3 of the call has them.
    let answer = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) };
    let [effective, ..] = data;
    answer == 0 && effective >> CAP_IPC_LOCK & 1 == 1
}

/// Becomes `user`, in the user's groups, if one is given; and in any case gives up all
/// capabilities, for good: no program that this process becomes has any, even as root.
///
/// # Errors
/// Becoming another takes CAP_SETUID and CAP_SETGID.
pub fn give_up(user: Option<&User>) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    if let Some(user) = user {
        // SAFETY: a string that ends with NUL.
        check(unsafe { libc::initgroups(user.name.as_ptr(), user.group) })?;
        // SAFETY: no pointers.
        check(unsafe { libc::setresgid(user.group, user.group, user.group) })?;
        // SAFETY: no pointers.
        check(unsafe { libc::setresuid(user.id, user.id, user.id) })?;
    }
    drop_capabilities()
}

/// Takes all capabilities from the calling thread. Ambient ones go with the permitted.
pub(super) fn drop_capabilities() -> io::Result<()> {
    let header = [VERSION_3, 0];
    let data = [0u32; 6];
    // SAFETY: header and data are as long as version 3 of the call has them.
    let answer = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    check(libc::c_int::try_from(answer).unwrap_or(-1))
}
