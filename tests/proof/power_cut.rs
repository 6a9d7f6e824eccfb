//! After a power cut every write that was durable is there, byte for byte; and this test finds the
//! ones that are not.
//!
//! In a guest the daemon serves disks on dm-log-writes (see `inside`). Here each log is replayed to
//! each mark, onto an empty disk, and compared with what the driver was told until then. Where the
//! disk is in a qcow2 image, QEMU says whether the image is whole and what is in it.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::image;
use super::inside::{self, Cache, Session};
use super::journal::{Durable, Found, SECTOR, Step};
use super::log_writes::{Entry, Log};
use crate::support::guest::{Guest, GuestConfig, Tools};
use crate::support::tmp::TempDir;
use crate::support::xts::reference;

const LOG_BYTES: u64 = 4 << 30;
const MARKS: u32 = 16;
/// A second of a longer run is so many marks more.
const MARKS_PER_SECOND: u32 = 2;

/// What a power cut at every mark would have left.
#[derive(Debug, Default)]
struct Verdict {
    marks: u32,
    /// Sectors compared with something that was durable.
    durable: u64,
    /// How often something that was answered, but not durable yet, was not there.
    not_yet: u64,
    lost: Vec<String>,
}

/// A disk as the log has it.
struct Replay {
    disk: Vec<Found>,
    /// Sectors that an entry has changed.
    changed: Vec<usize>,
    encrypted: bool,
}

impl Replay {
    fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Mark(_) => {}
            Entry::Write { offset, data } => {
                let plain = if self.encrypted {
                    reference(&inside::key(), SECTOR, offset, &data, false)
                } else {
                    data
                };
                let first = sector(offset);
                for (at, data) in plain.chunks_exact(SECTOR).enumerate() {
                    self.disk[first + at] = Found::Data(data.to_vec());
                    self.changed.push(first + at);
                }
            }
            Entry::Discard { offset, bytes } => {
                for at in sector(offset)..sector(offset + bytes) {
                    self.disk[at] = Found::Discarded;
                    self.changed.push(at);
                }
            }
        }
    }

    /// Replays up to the mark `number`.
    fn run_to(&mut self, log: &mut Log, number: u32) {
        loop {
            match log.next() {
                Some(Entry::Mark(text)) if text == number.to_string() => return,
                Some(entry) => self.apply(entry),
                None => panic!("mark {number} is not in the log"),
            }
        }
    }
}

fn sector(offset: u64) -> usize {
    usize::try_from(offset).expect("a small disk") / SECTOR
}

/// What is in the image or the file on `disk`; what it is too short for was never written.
fn content(session: &Session, disk: &[Found], dir: &Path) -> Result<Vec<Found>, String> {
    if session.is_image() {
        return image::content(disk, dir);
    }
    let mut found = image::file(disk, inside::DISK_FILE, dir)?;
    found.resize(session.sectors(), Found::Untouched);
    Ok(found)
}

/// Replays `log` to each mark of the journal.
fn judge(session: &Session, log: &mut Log, journal: &[Step], dir: &TempDir) -> Verdict {
    // A driver that changes it begins with write-back.
    let through = !matches!(session.cache, Cache::Writeback | Cache::Changing);
    let mut durable = Durable::new(session.sectors(), through);
    let mut replay = Replay {
        disk: vec![Found::Untouched; inside::SECTORS],
        changed: Vec::new(),
        encrypted: session.encrypt,
    };
    let mut verdict = Verdict::default();
    for step in journal {
        durable.step(*step);
        let Step::Mark { number } = *step else {
            continue;
        };
        replay.run_to(log, number);
        verdict.marks += 1;
        let in_image = (session.is_image() || session.is_file()).then(|| {
            // Any sector of the disk may be where another part of the image was.
            replay.changed = (0..session.sectors()).collect();
            content(session, &replay.disk, &dir.path(""))
        });
        let disk = match &in_image {
            None => &replay.disk,
            Some(Ok(disk)) => disk,
            Some(Err(wrong)) => {
                verdict.lost.push(format!("mark {number}: {wrong}"));
                continue;
            }
        };
        let missing = |&(sector, id): &(usize, u32)| {
            durable
                .judge(sector, &disk[sector])
                .is_ok_and(|found| found < id)
        };
        verdict.not_yet += durable.unflushed().filter(missing).count() as u64;
        // What neither has changed is as it was at the last mark.
        let mut look = std::mem::take(&mut replay.changed);
        look.extend(durable.take_changed());
        look.sort_unstable();
        look.dedup();
        for sector in look {
            verdict.durable += u64::from(durable.has_durable(sector));
            if let Err(lost) = durable.judge(sector, &disk[sector]) {
                verdict.lost.push(format!("mark {number}: {lost}"));
            }
        }
    }
    verdict
}

