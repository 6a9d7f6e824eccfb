//! Memory whose file has become shorter than what was mapped of it.
//!
//! Touching such a page raises SIGBUS, which would end the daemon, and with it every other guest.
//! The handler marks that mapping, puts zero pages in the place of the rest of it, and shuts down
//! the connection of the front-end it came from, so that its session ends; whoever touched it goes
//! on with zeros until then. A disk has no connection: what was moved is done again. The same
//! happens where a hugetlbfs has no page left, and where the host's memory is broken. A SIGBUS
//! anywhere else ends the process as before.
//!
//! A signal handler may take no lock and no memory: it reads a list whose members are never freed.

use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering, fence};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Once, PoisonError};

/// A mapping that the handler knows.
#[derive(Debug)]
pub(super) struct Watched {
    /// Odd while the next three change, and another number afterwards.
    version: AtomicUsize,
    /// Address of its first byte; 0 while nobody uses this place of the list.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of its pages.
    page: AtomicUsize,
    /// The socket to shut down, or -1.
    socket: AtomicI32,
    /// Handlers that may have read `socket`.
    busy: AtomicUsize,
    is_torn: AtomicBool,
    next: AtomicPtr<Watched>,
}

/// The list, and who may change it.
static FIRST: AtomicPtr<Watched> = AtomicPtr::new(core::ptr::null_mut());
#[expect(
    clippy::disallowed_types,
    reason = "when memory is mapped, never while frames move"
)]
static CHANGES: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// All places of the list.
fn places() -> impl Iterator<Item = &'static Watched> {
    let at = |place: &AtomicPtr<Watched>| {
        // SAFETY: null, or leaked by `watch`, so that it lives for ever; only atomics change.
        unsafe { place.load(Ordering::Acquire).as_ref() }
    };
    core::iter::successors(at(&FIRST), move |place| at(&place.next))
}

/// Has the handler look after `bytes` bytes at `start`, in pages of `page` bytes, until
/// [`Watched::forget`].
pub(super) fn watch(start: *mut u8, bytes: usize, page: usize) -> &'static Watched {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(install);
    let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    let free = places().find(|place| place.start.load(Ordering::Relaxed) == 0);
    let place = free.unwrap_or_else(|| {
        let place: &'static Watched = Box::leak(Box::new(Watched {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            socket: AtomicI32::new(-1),
            busy: AtomicUsize::new(0),
            is_torn: AtomicBool::new(false),
            next: AtomicPtr::new(FIRST.load(Ordering::Relaxed)),
        }));
        FIRST.store(core::ptr::from_ref(place).cast_mut(), Ordering::Release);
        place
    });
    place.socket.store(-1, Ordering::Relaxed);
    place.is_torn.store(false, Ordering::Relaxed);
    place.change(start.addr(), start.addr() + bytes, page);
    place
}

impl Watched {
    /// The mapping is about to go: nobody touches it any more.
    pub(super) fn forget(&self) {
        let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        self.change(0, 0, 1);
    }

    /// One at a time.
    fn change(&self, start: usize, end: usize, page: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Release: who sees one of these sees that the version is odd, or a later one. Pairs with
        // the fence in `holds`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.version.store(version + 2, Ordering::Release);
    }

