//! Which section of VIRTIO 1.3 is named where.

use std::collections::{BTreeMap, BTreeSet};

use super::{root, sources};

/// The places that name a section.
#[derive(Default)]
pub struct Places {
    pub code: BTreeSet<String>,
    pub tests: BTreeSet<String>,
}

/// The number of a section.
pub type Section = Vec<u32>;

/// The section numbers that a line names.
fn named(line: &str) -> Vec<Section> {
    line.split('§')
        .skip(1)
        .filter_map(|rest| {
            let number: String = rest
                .chars()
                .take_while(|c| c.is_ascii_digit() || *c == '.')
                .collect();
            let parts: Result<Vec<u32>, _> = number
                .trim_end_matches('.')
                .split('.')
                .map(str::parse)
                .collect();
            parts.ok()
        })
        .collect()
}

/// The name of the item that a line declares.
fn item(line: &str) -> Option<String> {
    let words: Vec<&str> = line
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect();
    let kinds = ["fn", "struct", "enum", "trait", "const", "mod"];
    let at = words.iter().position(|word| kinds.contains(word))?;
    let line = line.trim_start();
    let declares = [
        "pub", "fn", "struct", "enum", "trait", "const", "mod", "unsafe",
    ]
    .iter()
    .any(|head| line.starts_with(head));
    (declares && words.get(at + 1).is_some_and(|word| *word != "fn"))
        .then(|| words[at + 1].to_owned())
}

/// Where line `number` is: the item that it documents or lies in.
fn place(lines: &[&str], number: usize) -> Option<String> {
    let line = lines[number].trim_start();
    if line.starts_with("//!") {
        return None;
    }
    if line.starts_with("///") {
        // The line that the comment is on: an item, or a field or variant of the one before.
        let on = lines[number..].iter().find(|line| {
            let line = line.trim_start();
            !line.starts_with("///") && !line.starts_with("#[")
        });
        if let Some(item) = on.and_then(|line| item(line)) {
            return Some(item);
        }
    }
    lines[..=number].iter().rev().find_map(|line| item(line))
}

/// All sections that code or tests name, in their order.
pub fn all() -> BTreeMap<Section, Places> {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    sources(&root().join("tests"), &mut files);
    let mut all: BTreeMap<Section, Places> = BTreeMap::new();
    for file in files {
        let name = file.strip_prefix(root()).expect("below the root");
        let name = name.display().to_string();
        // What tests are made of is neither; this program names sections in its own comments.
        let apart = ["tests/support/", "tests/conformance"];
        if apart.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let text = std::fs::read_to_string(&file).expect("a source file");
        let lines: Vec<&str> = text.lines().collect();
        let in_tests = lines
            .iter()
            .position(|line| line.trim() == "mod tests {")
            .unwrap_or(usize::MAX);
        let test_file = name.starts_with("tests/") || name.contains("tests");
        for (number, line) in lines.iter().enumerate() {
            for section in named(line) {
                let entry = match place(&lines, number) {
                    Some(item) => format!("`{name}` {item}"),
                    None => format!("`{name}`"),
                };
                let places = all.entry(section).or_default();
                if test_file || number >= in_tests {
                    places.tests.insert(entry);
                } else {
                    places.code.insert(entry);
                }
            }
        }
    }
    all
}