/// The journal of each session.
fn journals(device: &Path) -> Vec<Vec<Step>> {
    let bytes = fs::read(device).expect("the journal's drive");
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).expect("a journal");
    let text = text.strip_suffix("end\n").expect("a whole journal");
    let mut journals = Vec::<Vec<Step>>::new();
    for line in text.lines() {
        if line == inside::title(journals.len()) {
            journals.push(Vec::new());
            continue;
        }
        let journal = journals.last_mut().expect("a title");
        journal.push(line.parse().unwrap_or_else(|error| panic!("{error}")));
    }
    journals
}

/// Runs all sessions in a guest; returns the drive of each log and that of the journals.
fn run_in_guest(dir: &TempDir, marks: u32) -> (Vec<PathBuf>, PathBuf) {
    let drive = |name: String, bytes: u64| {
        let path = dir.path(&name);
        let file = File::create(&path).expect("a drive");
        file.set_len(bytes).expect("a sparse file");
        path
    };
    let sessions = inside::sessions().len();
    let logs = (0..sessions).map(|number| drive(format!("log{number}"), LOG_BYTES));
    let logs: Vec<_> = logs.collect();
    let journal = drive("journal".into(), 64 << 20);
    let test = env::current_exe().expect("this program");
    let mut drives = logs.clone();
    drives.push(journal.clone());
    let mut guest = Guest::boot(&GuestConfig {
        tools: Some(Tools {
            drives,
            programs: vec![test.clone(), env!("CARGO_BIN_EXE_vringd").into()],
            ..Tools::default()
        }),
        ..GuestConfig::default()
    });
    let name = test.file_name().expect("a name").to_string_lossy();
    let line = format!(
        "VRINGD_MARKS={marks} RUST_BACKTRACE=1 /proof/{name} --ignored --exact \
         proof::inside::drives_disks_in_the_guest"
    );
    let patience = Duration::from_secs(120 + 6 * u64::from(marks));
    let (status, said) = guest.run_within(&line, patience);
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("1 passed"), "{said}");
    (logs, journal)
}

fn verdicts() -> Vec<(Session, Verdict)> {
    let dir = TempDir::new("powercut");
    let marks = super::soak().map_or(MARKS, |seconds| seconds * MARKS_PER_SECOND);
    let (logs, journal) = run_in_guest(&dir, marks);
    let journals = journals(&journal);
    assert_eq!(journals.len(), logs.len());
    let sessions = inside::sessions()
        .into_iter()
        .zip(logs.iter().zip(&journals));
    let judged = sessions.map(|(session, (log, journal))| {
        let verdict = judge(&session, &mut Log::open(log), journal, &dir);
        assert_eq!(verdict.marks, marks, "{session:?}");
        let Verdict {
            durable,
            not_yet,
            lost,
            ..
        } = &verdict;
        println!(
            "{session:?}: {marks} marks, {durable} durable sectors compared, {not_yet} that were \
             not durable yet are gone, {} durable ones are lost",
            lost.len()
        );
        (session, verdict)
    });
    judged.collect()
}

#[test]
fn after_a_power_cut_every_durable_write_is_there() {
    let (honest, lying): (Vec<_>, Vec<_>) = verdicts()
        .into_iter()
        .partition(|(session, _)| !session.extra.contains("drop_flush"));
    assert_eq!(
        (honest.len(), lying.len()),
        (inside::HONEST.len(), inside::LYING.len())
    );
    for (session, verdict) in honest {
        let first = verdict.lost.first();
        assert_eq!(first, None, "{session:?} has lost {}", verdict.lost.len());
        assert!(verdict.durable > 1000, "{session:?}: {}", verdict.durable);
        // An image that gets a cluster makes what was written before durable.
        let is_taken = matches!(session.cache, Cache::Writeback | Cache::Changing);
        if is_taken && !session.is_image() {
            assert!(verdict.not_yet > 0, "{session:?}: the cut takes nothing");
        }
    }
    for (session, verdict) in lying {
        let lost = verdict.lost.len();
        assert!(lost > 1000, "{session:?}: only {lost} sectors lost");
    }
}
