//! libblkio's virtio-blk driver on disks of the real daemon, with split and with packed rings.
//!
//! An independent front-end moves pseudo-random data through several queues and compares every
//! byte with a model and with the file behind the disk; then what VIRTIO 1.3 §5.2 says of config
//! space, read-only disks and refused requests; and sessions that follow one another, break off,
//! or see the daemon end. No guest, no root: the driver is in the test's own process.

#[path = "support/blk_driver.rs"]
mod blk_driver;
mod support;
#[path = "support/vring_base.rs"]
mod vring_base;

#[cfg(test)]
mod disk {
    use super::blk_driver::{
        DATA_BYTES, Op, Options, Queue, Request, Ring, Session, Wait, raw_request,
    };
    use super::support::daemon::Daemon;
    use super::support::tmp::{TempDir, random_bytes};
    use std::fs;
    use std::ops::Range;
    use std::path::{Path, PathBuf};
    use std::thread;
    use virtio_driver::VirtioBlkFeatureFlags;

    /// Each test, with split and with packed rings.
    macro_rules! on_both_rings {
        ($($name:ident),+ $(,)?) => {
            mod split {
                $(#[test] fn $name() { super::$name(super::Ring::Split); })+
            }
            mod packed {
                $(#[test] fn $name() { super::$name(super::Ring::Packed); })+
            }
        };
    }

    on_both_rings!(
        random_io_is_byte_exact_when_polling,
        random_io_is_byte_exact_with_calls,
        random_io_on_a_sick_disk_is_byte_exact,
        neighbours_of_unaligned_writes_keep_their_bytes,
        two_queues_work_from_two_threads,
        config_space_has_what_was_configured,
        get_id_answers_the_serial_and_unknown_types_are_unsupported,
        a_read_only_disk_refuses_writes_and_reads_on,
        refused_requests_leave_the_queue_working,
        front_ends_follow_one_another_with_either_ring,
        a_session_that_breaks_off_leaves_a_working_disk,
        two_disks_with_different_rings_work_at_once,
        sigterm_drains_under_a_connected_front_end,
    );

    const SECTOR: usize = 512;
    const DISK_BYTES: usize = 16 << 20;
    const DEPTH: usize = 32;
    const REQUEST_BYTES_MAX: usize = 256 << 10;
    const REQUESTS: usize = 1200;

    const EIO: i32 = -libc::EIO;

    /// xorshift64*: the same numbers in every run.
    struct Rng(u64);

    impl Rng {
        fn new(seed: u64) -> Rng {
            Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
        }

        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn below(&mut self, end: usize) -> usize {
            usize::try_from(self.next() >> 16).expect("64 bits") % end
        }

        /// A whole number of sectors up to `REQUEST_BYTES_MAX`; every power of two as often.
        fn length(&mut self) -> usize {
            let magnitude = self.below(10);
            (1 + self.below(1 << magnitude)) * SECTOR
        }

        /// Cuts `len` bytes at `base` into one to five pieces, which may lie in memory in
        /// descending order; half of the time at any byte, else at sectors.
        fn pieces(&mut self, base: usize, len: usize) -> Vec<Range<usize>> {
            let unit = if self.below(2) == 0 { 1 } else { SECTOR };
            let cuts = self.below(5);
            let mut at: Vec<usize> = (0..cuts).map(|_| self.below(len / unit) * unit).collect();
            at.extend([0, len]);
            at.sort_unstable();
            at.dedup();
            let descending = self.below(2) == 0;
            let place = |cut: &[usize]| match descending {
                true => base + len - cut[1]..base + len - cut[0],
                false => base + cut[0]..base + cut[1],
            };
            at.windows(2).map(place).collect()
        }
    }

    /// Compares without printing megabytes.
    fn assert_same(what: &str, got: &[u8], want: &[u8]) {
        assert_eq!(got.len(), want.len(), "{what}");
        if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
            let to = (at + 16).min(got.len());
            let (got, want) = (&got[at..to], &want[at..to]);
            panic!("{what}: at byte {at} there is {got:x?}, not {want:x?}");
        }
    }

    /// A request in flight, and the part of the model that it is about.
    struct Flight {
        request: Request,
        range: Range<usize>,
    }

    /// Random requests on one queue, and what the disk should hold.
    struct Mix<'a> {
        rng: Rng,
        /// Where the model begins on the disk.
        base: usize,
        model: &'a mut [u8],
        /// By tag; each has its own part of the data memory.
        flights: [Option<Flight>; DEPTH],
    }

