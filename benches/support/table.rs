//! Tables of docs/performance.md, of which some rows are measured and the others stay.

use crate::chart::{self, Bar};
use crate::turns;

/// Pairs that are enough for the chart, even when these rows have more.
const ENOUGH: usize = 5;

/// A table between the marks of `name`, and its chart.
pub(crate) struct Table<'a> {
    pub(crate) name: &'a str,
    /// The first two lines.
    pub(crate) head: &'a str,
    /// Of the chart.
    pub(crate) title: &'a str,
    /// The chart has rows with as many pairs: the others say what was seen in passing.
    pub(crate) pairs: usize,
}

/// What is at the end of each row.
struct Measured<'a> {
    ratio: f64,
    range: (f64, f64),
    pairs: usize,
    distance: &'a str,
}

impl Table<'_> {
    /// Puts rows into the table, in the place of those for the same load. `rank` says of a row's
    /// cells what load it is and where that stands; `None` of what is in the table no more. `bar`
    /// says the panel and the name that it has in the chart.
    pub(crate) fn write<R: Ord>(
        &self,
        new: &[String],
        rank: impl Fn(&[&str]) -> Option<R>,
        bar: impl Fn(&[&str]) -> (String, String),
    ) -> Result<(), String> {
        if new.is_empty() {
            return Ok(());
        }
        let width = cells(self.head.lines().next().unwrap_or_default()).len();
        let rows = merged(&turns::table_in_docs(self.name)?, new, rank);
        let rows: Vec<_> = rows.iter().map(|row| padded(row, width)).collect();
        let bars: Vec<_> = rows.iter().filter_map(|row| self.bar(row, &bar)).collect();
        let table = format!("{}\n{}\n", self.head, rows.join("\n"));
        turns::write_docs(self.name, &table, &chart::svg(self.title, &bars))
    }

    fn bar(&self, row: &str, bar: &impl Fn(&[&str]) -> (String, String)) -> Option<Bar> {
        let cells = cells(row);
        let found = Measured::of(&cells).filter(|found| found.pairs >= self.pairs.min(ENOUGH))?;
        let (panel, label) = bar(&cells);
        Some(Bar {
            panel,
            label: format!("{label} ({})", found.distance),
            ratio: found.ratio,
            range: found.range,
        })
    }
}

/// The `new` rows, and those of `old` for other loads. Of the same load an old row of [`ENOUGH`]
/// pairs stays where there is none for the same distance with as many.
fn merged<R: Ord>(old: &str, new: &[String], rank: impl Fn(&[&str]) -> Option<R>) -> Vec<String> {
    let ranked = |row: &str| Some((rank(&cells(row))?, row.to_owned()));
    let others: Vec<_> = old.lines().filter_map(ranked).collect();
    let mut rows: Vec<_> = new.iter().filter_map(|row| ranked(row)).collect();
    let is_new = |old: &(R, String)| rows.iter().any(|new| new.0 == old.0);
    let beaten = |old: &(R, String)| {
        let mut same = rows.iter().filter(|new| new.0 == old.0);
        !is_firm(&old.1) || same.any(|new| is_firm(&new.1) && distance(&new.1) == distance(&old.1))
    };
    let stay = |old: &(R, String)| !is_new(old) || !beaten(old);
    let kept: Vec<_> = others.into_iter().filter(stay).collect();
    let stands = |new: &(R, String)| {
        let mut same = kept.iter().filter(|old| old.0 == new.0);
        is_firm(&new.1) || !same.any(|old| distance(&old.1) == distance(&new.1))
    };
    rows.retain(stands);
    rows.extend(kept);
    // Those for one load stay in their order.
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Whether a row has pairs enough.
fn is_firm(row: &str) -> bool {
    Measured::of(&cells(row)).is_some_and(|found| found.pairs >= ENOUGH)
}

fn distance(row: &str) -> Option<String> {
    Measured::of(&cells(row)).map(|found| found.distance.to_owned())
}

/// A row from before a column was added has nothing there; what is at its end stays there.
fn padded(row: &str, width: usize) -> String {
    let mut cells = cells(row);
    while (3..width).contains(&cells.len()) {
        cells.insert(cells.len() - 3, "–");
    }
    format!("| {} |", cells.join(" | "))
}

fn cells(row: &str) -> Vec<&str> {
    let row = row.trim().trim_start_matches('|').trim_end_matches('|');
    row.split('|').map(str::trim).collect()
}

impl<'a> Measured<'a> {
    fn of(cells: &[&'a str]) -> Option<Self> {
        let &[.., ratio, pairs, probe] = cells else {
            return None;
        };
        let (ratio, range) = ratio.strip_suffix(')')?.split_once(" (")?;
        let (least, most) = range.split_once('–')?;
        let (distance, _) = probe.split_once(',')?;
        Some(Self {
            ratio: ratio.parse().ok()?,
            range: (least.parse().ok()?, most.parse().ok()?),
            pairs: pairs.parse().ok()?,
            distance,
        })
    }
}
