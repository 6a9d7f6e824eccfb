//! What a driver did to a disk and in which order, and what a disk may have after a power cut.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use crate::support::tmp::random_bytes;

pub const SECTOR: usize = 512;

/// What a request does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Zeroes,
    Discard,
}

/// A step of the driver, in the order in which it took them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request was made available; no other is in flight on its sectors.
    Submit {
        id: u32,
        kind: Kind,
        sector: usize,
        sectors: usize,
    },
    /// A FLUSH was made available.
    Flush { id: u32 },
    /// A request or a FLUSH was answered, with status OK.
    Done { id: u32 },
    /// A mark is in the log.
    Mark { number: u32 },
    /// From now on a write is durable when it is answered, or only after a FLUSH.
    Cache { through: bool },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Step::Submit {
                id,
                kind,
                sector,
                sectors,
            } => write!(f, "{kind:?} {id} {sector} {sectors}"),
            Step::Flush { id } => write!(f, "Flush {id}"),
            Step::Done { id } => write!(f, "Done {id}"),
            Step::Mark { number } => write!(f, "Mark {number}"),
            Step::Cache { through } => write!(f, "Cache {}", u32::from(through)),
        }
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(line: &str) -> Result<Step, String> {
        let mut words = line.split(' ');
        let word = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|n| n.parse::<u32>().ok());
        let bad = || format!("no step: {line:?}");
        let id = number().ok_or_else(bad)?;
        let kind = match word {
            "Flush" => return Ok(Step::Flush { id }),
            "Done" => return Ok(Step::Done { id }),
            "Mark" => return Ok(Step::Mark { number: id }),
            "Cache" => return Ok(Step::Cache { through: id == 1 }),
            "Write" => Kind::Write,
            "Zeroes" => Kind::Zeroes,
            "Discard" => Kind::Discard,
            _ => return Err(bad()),
        };
        Ok(Step::Submit {
            id,
            kind,
            sector: number().ok_or_else(bad)? as usize,
            sectors: number().ok_or_else(bad)? as usize,
        })
    }
}

/// What a write puts into a sector.
pub fn content(sector: usize, id: u32) -> Vec<u8> {
    let mut bytes = random_bytes((u64::from(id) << 32) | sector as u64, SECTOR);
    bytes[..8].copy_from_slice(&(sector as u64).to_le_bytes());
    bytes[8..12].copy_from_slice(&id.to_le_bytes());
    bytes
}

/// What a replayed sector has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// What was there before the first request.
    Untouched,
    /// What a discard leaves.
    Discarded,
    Data(Vec<u8>),
}

#[derive(Clone, Debug)]
struct Request {
    kind: Kind,
    sector: usize,
    sectors: usize,
    /// Writes are durable when they are answered, since before it was made available.
    through: bool,
}

/// What each sector may have if the power is cut now.
pub struct Durable {
    /// Writes are durable when they are answered, without a FLUSH, now.
    through: bool,
    requests: HashMap<u32, Request>,
    /// Answered, and no FLUSH since.
    unflushed: Vec<u32>,
    /// What a FLUSH in flight makes durable.
    flushing: HashMap<u32, Vec<u32>>,
    /// By sector: the last request that is durable (0: none) and all after it.
    may: Vec<Vec<u32>>,
    /// Sectors whose `may` has changed.
    changed: Vec<usize>,
}

impl Durable {
    pub fn new(sectors: usize, through: bool) -> Durable {
        Durable {
            through,
            requests: HashMap::new(),
            unflushed: Vec::new(),
            flushing: HashMap::new(),
            may: vec![vec![0]; sectors],
            changed: Vec::new(),
        }
    }

    pub fn step(&mut self, step: Step) {
        match step {
            Step::Submit {
                id,
                kind,
                sector,
                sectors,
            } => {
                for may in &mut self.may[sector..sector + sectors] {
                    may.push(id);
                }
                let request = Request {
                    kind,
                    sector,
                    sectors,
                    through: self.through,
                };
                self.requests.insert(id, request);
            }
            // It covers what was answered before it was made available (VIRTIO 1.3 §5.2.6.2).
            Step::Flush { id } => {
                let covered = std::mem::take(&mut self.unflushed);
                self.flushing.insert(id, covered);
            }
            Step::Done { id } => self.done(id),
            Step::Mark { .. } => {}
            Step::Cache { through } => {
                self.through = through;
                // What is not answered yet has to be flushed, unless it was so all the time until
                // its answer (VIRTIO 1.3 §5.2.6.2); what was answered before stays as it is.
                let requests = self.requests.values_mut();
                requests.for_each(|request| request.through &= through);
            }
        }
    }

    fn done(&mut self, id: u32) {
        if let Some(covered) = self.flushing.remove(&id) {
            covered.into_iter().for_each(|id| self.keep(id));
            return;
        }
        if self.requests[&id].through {
            self.keep(id);
        } else {
            self.unflushed.push(id);
        }
    }

