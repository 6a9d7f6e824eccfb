//! Processor cores: which are online, which memory they are near to, and pinning a thread to one.
//!
//! A core is named by its number in `/sys/devices/system/cpu`. Which queue goes to which core is
//! not decided here: `engine` does that with what this module reads.

use std::fs;
use std::io;
use std::path::Path;

/// Words of the affinity mask that the kernel is given: room for 4096 cores on 64-bit machines.
const MASK_WORDS: usize = 64;

/// Cores that one word of the mask holds.
const WORD_BITS: usize = usize::BITS as usize;

/// Where the kernel describes cores.
const CPU_DIR: &str = "/sys/devices/system/cpu";

/// Why a core could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The core is not there, or is switched off.
    #[error("core {core} is not online: cores {online} are")]
    NotOnline {
        /// The core asked for.
        core: usize,
        /// The kernel's list of those that are online.
        online: String,
    },
    /// The core is online, but this process may not run on it (cpuset, container).
    #[error("thread can't be pinned to core {core}")]
    Pin {
        /// The core asked for.
        core: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A core list is not of the form `0-3,8`.
    #[error("core list {list:?} is malformed at {part:?}")]
    List {
        /// The whole list.
        list: String,
        /// The part that is neither a number nor a range.
        part: String,
    },
    /// The kernel's description of the cores could not be read.
    #[error("{path} can't be read")]
    Sysfs {
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The numbers of all cores that are online, ascending.
///
/// # Errors
/// When the kernel's list can't be read or understood.
pub fn online_cores() -> Result<Vec<usize>, CpuError> {
    parse_core_list(&online_list()?)
}

/// Whether a core is there and online. A machine that can't be asked has no cores.
#[must_use]
pub fn core_exists(core: usize) -> bool {
    online_cores().is_ok_and(|cores| cores.contains(&core))
}

/// The NUMA node whose memory is nearest to a core; `None` where the kernel does not say.
#[must_use]
pub fn numa_node(core: usize) -> Option<usize> {
    node_in(&Path::new(CPU_DIR).join(format!("cpu{core}")))
}

/// Pins the calling thread to one core; threads it starts afterwards inherit that.
///
/// # Errors
/// When the core is not online, or the process is not allowed on it.
pub fn pin_to_core(core: usize) -> Result<(), CpuError> {
    if !online_cores()?.contains(&core) || core >= MASK_WORDS * WORD_BITS {
        return Err(CpuError::NotOnline {
            core,
            online: online_list()?,
        });
    }
    let mut mask = [0; MASK_WORDS];
    mask[core / WORD_BITS] = 1 << (core % WORD_BITS);
    set_affinity(&mask).map_err(|source| CpuError::Pin { core, source })
}

/// The cores that the calling thread may run on, ascending.
///
/// # Errors
/// What the kernel says, for instance when it knows more cores than the mask has bits.
pub fn allowed_cores() -> io::Result<Vec<usize>> {
    let mask = affinity()?;
    let is_set = |core: &usize| mask[core / WORD_BITS] & (1 << (core % WORD_BITS)) != 0;
    Ok((0..MASK_WORDS * WORD_BITS).filter(is_set).collect())
}

/// Reads a core list in the kernel's form: numbers and ranges between commas, `0-3,8`.
///
/// # Errors
/// When a part is neither, when a range runs backwards, or names more cores than a mask can hold.
pub fn parse_core_list(list: &str) -> Result<Vec<usize>, CpuError> {
    let mut cores = Vec::new();
    for part in list.trim().split(',') {
        let malformed = || CpuError::List {
            list: list.trim().to_owned(),
            part: part.to_owned(),
        };
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<usize>().map_err(|_| malformed());
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= MASK_WORDS * WORD_BITS {
            return Err(malformed());
        }
        cores.extend(first..=last);
    }
    cores.sort_unstable();
    cores.dedup();
    Ok(cores)
}

/// The kernel's own text for the cores that are online.
fn online_list() -> Result<String, CpuError> {
    let path = format!("{CPU_DIR}/online");
    match fs::read_to_string(&path) {
        Ok(list) => Ok(list.trim().to_owned()),
        Err(source) => Err(CpuError::Sysfs { path, source }),
    }
}

/// A core's directory holds a link `nodeN` to its node, on kernels built with NUMA.
fn node_in(core_dir: &Path) -> Option<usize> {
    fs::read_dir(core_dir).ok()?.flatten().find_map(|entry| {
        entry
            .file_name()
            .to_str()?
            .strip_prefix("node")?
            .parse()
            .ok()
    })
}

fn set_affinity(mask: &[usize; MASK_WORDS]) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of_val(mask)` bytes from the pointer, which is the whole of a
    // live array; pid 0 is the calling thread. `usize` is the kernel's `unsigned long`, the word
    // its masks are made of. A size other than that of `cpu_set_t` is allowed by the call.
    let status = unsafe { libc::sched_setaffinity(0, size_of_val(mask), mask.as_ptr().cast()) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn affinity() -> io::Result<[usize; MASK_WORDS]> {
    let mut mask = [0; MASK_WORDS];
    // SAFETY: the kernel writes at most `size_of_val(&mask)` bytes to the pointer, which is the
    // whole of a live array that is borrowed for nothing else; any bits are valid words.
    let status =
        unsafe { libc::sched_getaffinity(0, size_of_val(&mask), mask.as_mut_ptr().cast()) };
    if status >= 0 {
        Ok(mask)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn lists_of_numbers_and_ranges_are_read() {
        assert_eq!(parse_core_list("0\n").unwrap(), [0]);
        assert_eq!(parse_core_list("0-3,8").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_core_list("5,1-2,2").unwrap(), [1, 2, 5]);
    }

    #[test]
    fn malformed_lists_are_refused_with_the_part_that_is_wrong() {
        for (list, wrong) in [
            ("", ""),
            ("1,,2", ""),
            ("3-1", "3-1"),
            ("1-", "1-"),
            ("-1", "-1"),
            ("0,x", "x"),
            ("0-99999999999", "0-99999999999"),
            ("4096", "4096"),
        ] {
            match parse_core_list(list) {
                Err(CpuError::List { part, .. }) => assert_eq!(part, wrong, "in {list:?}"),
                other => panic!("{list:?} was read as {other:?}"),
            }
        }
    }

    #[test]
    fn a_pinned_thread_may_run_on_its_core_only() {
        for core in allowed_cores().unwrap() {
            let allowed = thread::spawn(move || {
                pin_to_core(core).unwrap();
                allowed_cores().unwrap()
            });
            assert_eq!(allowed.join().unwrap(), [core]);
        }
    }

    #[test]
    fn pinning_one_thread_leaves_the_others_alone() {
        let before = allowed_cores().unwrap();
        thread::spawn(|| pin_to_core(allowed_cores().unwrap()[0]).unwrap())
            .join()
            .unwrap();
        assert_eq!(allowed_cores().unwrap(), before);
    }

    #[test]
    fn a_core_that_is_not_there_is_named_in_the_error() {
        for core in [4095, 4096, usize::MAX] {
            let message = pin_to_core(core).unwrap_err().to_string();
            assert!(message.starts_with(&format!("core {core} is not online: cores 0")));
            assert!(!core_exists(core));
        }
        assert!(core_exists(online_cores().unwrap()[0]));
    }

    #[test]
    fn the_node_of_a_core_is_the_number_in_its_link() {
        let dir = std::env::temp_dir().join(format!("vringd-cpu-test-{}", std::process::id()));
        let core = dir.join("cpu7");
        fs::create_dir_all(core.join("topology")).unwrap();
        assert_eq!(node_in(&core), None);
        fs::create_dir(core.join("node12")).unwrap();
        assert_eq!(node_in(&core), Some(12));
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(numa_node(4095), None);
    }
}