    impl<'a> Mix<'a> {
        fn new(base: usize, model: &'a mut [u8], seed: u64) -> Mix<'a> {
            Mix {
                rng: Rng::new(seed),
                base,
                model,
                flights: [const { None }; DEPTH],
            }
        }

        /// Keeps `DEPTH` requests in flight until `requests` are done.
        fn run(&mut self, queue: &mut Queue, requests: usize) {
            let (mut submitted, mut done) = (0, 0);
            while done < requests {
                for tag in 0..DEPTH {
                    if submitted < requests && self.flights[tag].is_none() {
                        self.submit(queue, tag);
                        submitted += 1;
                    }
                }
                queue.kick();
                for (tag, result) in queue.reap() {
                    self.complete(queue, tag, result);
                    done += 1;
                }
            }
        }

        fn submit(&mut self, queue: &mut Queue, tag: usize) {
            let op = match self.rng.below(64) {
                0 => Op::Flush,
                1..4 => Op::WriteZeroes,
                4..32 => Op::Read,
                _ => Op::Write,
            };
            let range = self.free_range(op);
            let area = tag * (DATA_BYTES / DEPTH);
            let pieces = match op {
                Op::Flush => Vec::new(),
                _ => self.rng.pieces(area, range.len()),
            };
            if op == Op::Write {
                let bytes = random_bytes(self.rng.next(), range.len());
                queue.fill(&pieces, &bytes);
                self.model[range.clone()].copy_from_slice(&bytes);
            } else if op == Op::WriteZeroes {
                self.model[range.clone()].fill(0);
            } else {
                // A read that moves nothing must not find the right bytes there.
                queue.fill(&pieces, &vec![0xa5; range.len()]);
            }
            let request = Request {
                op,
                offset: (self.base + range.start) as u64,
                pieces,
            };
            queue.submit(&request, tag);
            self.flights[tag] = Some(Flight { request, range });
        }

        /// A range that no request in flight writes and, for a write, none reads: requests have
        /// no order among themselves.
        fn free_range(&mut self, op: Op) -> Range<usize> {
            if op == Op::Flush {
                return 0..0;
            }
            loop {
                let len = self.rng.length();
                let start = self.rng.below((self.model.len() - len) / SECTOR + 1) * SECTOR;
                let range = start..start + len;
                let conflict = self.flights.iter().flatten().any(|other| {
                    let writes = op != Op::Read || other.request.op != Op::Read;
                    writes && other.range.start < range.end && range.start < other.range.end
                });
                if !conflict {
                    return range;
                }
            }
        }

        fn complete(&mut self, queue: &Queue, tag: usize, result: i32) {
            let flight = self.flights[tag].take().expect("a request of ours");
            assert_eq!(result, 0, "{:?}", flight.request);
            if flight.request.op == Op::Read {
                let what = format!("{:?}", flight.request);
                let got = queue.data(&flight.request.pieces);
                assert_same(&what, &got, &self.model[flight.range]);
            }
        }
    }

    /// A daemon with disks `disk0`, `disk1`, …
    struct Served {
        daemon: Daemon,
        dir: TempDir,
    }

