//! Ending a system call that another thread sleeps in.
//!
//! A signal whose handler does nothing, and after which the kernel does not begin the call anew
//! (no SA_RESTART): the call ends with EINTR. See signal(7), tgkill(2).

use std::io;
use std::sync::Once;

/// The first real-time signal that the C library leaves to us.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A thread of this process that can be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interruptible(libc::pid_t);

impl Interruptible {
    /// The thread that calls this. From now on it lets the signal through.
    ///
    /// # Errors
    /// What sigaction(2) or pthread_sigmask(3) says.
    pub fn this_thread() -> io::Result<Interruptible> {
        static HANDLER: Once = Once::new();
        let mut installed = Ok(());
        HANDLER.call_once(|| installed = install());
        installed?;
        // SAFETY: all-zero bytes are a valid `sigset_t`.
        let mut set: libc::sigset_t = unsafe { core::mem::zeroed() };
        // SAFETY: `set` is ours to be written.
        unsafe { libc::sigemptyset(&raw mut set) };
        // SAFETY: an initialised set and a valid signal number.
        unsafe { libc::sigaddset(&raw mut set, signal()) };
        let old = core::ptr::null_mut();
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, old) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: no pointers.
        Ok(Interruptible(unsafe { libc::gettid() }))
    }

    /// Its number, never 0.
    pub fn id(self) -> i32 {
        self.0
    }

    /// The thread that has had this number.
    pub fn of_id(id: i32) -> Interruptible {
        Interruptible(id)
    }

    /// Ends the system call that it sleeps in. To a thread that sleeps in none, and to one that has
    /// ended, nothing happens.
    pub fn interrupt(self) {
        // SAFETY: no pointers. A number that has gone to another thread of this process by now
        // interrupts that one, which has to bear it as any signal.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal()) };
    }
}

fn install() -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `sigaction`: no flags, and nothing is blocked meanwhile.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    let handler: extern "C" fn(i32) = on_signal;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: the handler does nothing.
    let failed = unsafe { libc::sigaction(signal(), &raw const action, core::ptr::null_mut()) };
    if failed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn on_signal(_: i32) {}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::sys::eventfd::{Told, tell};
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn a_write_that_sleeps_ends_and_a_thread_that_does_not_goes_on() {
        let full = EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        let (send, thread) = mpsc::channel();
        let writer = std::thread::spawn(move || {
            send.send(Interruptible::this_thread().unwrap()).unwrap();
            tell(&full)
        });
        let thread = thread.recv().unwrap();
        assert_eq!(Interruptible::of_id(thread.id()), thread);
        // The first ones may come before it sleeps.
        while !writer.is_finished() {
            thread.interrupt();
            std::thread::park_timeout(Duration::from_millis(1));
        }
        assert_eq!(writer.join().unwrap(), Told::Interrupted);
        thread.interrupt();
    }
}