    /// The pages from that of `address` to the end, if it is in this mapping.
    fn holds(&self, address: usize) -> Option<Range<usize>> {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let start = self.start.load(Ordering::Relaxed);
            let end = self.end.load(Ordering::Relaxed);
            let page = self.page.load(Ordering::Relaxed);
            // Acquire: as in `change`. Without it the three could be of two mappings, and a third
            // one between them be taken for a part of this.
            fence(Ordering::Acquire);
            if version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version {
                let is_inside = start != 0 && (start..end).contains(&address);
                return is_inside.then_some((address & !(page - 1))..end);
            }
        }
    }

    /// Whether some of its pages are not those of the file.
    pub(super) fn is_torn(&self) -> bool {
        self.is_torn.load(Ordering::Acquire)
    }

    /// A socket is to be shut down when a page is missing, which may have been before; it stays
    /// open until this is called again, with none.
    pub(super) fn ends(&self, socket: Option<BorrowedFd<'_>>) {
        let fd = socket.map_or(-1, |socket| socket.as_raw_fd());
        // SeqCst, here and in the handler: one of both sees what the other has stored.
        self.socket.store(fd, Ordering::SeqCst);
        if self.is_torn.load(Ordering::SeqCst) {
            shut_down(fd);
        }
        // From now on the number may be that of another file.
        while fd < 0 && self.busy.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    /// Puts zero pages in the place of these; whether that could be done.
    fn mend(&self, pages: &Range<usize>) -> bool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let at = core::ptr::without_provenance_mut(pages.start);
        self.busy.fetch_add(1, Ordering::SeqCst);
        // First: who finds nothing here after an access has had a page of the file.
        self.is_torn.store(true, Ordering::SeqCst);
        // SAFETY: the range is the rest of a mapping, of guest memory or of a disk, for which
        // `forget` is called before it is unmapped. All access to it tolerates that its bytes
        // change.
        let made = unsafe { libc::mmap(at, pages.len(), protection, flags, -1, 0) };
        shut_down(self.socket.load(Ordering::SeqCst));
        self.busy.fetch_sub(1, Ordering::SeqCst);
        made != libc::MAP_FAILED
    }
}

fn shut_down(fd: i32) {
    if fd >= 0 {
        // SAFETY: no memory is passed. The descriptor is a socket that its owner keeps open.
        unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
    }
}

fn install() {
    // SAFETY: all-zero bytes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler only does what a signal handler may: atomics, mmap, shutdown, signal.
    let failed = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, core::ptr::null_mut()) };
    debug_assert_eq!(failed, 0, "SIGBUS can be handled");
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    // SAFETY: the kernel passes a valid `siginfo_t`, and for SIGBUS there is an address in it.
    let address = unsafe { (*info).si_addr() }.addr();
    let found = places().find_map(|place| Some((place, place.holds(address)?)));
    if !found.is_some_and(|(place, pages)| place.mend(&pages)) {
        // The instruction is tried again, and ends the process.
        // SAFETY: no memory is passed.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use crate::memory::{GuestRam, RegionSpec, copy, memfd};

    const BYTES: u64 = 1 << 20;

    fn ram() -> GuestRam {
        let spec = RegionSpec {
            gpa: 0,
            size: BYTES,
            uva: 1 << 40,
            mmap_offset: 0,
            file: Arc::new(memfd(BYTES).unwrap()),
        };
        GuestRam::map(vec![spec], None).unwrap()
    }

    fn get(ram: &GuestRam, at: usize) -> [u8; 5] {
        let mut bytes = [1; 5];
        copy::read(&ram.memory(), at, &mut bytes);
        bytes
    }

    #[test]
    fn a_file_that_becomes_shorter_ends_its_connection_and_harms_no_other() {
        let (sick, well) = (ram(), ram());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        sick.ends(Some(ours.as_fd()));
        for ram in [&sick, &well] {
            copy::write(&ram.memory(), 0, b"first");
            copy::write(&ram.memory(), 65536, b"later");
        }
        sick.specs()[0].file.set_len(65536).unwrap();
        assert_eq!(sick.torn(), None);
        assert_eq!((get(&sick, 65536), get(&sick, 0)), ([0; 5], *b"first"));
        assert_eq!(sick.torn().map(|region| region.size), Some(BYTES));
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "shut down");
        // What is written there is nobody's.
        copy::write(&sick.memory(), 65536, b"after");
        assert_eq!((get(&well, 65536), get(&well, 0)), (*b"later", *b"first"));
        assert_eq!(well.torn(), None);
    }

    #[test]
    fn a_file_that_has_grown_again_is_mapped_anew() {
        let old = ram();
        copy::write(&old.memory(), 0, b"first");
        old.specs()[0].file.set_len(4096).unwrap();
        assert_eq!(get(&old, 8192), [0; 5]);
        old.specs()[0].file.set_len(BYTES).unwrap();
        let new = GuestRam::map(old.specs(), Some(&old)).unwrap();
        assert_eq!((new.torn(), get(&new, 0)), (None, *b"first"));
        // Whoever asks late is told at once.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        old.ends(Some(ours.as_fd()));
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "shut down");
        old.ends(None);
    }
}