    impl Served {
        /// `disks`: what a disk has beside name and socket.
        fn start(dir: TempDir, disks: &[String]) -> Served {
            let disk = |(at, keys): (usize, &String)| {
                let socket = socket_of(&dir, at);
                format!("name=disk{at},socket={},{keys}", socket.display())
            };
            let disks: Vec<String> = disks.iter().enumerate().map(disk).collect();
            let mut args = vec!["run", "--core", "1", "--idle", "adaptive"];
            args.extend(disks.iter().flat_map(|disk| ["--blk", disk]));
            let daemon = Daemon::start(&args);
            Served { daemon, dir }
        }

        fn socket(&self, disk: usize) -> PathBuf {
            socket_of(&self.dir, disk)
        }

        fn open(&self, disk: usize, ring: Ring, wait: Wait, queues: usize) -> Session {
            let options = Options { ring, wait, queues };
            let (name, socket) = (format!("disk{disk}"), self.socket(disk));
            Session::open(&self.daemon, &name, &socket, options)
        }
    }

    fn socket_of(dir: &TempDir, disk: usize) -> PathBuf {
        dir.path(&format!("disk{disk}.sock"))
    }

    /// The keys of a disk on a file.
    fn on_file(image: &Path) -> String {
        format!("path={},queues=2", image.display())
    }

    /// The keys of a disk in memory.
    fn on_ram() -> String {
        format!("backend=ram:{DISK_BYTES},queues=2")
    }

    fn random_io(name: &str, ring: Ring, wait: Wait) {
        let dir = TempDir::new(name);
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 11);
        let served = Served::start(dir, &[on_file(&image), on_ram()]);
        for disk in 0..2 {
            if disk == 1 {
                model.fill(0);
            }
            let mut session = served.open(disk, ring, wait, 1);
            let queue = session.queue();
            Mix::new(0, &mut model, 12).run(queue, REQUESTS);
            queue.flush();
            assert_same("disk", &queue.read(0, DISK_BYTES), &model);
            if disk == 0 {
                assert_same("file", &fs::read(&image).expect("the image"), &model);
            }
            if wait == Wait::Polling {
                // One when the ring starts, one when the index passes the event's initial 0.
                let calls = queue.calls();
                assert!(calls <= 2, "{calls} calls that nobody wanted");
            }
        }
    }

    fn random_io_is_byte_exact_when_polling(ring: Ring) {
        random_io("polling", ring, Wait::Polling);
    }

    fn random_io_is_byte_exact_with_calls(ring: Ring) {
        random_io("calls", ring, Wait::Call);
    }