    /// From now on there is nothing older than `id` on its sectors.
    fn keep(&mut self, id: u32) {
        let request = &self.requests[&id];
        for sector in request.sector..request.sector + request.sectors {
            let may = &mut self.may[sector];
            if let Some(at) = may.iter().position(|request| *request == id) {
                may.drain(..at);
                self.changed.push(sector);
            }
        }
    }

    /// Whether something in the sector is durable.
    pub fn has_durable(&self, sector: usize) -> bool {
        self.may[sector][0] != 0
    }

    /// Which of the requests that `sector` may have is there: 0 is none.
    ///
    /// # Errors
    /// What is there instead.
    pub fn judge(&self, sector: usize, found: &Found) -> Result<u32, String> {
        let zeros = Found::Data(vec![0; SECTOR]);
        let mut may = self.may[sector].iter().rev().copied();
        let is = |id: &u32| match (id, self.requests.get(id).map(|it| it.kind)) {
            // The page cache writes back what was there, too.
            (0, _) | (_, None) => *found == Found::Untouched || *found == zeros,
            (_, Some(Kind::Discard)) => true,
            (_, Some(Kind::Zeroes)) => *found == zeros,
            (_, Some(Kind::Write)) => {
                matches!(found, Found::Data(data) if *data == content(sector, *id))
            }
        };
        may.find(is).ok_or_else(|| {
            let found = match found {
                Found::Data(data) => format!("{:x?}…", &data[..16]),
                other => format!("{other:?}"),
            };
            let may = &self.may[sector];
            format!("sector {sector}: {found}, but request {may:?} has to be there")
        })
    }

    /// Sectors that were answered and not flushed since, each with the request.
    pub fn unflushed(&self) -> impl Iterator<Item = (usize, u32)> {
        self.unflushed.iter().flat_map(|id| {
            let request = &self.requests[id];
            (request.sector..request.sector + request.sectors).map(|sector| (sector, *id))
        })
    }

    /// Sectors that may have something else than when this was called last.
    pub fn take_changed(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.changed)
    }
}

#[test]
fn a_flush_covers_what_was_answered_before_it() {
    let submit = |id, sector| Step::Submit {
        id,
        kind: Kind::Write,
        sector,
        sectors: 2,
    };
    let mut disk = Durable::new(8, false);
    let steps = [submit(1, 0), submit(2, 4), Step::Done { id: 1 }];
    steps.into_iter().for_each(|step| disk.step(step));
    disk.step(Step::Flush { id: 3 });
    disk.step(Step::Done { id: 2 });
    assert_eq!(
        disk.judge(0, &Found::Untouched),
        Ok(0),
        "not before the answer"
    );
    disk.step(Step::Done { id: 3 });
    disk.judge(0, &Found::Untouched).unwrap_err();
    assert_eq!(disk.judge(1, &Found::Data(content(1, 1))), Ok(1));
    disk.judge(1, &Found::Data(content(0, 1))).unwrap_err();
    assert_eq!(disk.judge(4, &Found::Untouched), Ok(0), "answered too late");
    disk.step(submit(4, 0));
    assert_eq!(disk.judge(0, &Found::Data(content(0, 4))), Ok(4));
    assert_eq!(disk.judge(0, &Found::Data(content(0, 1))), Ok(1));
    let cache = |through| Step::Cache { through };
    for step in [submit(7, 3), Step::Flush { id: 8 }, Step::Done { id: 9 }] {
        assert_eq!(step.to_string().parse(), Ok(step));
    }
    assert_eq!("Cache 1".parse(), Ok(cache(true)));
    assert_eq!(cache(false).to_string().parse(), Ok(cache(false)));
}

#[test]
fn a_write_is_durable_at_once_if_the_cache_was_off_all_the_time() {
    let submit = |id, sector| Step::Submit {
        id,
        kind: Kind::Write,
        sector,
        sectors: 1,
    };
    let cache = |through| Step::Cache { through };
    let mut disk = Durable::new(8, false);
    for step in [
        // Answered before the cache was off, and after it.
        submit(1, 1),
        submit(2, 2),
        Step::Done { id: 1 },
        cache(true),
        Step::Done { id: 2 },
        // Off all the time, and on again before the answer.
        submit(3, 3),
        submit(4, 4),
        submit(5, 5),
        Step::Done { id: 3 },
        cache(false),
        Step::Done { id: 4 },
        cache(true),
        Step::Done { id: 5 },
    ] {
        disk.step(step);
    }
    let durable = [1, 2, 3, 4, 5].map(|sector| disk.has_durable(sector));
    assert_eq!(durable, [false, false, true, false, false]);
    disk.step(Step::Flush { id: 6 });
    disk.step(Step::Done { id: 6 });
    assert!((1..6).all(|sector| disk.has_durable(sector)));
}
