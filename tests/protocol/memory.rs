//! Memory tables: what is checked before it is mapped, and vrings that go over to a new one.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;

use vringd::device::RingOptions;

use super::fake::Event;
use super::front_end::{RAM, Session, TIMEOUT, file};
use super::message::{self as m, Message, Region};
use crate::support::deadline::wait_until;
use crate::support::tmp::unique;

const PAGE: u64 = 4096;

fn region(file: &File, gpa: u64, size: u64, offset: u64) -> Region<'_> {
    Region {
        gpa,
        size,
        offset,
        file,
    }
}

#[test]
fn impossible_regions_are_refused_and_the_table_stays() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    let peer = &session.peer;
    let page = file(PAGE);
    let far = 1 << 30;
    for (why, bad) in [
        ("beyond its file", region(&page, far, 2 * PAGE, 0)),
        ("beyond its file", region(&page, far, PAGE, PAGE)),
        ("impossible size", region(&page, far, 0, 0)),
        ("impossible size", region(&page, u64::MAX - 1, PAGE, 0)),
        ("impossible size", region(&page, far, PAGE, u64::MAX - 1)),
        ("overlap", region(&page, RAM - PAGE, PAGE, 0)),
    ] {
        peer.refused(&bad.add());
        session.logged(why);
    }
    let beyond = region(&page, far, 2 * PAGE, 0);
    peer.refused(&m::mem_table(&[session.region(), beyond]));
    peer.refused(&beyond.remove());
    session.quiet();
    let good = region(&page, far, PAGE, 0);
    peer.ok(&good.add());
    assert_eq!(session.next(), Event::Swap(0, 2));
    session.leave();
}

/// A file on the file system that this is built on, and whether that is on a disk.
fn file_on_disk(bytes: u64) -> (File, bool) {
    let dir = env!("CARGO_TARGET_TMPDIR");
    let path = format!("{dir}/memory-{}", unique());
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    let file = options.open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(bytes).unwrap();
    let stat = Command::new("stat").args(["-f", "-c", "%T", dir]).output();
    (file, stat.unwrap().stdout != b"tmpfs\n")
}

#[test]
fn memory_in_a_file_on_disk_is_refused_unless_the_operator_wants_it() {
    let (on_disk, is_on_disk) = file_on_disk(PAGE);
    let on_disk = region(&on_disk, 1 << 30, PAGE, 0);
    let session = Session::ready(false);
    session.run_vring(0, 0);
    // Files there are regular, wherever this is built.
    let proc = File::open("/proc/version").unwrap();
    let of_proc = region(&proc, 1 << 31, PAGE, 0);
    session.peer.refused(&of_proc.add());
    session.logged("is a file on a file system of type 0x9fa0");
    if is_on_disk {
        session.peer.refused(&on_disk.add());
        session.logged("ADD_MEM_REG: memory region at gpa 0x40000000 is a file on ");
        let both = m::mem_table(&[session.region(), on_disk]);
        session.peer.refused(&both);
        session.logged("SET_MEM_TABLE: memory region at gpa 0x40000000 is a file on ");
    }
    // What has no pages that could be written out.
    let zeros = File::options().read(true).write(true).open("/dev/zero");
    let zeros = zeros.unwrap();
    session.quiet();
    session.peer.ok(&region(&zeros, 1 << 31, PAGE, 0).add());
    assert_eq!(session.next(), Event::Swap(0, 2));
    session.leave();

    let session = Session::ready_with(
        false,
        RingOptions {
            memory_files: true,
            ..RingOptions::default()
        },
    );
    session.run_vring(0, 0);
    session.peer.ok(&on_disk.add());
    assert_eq!(session.next(), Event::Swap(0, 2));
    session.leave();
}

#[test]
fn a_region_needs_exactly_one_file() {
    let session = Session::ready(false);
    let page = file(PAGE);
    let good = region(&page, 1 << 30, PAGE, 0).add();
    let none = Message::new(m::ADD_MEM_REG, &good.body);
    session.peer.refused(&none);
    session.peer.refused(&good.clone().with(&page));
    session.peer.ok(&good);
    session.leave();
}

#[test]
fn a_running_vring_goes_over_to_new_memory_without_a_stop() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    session.run_vring(1, 0);
    session.peer.ok(&m::enable(1, false));
    assert_eq!(session.next(), Event::Pause(1, true));
    let more = file(PAGE);
    let more = region(&more, 1 << 30, PAGE, 0);
    for (message, regions) in [
        (more.add(), 2),
        (more.remove(), 1),
        (m::mem_table(&[more, session.region()]), 2),
    ] {
        session.peer.ok(&message);
        assert_eq!(session.next(), Event::Swap(0, regions));
        assert_eq!(session.next(), Event::Swap(1, regions));
        session.quiet();
    }
    session.leave();
}