    /// Writes of one sector each, side by side and at once: every other one from buffers that
    /// direct I/O does not take as they are.
    fn neighbours_of_unaligned_writes_keep_their_bytes(ring: Ring) {
        let dir = TempDir::new("neighbours");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 16);
        let served = Served::start(dir, &[on_file(&image)]);
        let mut session = served.open(0, ring, Wait::Call, 1);
        let queue = session.queue();
        for round in 0..200 {
            let bytes = random_bytes(17 + round, DEPTH * SECTOR);
            for (tag, sector) in bytes.chunks(SECTOR).enumerate() {
                let start = tag * SECTOR;
                let (cut, end) = (start + [0, 100][tag % 2], start + SECTOR);
                let mut pieces = vec![start..cut, cut..end];
                pieces.retain(|piece| !piece.is_empty());
                queue.fill(&pieces, sector);
                let (op, offset) = (Op::Write, start as u64);
                queue.submit(&Request { op, offset, pieces }, tag);
            }
            queue.kick();
            let mut done = 0;
            while done < DEPTH {
                for (tag, result) in queue.reap() {
                    assert_eq!(result, 0, "write of sector {tag}");
                    done += 1;
                }
            }
            queue.flush();
            model[..bytes.len()].copy_from_slice(&bytes);
            assert_same("disk", &queue.read(0, bytes.len()), &bytes);
        }
        assert_same("file", &fs::read(&image).expect("the image"), &model);
    }

    fn two_queues_work_from_two_threads(ring: Ring) {
        let dir = TempDir::new("queues");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 21);
        let served = Served::start(dir, &[on_file(&image)]);
        let mut session = served.open(0, ring, Wait::Call, 2);
        let (low, high) = model.split_at_mut(DISK_BYTES / 2);
        let (first, second) = session.queues.split_at_mut(1);
        thread::scope(|scope| {
            scope.spawn(|| Mix::new(0, low, 22).run(&mut first[0], REQUESTS));
            scope.spawn(|| Mix::new(DISK_BYTES / 2, high, 23).run(&mut second[0], REQUESTS));
        });
        // Each queue sees what the other wrote.
        for queue in &mut session.queues {
            assert_same("disk", &queue.read(0, DISK_BYTES), &model);
        }
        session.queue().flush();
        assert_same("file", &fs::read(&image).expect("the image"), &model);
    }

    fn random_io_on_a_sick_disk_is_byte_exact(ring: Ring) {
        let dir = TempDir::new("sick");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 91);
        let fault = ",fault=short=3+eintr=5+eagain=7+delay_us=50+reorder=8";
        let served = Served::start(dir, &[on_file(&image) + fault]);
        let mut session = served.open(0, ring, Wait::Call, 1);
        Mix::new(0, &mut model, 92).run(session.queue(), REQUESTS);
        session.queue().flush();
        assert_same("file", &fs::read(&image).expect("the image"), &model);
        assert!(served.daemon.counter("disk0", "injected") > 300);
    }

    fn config_space_has_what_was_configured(ring: Ring) {
        let dir = TempDir::new("config");
        let disks = [
            "backend=ram:96M,queues=3",
            "backend=ram:8M,queues=1,block_size=4096",
        ];
        let served = Served::start(dir, &disks.map(ToOwned::to_owned));
        for (disk, sectors, block, queues) in [(0, 96 << 11, 512, 3), (1, 8 << 11, 4096, 1)] {
            let session = served.open(disk, ring, Wait::Call, 1);
            let config = session.config();
            assert_eq!(config.capacity.to_native(), sectors);
            assert_eq!(config.blk_size.to_native(), block);
            assert_eq!(config.num_queues.to_native(), queues);
            // What fills a ring of 128 together with header and status.
            assert_eq!(config.seg_max.to_native(), 126);
            assert_eq!(session.max_queues(), Some(usize::from(queues)));
            assert!(session.has(VirtioBlkFeatureFlags::SEG_MAX));
            assert!(session.has(VirtioBlkFeatureFlags::BLK_SIZE));
            assert!(session.has(VirtioBlkFeatureFlags::FLUSH));
            assert!(session.has(VirtioBlkFeatureFlags::MQ));
            assert!(!session.has(VirtioBlkFeatureFlags::RO));
        }
    }

    fn get_id_answers_the_serial_and_unknown_types_are_unsupported(ring: Ring) {
        let (get_id, unknown) = (8, 77);
        let dir = TempDir::new("id");
        let disk = "backend=ram:1M,serial=vringd-serial-0042".to_owned();
        let served = Served::start(dir, &[disk]);
        let (status, id) = raw_request(&served.socket(0), ring, get_id, 20);
        assert_eq!((status, &id[..]), (0, &b"vringd-serial-0042\0\0"[..]));
        assert_eq!(raw_request(&served.socket(0), ring, unknown, 0).0, 2);
        assert_eq!(served.daemon.counter("disk0", "ids"), 1);
        assert_eq!(served.daemon.counter("disk0", "unsupported"), 1);
    }

    fn a_read_only_disk_refuses_writes_and_reads_on(ring: Ring) {
        let dir = TempDir::new("read-only");
        let (image, model) = dir.random_file("disk0.img", DISK_BYTES, 31);
        let served = Served::start(dir, &[on_file(&image) + ",read_only=true"]);
        let mut session = served.open(0, ring, Wait::Call, 1);
        assert!(session.has(VirtioBlkFeatureFlags::RO));
        let queue = session.queue();
        for round in 0..3 {
            let offset = round * (1 << 20);
            assert_eq!(queue.write(offset, &random_bytes(32, 4096)), EIO);
            assert_same("disk", &queue.read(0, DISK_BYTES), &model);
        }
        assert_same("file", &fs::read(&image).expect("the image"), &model);
    }

    fn refused_requests_leave_the_queue_working(ring: Ring) {
        let dir = TempDir::new("refused");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 41);
        let served = Served::start(dir, &[on_file(&image), on_ram()]);
        for disk in 0..2 {
            if disk == 1 {
                model.fill(0);
            }
            let mut session = served.open(disk, ring, Wait::Call, 1);
            assert!(session.has(VirtioBlkFeatureFlags::DISCARD));
            assert!(session.has(VirtioBlkFeatureFlags::WRITE_ZEROES));
            let queue = session.queue();
            for (number, (request, want)) in refused(ring).into_iter().enumerate() {
                queue.fill(&request.pieces, &vec![0x5a; 4096]);
                assert_eq!(queue.run(&request), want, "disk{disk}: {request:?}");
                let bytes = random_bytes(42 + number as u64, 8192);
                assert_eq!(queue.write(8192, &bytes), 0);
                model[8192..16384].copy_from_slice(&bytes);
                assert_same("after it", &queue.read(8192, 8192), &bytes);
            }
            assert_same("disk", &queue.read(0, DISK_BYTES), &model);
        }
        let bytes = fs::metadata(&image).expect("the image").len();
        assert_eq!(bytes, DISK_BYTES as u64, "the file has grown");
    }

    /// Requests of 4096 bytes that a disk of `DISK_BYTES` must refuse, and how.
    fn refused(ring: Ring) -> Vec<(Request, i32)> {
        let end = DISK_BYTES as u64;
        let far = u64::MAX - 511;
        let mut refused = Vec::new();
        for offset in [end - 512, end, end + (1 << 30), far] {
            refused.push((Op::Write, offset, EIO));
            // The crate's packed ring takes a device for broken whose used length is less than
            // all writable bytes, as it is when a read fails.
            if ring == Ring::Split {
                refused.push((Op::Read, offset, EIO));
            }
        }
        for op in [Op::Discard, Op::WriteZeroes] {
            refused.push((op, end - 512, EIO));
        }
        let request = |(op, offset, want)| {
            let pieces = vec![0..512, 1024..4608];
            (Request { op, offset, pieces }, want)
        };
        refused.into_iter().map(request).collect()
    }

    fn front_ends_follow_one_another_with_either_ring(first: Ring) {
        let dir = TempDir::new("sessions");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 51);
        let served = Served::start(dir, &[on_file(&image)]);
        let mut ring = first;
        for round in 0..5 {
            let wait = if round % 2 == 0 {
                Wait::Call
            } else {
                Wait::Polling
            };
            let mut session = served.open(0, ring, wait, 1);
            let queue = session.queue();
            let what = format!("session {round} on what the one before it left");
            assert_same(&what, &queue.read(0, DISK_BYTES), &model);
            Mix::new(0, &mut model, 52 + round).run(queue, 300);
            ring = ring.other();
        }
        let (status, log) = served.daemon.stop();
        assert!(status.success(), "{status}");
        assert_eq!(log.matches("negotiated device=disk0 ").count(), 5);
        assert_same("file", &fs::read(&image).expect("the image"), &model);
    }

    fn a_session_that_breaks_off_leaves_a_working_disk(ring: Ring) {
        let dir = TempDir::new("break-off");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 61);
        let served = Served::start(dir, &[on_file(&image)]);
        let written = random_bytes(62, DEPTH * REQUEST_BYTES_MAX);
        for round in 0..3 {
            let mut session = served.open(0, ring, Wait::Call, 2);
            for queue in &mut session.queues {
                submit_all(queue, Op::Write, &written);
                queue.kick();
            }
            // The writes may have happened or not, sector by sector.
            drop(session);

            let ring = if round == 1 { ring.other() } else { ring };
            let mut session = served.open(0, ring, Wait::Call, 1);
            let found = session.queue().read(0, DISK_BYTES);
            let sectors = found.chunks(SECTOR).zip(model.chunks(SECTOR)).enumerate();
            for (number, (found, old)) in sectors {
                let at = number * SECTOR;
                let new = written.get(at..at + SECTOR);
                let known = found == old || Some(found) == new;
                assert!(known, "sector {number} is neither old nor new");
            }
            model.copy_from_slice(&found);
            Mix::new(0, &mut model, 63 + round).run(session.queue(), 200);
            assert_same("disk", &session.queue().read(0, DISK_BYTES), &model);
        }
        let (status, _) = served.daemon.stop();
        assert!(status.success(), "{status}");
        assert_same("file", &fs::read(&image).expect("the image"), &model);
    }

    /// `DEPTH` requests of `REQUEST_BYTES_MAX` side by side from the start of the disk.
    fn submit_all(queue: &mut Queue, op: Op, bytes: &[u8]) {
        for tag in 0..DEPTH {
            let start = tag * REQUEST_BYTES_MAX;
            let range = start..start + REQUEST_BYTES_MAX;
            let request = Request::whole(op, start as u64, range.clone());
            queue.fill(&request.pieces, &bytes[range]);
            queue.submit(&request, tag);
        }
    }

    fn two_disks_with_different_rings_work_at_once(ring: Ring) {
        let dir = TempDir::new("disks");
        let (image, mut file_model) = dir.random_file("disk0.img", DISK_BYTES, 71);
        let mut ram_model = vec![0; DISK_BYTES];
        let served = Served::start(dir, &[on_file(&image), on_ram()]);
        let mut file = served.open(0, ring, Wait::Call, 1);
        let mut ram = served.open(1, ring.other(), Wait::Polling, 1);
        thread::scope(|scope| {
            scope.spawn(|| Mix::new(0, &mut file_model, 72).run(file.queue(), REQUESTS));
            scope.spawn(|| Mix::new(0, &mut ram_model, 73).run(ram.queue(), REQUESTS));
        });
        file.queue().flush();
        assert_same("disk0", &file.queue().read(0, DISK_BYTES), &file_model);
        assert_same("disk1", &ram.queue().read(0, DISK_BYTES), &ram_model);
        assert_same("file", &fs::read(&image).expect("the image"), &file_model);
    }

    fn sigterm_drains_under_a_connected_front_end(ring: Ring) {
        let dir = TempDir::new("sigterm");
        let (image, mut model) = dir.random_file("disk0.img", DISK_BYTES, 81);
        let served = Served::start(dir, &[on_file(&image)]);
        let mut session = served.open(0, ring, Wait::Call, 1);
        let queue = session.queue();
        let written = random_bytes(82, DEPTH * REQUEST_BYTES_MAX);
        assert_eq!(queue.write(DISK_BYTES as u64 - 4096, &written[..4096]), 0);
        model[DISK_BYTES - 4096..].copy_from_slice(&written[..4096]);
        submit_all(queue, Op::Write, &written);
        queue.kick();
        let (socket, Served { daemon, dir }) = (served.socket(0), served);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{status}: {log}");
        assert!(!socket.exists(), "the socket is left behind");

        // What the daemon took, it finished and told us.
        let done = queue.completions();
        for &(tag, result) in &done {
            assert_eq!(result, 0, "request {tag}");
            let range = tag * REQUEST_BYTES_MAX..(tag + 1) * REQUEST_BYTES_MAX;
            model[range.clone()].copy_from_slice(&written[range]);
        }
        let line = log
            .lines()
            .rfind(|line| line.contains("counters device=disk0 "));
        let line = line.expect("counters at the end");
        let writes = format!(" writes={} ", done.len() + 1);
        assert!(line.contains(&writes), "{} answered: {line}", done.len());
        let found = fs::read(dir.path("disk0.img")).expect("the image");
        assert_same("file", &found, &model);
    }
}
