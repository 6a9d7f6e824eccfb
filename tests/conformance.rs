//! docs/conformance.md: which section of VIRTIO 1.3 is followed where, and tested where.
//!
//! The page is made from the sources: every place that names a section (`§2.7.13`) is listed, code
//! and tests apart. This test fails when the page is not what it would be made of now;
//! `UPDATE_DOCS=1 cargo test --test conformance` writes it.

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fmt::Write as _;
    use std::path::Path;

    const HEAD: &str = "\
# Conformance

Which section of VIRTIO 1.3 is followed where, and tested where. Made from the comments in the
sources by `UPDATE_DOCS=1 cargo test --test conformance`; a test holds that it is up to date. A
section without a test of its own is covered by the tests with real front-ends.

| section | code | tests |
| --- | --- | --- |
";

    /// The places that name a section.
    #[derive(Default)]
    struct Places {
        code: BTreeSet<String>,
        tests: BTreeSet<String>,
    }

    fn sources(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    /// The section numbers that a line names.
    fn sections(line: &str) -> Vec<Vec<u32>> {
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

    fn page() -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        sources(&root.join("src"), &mut files);
        sources(&root.join("tests"), &mut files);
        let mut all: BTreeMap<Vec<u32>, Places> = BTreeMap::new();
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a source file");
            let name = file.strip_prefix(root).expect("below the root");
            let name = name.display().to_string();
            if name == "tests/conformance.rs" {
                continue;
            }
            let lines: Vec<&str> = text.lines().collect();
            let in_tests = lines
                .iter()
                .position(|line| line.trim() == "mod tests {")
                .unwrap_or(usize::MAX);
            let test_file = name.starts_with("tests/") || name.contains("tests");
            for (number, line) in lines.iter().enumerate() {
                for section in sections(line) {
                    let at = place(&lines, number);
                    let entry = match at {
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
        let mut page = HEAD.to_owned();
        let list = |places: &BTreeSet<String>| {
            let all: Vec<_> = places.iter().map(String::as_str).collect();
            all.join("; ")
        };
        for (section, places) in &all {
            let number: Vec<_> = section.iter().map(u32::to_string).collect();
            let (code, tests) = (list(&places.code), list(&places.tests));
            let _ = writeln!(page, "| {} | {code} | {tests} |", number.join("."));
        }
        page
    }

    #[test]
    fn the_page_is_what_the_sources_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/conformance.md");
        let wanted = page();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &wanted).expect("docs can be written");
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == wanted,
            "docs/conformance.md is out of date: UPDATE_DOCS=1 cargo test --test conformance"
        );
    }
}