#[test]
fn a_vring_whose_ring_leaves_memory_waits_for_it_at_its_base() {
    let session = Session::ready(false);
    session.run_vring(0, 5);
    session.runner.advance(0, 23);
    let other = file(PAGE);
    let other = region(&other, 1 << 30, PAGE, 0);
    // The new table is as good as any: it is taken, although it lacks the ring.
    session.peer.ok(&m::mem_table(&[other]));
    assert_eq!(session.next(), Event::Stop(0));
    session.peer.ok(&session.region().add());
    let started = session.next_start();
    assert_eq!((started.index, started.base), (0, Some(23)));
    session.quiet();

    session.peer.ok(&session.region().remove());
    assert_eq!(session.next(), Event::Stop(0));
    assert_eq!(session.peer.get_base(0), 23, "asked while it waits");
    session.peer.ok(&session.region().add());
    session.quiet();
    session.leave();
}

#[test]
fn memory_may_come_after_everything_else() {
    let session = Session::ready(false);
    let peer = &session.peer;
    peer.ok(&session.region().remove());
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr(0));
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, None::<&File>));
    session.quiet();
    peer.ok(&session.region().add());
    assert_eq!(session.next_start().index, 0);
    session.leave();
}

#[test]
fn there_are_509_memory_slots_and_no_more() {
    let session = Session::ready(false);
    let backing = file(PAGE);
    let slot = |number: u64| region(&backing, (1 << 30) + number * 2 * PAGE, PAGE, 0);
    for number in 1..509 {
        session.peer.ok(&slot(number).add());
    }
    session.peer.refused(&slot(509).add());
    // A region that is there already takes no slot.
    session.peer.ok(&slot(7).add());
    session.peer.ok(&slot(7).remove());
    session.peer.refused(&slot(509).add());
    session.peer.ok(&slot(7).remove());
    session.peer.ok(&slot(509).add());
    session.run_vring(0, 0);
    session.leave();
}

#[test]
fn a_region_may_be_repeated_but_not_without_end() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    let repeats = 4 * 509;
    for _ in 0..repeats {
        session.peer.ok(&session.region().add());
    }
    session.peer.refused(&session.region().add());
    for _ in 0..repeats {
        session.peer.ok(&session.region().remove());
    }
    session.quiet();
    session.peer.ok(&session.region().remove());
    assert_eq!(session.next(), Event::Stop(0));
    session.leave();
}

#[test]
fn guest_memory_is_unmapped_when_the_session_has_ended() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    let inode = std::os::unix::fs::MetadataExt::ino(&session.ram.metadata().unwrap());
    let is_mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let inode = inode.to_string();
        maps.lines()
            .filter(|line| line.contains("/memfd:"))
            .any(|line| line.split_whitespace().nth(4) == Some(&inode))
    };
    assert!(is_mapped());
    let ram = session.ram.try_clone().unwrap();
    session.leave();
    wait_until("guest memory is unmapped", TIMEOUT, || {
        (!is_mapped()).then_some(())
    });
    drop(ram);
}

/// A file in memory that refuses writes through new mappings as `seal` says.
#[expect(unsafe_code, reason = "no crate of ours wraps seals")]
fn sealed_file(bytes: u64, seal: libc::c_int) -> File {
    // SAFETY: the name is a C string; the call has no other argument in memory.
    let fd = unsafe { libc::memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the fd was just made and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).unwrap();
    // SAFETY: the command has no argument in memory.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seal) };
    assert_eq!(sealed, 0, "{}", std::io::Error::last_os_error());
    file
}

#[test]
fn memory_that_can_not_be_written_is_refused_and_the_table_stays() {
    // A used ring in it would end the daemon with SIGSEGV at the first answer.
    let session = Session::ready(false);
    session.run_vring(0, 0);
    let writable = file(PAGE);
    let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let far = region(&read_only, 1 << 30, PAGE, 0);
    session.peer.refused(&far.add());
    session.logged("can't be mapped");
    session
        .peer
        .refused(&m::mem_table(&[session.region(), far]));
    // Not through the file, which may be written, but through what it was sealed with.
    for seal in [libc::F_SEAL_WRITE, libc::F_SEAL_FUTURE_WRITE] {
        let sealed = sealed_file(PAGE, seal);
        session
            .peer
            .refused(&region(&sealed, 1 << 30, PAGE, 0).add());
        session.logged("can't be mapped");
    }
    session.quiet();
    session.peer.ok(&region(&writable, 1 << 30, PAGE, 0).add());
    session.leave();
}
