//! The part of the power-cut proof that runs in the guest: this test binary and the daemon are
//! copied there.
//!
//! Each session has a RAM disk, dm-log-writes over it, a daemon on that or on a file of an ext4 on
//! it, and a driver that keeps many requests in flight and sets a mark in the log whenever
//! something has become durable.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::driver::{
    DATA, DEPTH, DISCARD, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd, OUT,
    PATIENCE, QUEUES, WRITE_ZEROES,
};
use super::image;
use super::journal::{Kind, SECTOR, Step, content};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::random_bytes;

/// Sectors of each disk, which is a RAM disk of the kernel's default size.
pub const SECTORS: usize = (16 << 20) / SECTOR;
/// `writeback` in config space.
const WCE: u32 = 32;
/// The file of a disk, in its file system.
pub const DISK_FILE: &str = "disk.img";

/// How writes become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// By FLUSH.
    Writeback,
    /// At once: `cache=writethrough`.
    Writethrough,
    /// At once: the driver has set `writeback` in config space to 0.
    WceOff,
    /// At once: the driver has no FLUSH.
    NoFlush,
    /// One and the other: the driver sets `writeback` in config space to 0 and to 1 again, while
    /// requests are in flight.
    Changing,
}

/// What the daemon has the disk in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Device,
    /// A file of an ext4 that is all holes, and half as long at first.
    Sparse,
    /// A file of an ext4 whose space is reserved.
    Reserved,
}

/// One disk with a daemon and a driver.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    pub cache: Cache,
    pub packed: bool,
    pub encrypt: bool,
    pub place: Place,
    /// More keys of the disk, each with a leading comma.
    pub extra: &'static str,
}

impl Session {
    /// Whether the disk is in a qcow2 image on the logged one.
    pub fn is_image(&self) -> bool {
        self.extra.contains("format=qcow2")
    }

    /// Whether the disk is in a file of a file system on the logged one.
    pub fn is_file(&self) -> bool {
        self.place != Place::Device
    }

    /// Sectors that the driver has in the end. An image needs space for its tables, and so does a
    /// file system.
    pub fn sectors(&self) -> usize {
        if self.is_image() || self.is_file() {
            SECTORS / 2
        } else {
            SECTORS
        }
    }

    /// Sectors that the driver has at first.
    fn sectors_at_first(&self) -> usize {
        match self.place {
            Place::Sparse => self.sectors() / 2,
            Place::Device | Place::Reserved => self.sectors(),
        }
    }
}

const fn session(cache: Cache, packed: bool, encrypt: bool, extra: &'static str) -> Session {
    Session {
        cache,
        packed,
        encrypt,
        place: Place::Device,
        extra,
    }
}

const fn in_file(place: Place, cache: Cache, packed: bool, extra: &'static str) -> Session {
    Session {
        place,
        ..session(cache, packed, false, extra)
    }
}

/// In these nothing that is durable may be missing.
pub const HONEST: [Session; 16] = [
    session(Cache::Writeback, false, false, ""),
    session(Cache::Writeback, true, true, ""),
    session(Cache::Writeback, true, false, ",direct=false"),
    session(Cache::Writethrough, true, false, ",cache=writethrough"),
    session(Cache::Writethrough, false, true, ",cache=writethrough"),
    session(Cache::WceOff, false, false, ""),
    session(Cache::NoFlush, true, false, ""),
    session(
        Cache::Writethrough,
        false,
        false,
        ",fixed_buffers=true,cache=writethrough",
    ),
    session(Cache::Writeback, false, true, ",fault=short=3+reorder=4"),
    session(Cache::Writeback, true, false, ",format=qcow2"),
    session(
        Cache::Writethrough,
        false,
        false,
        ",format=qcow2,cache=writethrough",
    ),
    session(Cache::Writeback, false, false, ",sqpoll=true"),
    session(Cache::Changing, true, false, ""),
    in_file(Place::Sparse, Cache::Writeback, false, ""),
    in_file(Place::Sparse, Cache::Changing, true, ",direct=false"),
    in_file(
        Place::Reserved,
        Cache::Writethrough,
        true,
        ",cache=writethrough",
    ),
];

/// In these flushes do nothing, and something has to be missing.
pub const LYING: [Session; 4] = [
    session(Cache::Writeback, true, false, ",fault=drop_flush"),
    session(
        Cache::Writethrough,
        false,
        false,
        ",cache=writethrough,fault=drop_flush",
    ),
    session(Cache::Writeback, false, true, ",fault=drop_flush"),
    in_file(Place::Reserved, Cache::Changing, false, ",fault=drop_flush"),
];

/// All sessions, in the order of their disks.
pub fn sessions() -> Vec<Session> {
    HONEST.into_iter().chain(LYING).collect()
}

/// The key of encrypted disks.
pub fn key() -> [u8; 64] {
    random_bytes(41, 64).try_into().expect("64 bytes")
}

/// `/dev/vda` and so on: the drives of the guest.
pub fn drive(number: usize) -> String {
    let letter = char::from(b'a' + u8::try_from(number).expect("a few drives"));
    format!("/dev/vd{letter}")
}

/// What a session is, as the first line of its journal.
pub fn title(number: usize) -> String {
    format!("session {number}")
}

/// What dmsetup said if it failed.
fn try_dmsetup(arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("dmsetup");
    // There is no udev to wait for.
    let command = command.env("DM_DISABLE_UDEV", "1").args(arguments);
    let output = command.output().expect("dmsetup runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}

fn dmsetup(arguments: &[&str]) {
    let done = try_dmsetup(arguments);
    done.unwrap_or_else(|said| panic!("dmsetup {arguments:?}: {said}"));
}

/// The driver of one session, and its journal.
struct Work<D: Driver> {
    front: FrontEnd<D>,
    /// Its device-mapper device.
    name: String,
    session: Session,
    /// Sectors that there are now.
    sectors: usize,
    /// Whether writes are durable when they are answered, as long as the driver changes that.
    through: bool,
    journal: String,
    last: u32,
    /// Where each request in flight works.
    in_flight: Vec<(u32, usize, usize)>,
    /// Where requests have worked since the last flush, if the driver changes the cache. What need
    /// not be durable is logged with the next flush, and so after later writes with FUA.
    loose: Vec<(u32, usize, usize)>,
    numbers: std::vec::IntoIter<u8>,
}

impl<D: Driver> Work<D> {
    fn note(&mut self, step: Step) {
        writeln!(self.journal, "{step}").expect("a string takes all");
    }

    fn below(&mut self, limit: usize) -> usize {
        if self.numbers.len() < 2 {
            self.numbers = random_bytes(self.last.into(), 1 << 16).into_iter();
        }
        let two = [(); 2].map(|()| self.numbers.next().expect("enough are left"));
        (usize::from(u16::from_le_bytes(two)) * limit) >> 16
    }

    /// Anything, on sectors on which nothing else is in flight.
    fn submit(&mut self) {
        self.last += 1;
        let id = self.last;
        let (sector, sectors) = loop {
            let sectors = self.below(DATA / SECTOR) + 1;
            let sector = self.below(self.sectors - sectors);
            let apart = |&(_, at, many): &(u32, usize, usize)| {
                at + many <= sector || sector + sectors <= at
            };
            let hidden = self.through && !self.loose.iter().all(apart);
            if self.in_flight.iter().all(apart) && !hidden {
                break (sector, sectors);
            }
        };
        let kind = match self.below(16) {
            0 | 1 => Kind::Zeroes,
            // A discard is logged with the next flush, and so after later writes with FUA.
            2 if self.session.cache == Cache::Writeback => Kind::Discard,
            _ => Kind::Write,
        };
        let mut range = (sector as u64).to_le_bytes().to_vec();
        range.extend(u32::try_from(sectors).expect("a few").to_le_bytes());
        range.extend([0; 4]);
        let data = |at: usize| content(sector + at, id);
        let (request, start, data) = match kind {
            Kind::Write => (OUT, sector, (0..sectors).flat_map(data).collect()),
            Kind::Zeroes => (WRITE_ZEROES, 0, range),
            Kind::Discard => (DISCARD, 0, range),
        };
        self.in_flight.push((id, sector, sectors));
        if self.session.cache == Cache::Changing {
            self.loose.push((id, sector, sectors));
        }
        self.note(Step::Submit {
            id,
            kind,
            sector,
            sectors,
        });
        let queue = self.below(QUEUES);
        self.front.submit(queue, id, request, start as u64, &data);
    }

    fn flush(&mut self) -> u32 {
        self.last += 1;
        let id = self.last;
        self.note(Step::Flush { id });
        let queue = self.below(QUEUES);
        self.front.submit(queue, id, FLUSH, 0, &[]);
        id
    }

    /// Waits until one request was answered at least, and `name` if there is one.
    fn reap(&mut self, name: Option<u32>) {
        let mut waiting = true;
        while waiting {
            for id in self.front.reap() {
                self.in_flight.retain(|(other, ..)| *other != id);
                self.note(Step::Done { id });
                waiting = name.is_some_and(|name| waiting && name != id);
            }
        }
    }

    fn mark(&mut self, number: u32) {
        let (name, text) = (self.name.clone(), number.to_string());
        dmsetup(&["message", &name, "0", "mark", &text]);
        self.note(Step::Mark { number });
    }

    /// Two marks with write-back, two with write-through, over and over.
    fn change_cache(&mut self, number: u32) {
        let through = number % 4 >= 2;
        if self.session.cache == Cache::Changing && through != self.through {
            self.front.set_config(WCE, u8::from(!through));
            self.note(Step::Cache { through });
            self.through = through;
        }
    }

    /// Whether this mark comes after a FLUSH.
    fn flushes(&self, number: u32) -> bool {
        match self.session.cache {
            Cache::Writeback => true,
            Cache::Changing => !self.through && number.is_multiple_of(2),
            Cache::Writethrough | Cache::WceOff | Cache::NoFlush => false,
        }
    }

    /// Makes the file of the disk longer, under load.
    fn grow(&mut self) {
        let sectors = self.session.sectors();
        let file = File::options().write(true).open(file(&self.name));
        let file = file.expect("the file of the disk");
        file.set_len((sectors * SECTOR) as u64)
            .expect("a longer file");
        // The daemon looks when whoever wrote to the file closes it.
        drop(file);
        wait_until("the new size", PATIENCE, || {
            (self.front.sectors() == sectors as u64).then_some(())
        });
        self.sectors = sectors;
    }

    fn run(mut self, marks: u32) -> String {
        for number in 0..marks {
            self.change_cache(number);
            if number == marks / 2 && self.sectors < self.session.sectors() {
                self.grow();
            }
            for _ in 0..self.below(12) + 4 {
                if self.front.in_flight() + 2 < DEPTH {
                    self.submit();
                }
            }
            // Some are answered before the flush, some beside it, some after the mark.
            let left = self.below(self.front.in_flight());
            while self.front.in_flight() > left {
                self.reap(None);
            }
            if self.flushes(number) {
                // It covers what was answered before.
                let uncovered: Vec<_> = self.in_flight.iter().map(|(id, ..)| *id).collect();
                let flush = self.flush();
                for _ in 0..self.below(4) {
                    self.submit();
                }
                self.reap(Some(flush));
                self.loose
                    .retain(|(id, ..)| *id > flush || uncovered.contains(id));
                // What is answered now is what a power cut may take.
                self.submit();
                self.reap(None);
            }
            self.mark(number);
        }
        while self.front.in_flight() > 0 {
            self.reap(None);
        }
        self.journal
    }
}

fn drive_disk<D: Driver>(session: Session, name: &str, socket: &Path, marks: u32) -> String {
    let flush = match session.cache {
        Cache::NoFlush => 0,
        _ => F_FLUSH | F_CONFIG_WCE,
    };
    let mut front = FrontEnd::<D>::open(socket, flush | F_DISCARD | F_WRITE_ZEROES);
    assert_eq!(front.has(F_FLUSH), session.cache != Cache::NoFlush);
    if session.cache == Cache::WceOff {
        front.set_config(WCE, 0);
    }
    let work = Work {
        front,
        name: name.to_owned(),
        session,
        sectors: session.sectors_at_first(),
        through: false,
        journal: String::new(),
        last: 0,
        in_flight: Vec::new(),
        loose: Vec::new(),
        numbers: Vec::new().into_iter(),
    };
    work.run(marks)
}

fn mapped(number: usize) -> String {
    format!("lw{number}")
}

/// Where the file system of a session is mounted.
fn mounted(name: &str) -> String {
    format!("/tmp/{name}.mnt")
}

/// The file that has the disk of a session.
fn file(name: &str) -> String {
    format!("{}/{DISK_FILE}", mounted(name))
}

fn ok(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    let status = status.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// Makes what the disk of a session is in; returns its path.
fn make(name: &str, session: Session) -> String {
    let device = format!("/dev/mapper/{name}");
    if session.is_image() {
        let mut device = File::options().write(true).open(&device).unwrap();
        device.write_all(&image::empty(session.sectors())).unwrap();
        device.sync_all().unwrap();
    }
    if !session.is_file() {
        return device;
    }
    // All at once: nothing of it is written later, in the background.
    let at_once = "lazy_itable_init=0,lazy_journal_init=0";
    ok(
        "mkfs.ext4",
        &["-q", "-F", "-b", "4096", "-E", at_once, &device],
    );
    let (dir, path) = (mounted(name), file(name));
    fs::create_dir(&dir).unwrap();
    ok("mount", &["-t", "ext4", &device, &dir]);
    let bytes = (session.sectors_at_first() * SECTOR).to_string();
    match session.place {
        Place::Reserved => ok("fallocate", &["-l", &bytes, &path]),
        Place::Sparse | Place::Device => ok("truncate", &["-s", &bytes, &path]),
    }
    File::open(&path).unwrap().sync_all().unwrap();
    File::open(&dir).unwrap().sync_all().unwrap();
    path
}

/// The RAM disk of a session. The kernel makes some, and others when they are opened.
fn ram_disk(number: usize) -> String {
    let path = format!("/dev/ram{number}");
    if !Path::new(&path).exists() {
        ok("mknod", &[&path, "b", "1", &number.to_string()]);
    }
    path
}

fn run(number: usize, session: Session, marks: u32) -> String {
    let name = mapped(number);
    let (disk, log) = (ram_disk(number), drive(number));
    let table = format!("0 {SECTORS} log-writes {disk} {log}");
    dmsetup(&["create", &name, "--table", &table]);
    let path = make(&name, session);
    let socket = format!("/tmp/{name}.sock");
    let key = "encrypt=aes-256-xts,key_file=/tmp/key";
    let key = if session.encrypt {
        format!(",{key}")
    } else {
        String::new()
    };
    let disk = format!(
        "name=disk0,socket={socket},path={path}{key}{}",
        session.extra
    );
    let args = ["run", "--core", "1", "--idle", "adaptive", "--blk", &disk];
    let daemon = Daemon::spawn(Command::new("/proof/vringd"), &args);
    let socket = Path::new(&socket);
    let journal = if session.packed {
        drive_disk::<PackedDriver>(session, &name, socket, marks)
    } else {
        drive_disk::<SplitDriver>(session, &name, socket, marks)
    };
    assert_eq!(daemon.counter("disk0", "errors"), 0);
    assert_eq!(daemon.counter("disk0", "ring_faults"), 0);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    // Without registered memory the session would prove nothing of it.
    assert!(!log.contains("can't be pinned"), "{log}");
    assert!(!log.contains("not here"), "{log}");
    journal
}

/// Nothing but the power-cut proof starts this, in its guest.
#[test]
#[ignore = "runs in the guest of the power-cut proof"]
fn drives_disks_in_the_guest() {
    let marks = std::env::var("VRINGD_MARKS").expect("the number of marks");
    let marks = marks.parse().expect("a number");
    fs::write("/tmp/key", key()).unwrap();
    let mut journal = String::new();
    for (number, session) in sessions().into_iter().enumerate() {
        writeln!(journal, "{}", title(number)).unwrap();
        journal += &run(number, session, marks);
    }
    journal += "end\n";
    // The kernel closes the files of an io_uring a moment after its owner has gone.
    for (number, session) in sessions().into_iter().enumerate() {
        let name = mapped(number);
        if session.is_file() {
            wait_until("a file that nobody has open", PATIENCE, || {
                let done = Command::new("umount").arg(mounted(&name)).output();
                done.expect("umount runs").status.success().then_some(())
            });
        }
        wait_until("a device that nobody has open", PATIENCE, || {
            try_dmsetup(&["remove", &name]).ok()
        });
    }
    let device = drive(sessions().len());
    let mut device = File::options().write(true).open(device).unwrap();
    device.write_all(journal.as_bytes()).unwrap();
    device.sync_all().unwrap();
}
