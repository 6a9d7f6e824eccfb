//! What is said to hold a promise is there: tests by their names, benches, scripts.

use std::collections::BTreeSet;
use std::fs;

use super::root;

/// A file and the names in it that hold a promise, or a script and its words.
fn parts(held: &str) -> (&str, Vec<&str>) {
    let (file, rest) = match held.split_once(':') {
        Some(parts) => parts,
        None => held.split_once(' ').unwrap_or((held, "")),
    };
    (file, rest.split_whitespace().collect())
}

/// As the page shows it.
pub fn shown(held: &str) -> String {
    let (file, names) = parts(held);
    if file.starts_with("scripts/") {
        return format!("`{}`", [&[file], &names[..]].concat().join(" "));
    }
    let names = names.join(", ");
    format!("`{file}` {names}").trim_end().to_owned()
}

/// What is not there, by name.
pub fn missing(held: &str) -> Vec<String> {
    let (file, names) = parts(held);
    let Ok(text) = fs::read_to_string(root().join(file)) else {
        return vec![format!("{file} is not there")];
    };
    let is_there: Box<dyn Fn(&str) -> bool> = match file.split_once('/') {
        Some(("scripts", "fuzz")) => Box::new(|name| {
            let target = format!("fuzz/fuzz_targets/{name}.rs");
            root().join(target).exists()
        }),
        // A script says which words it takes in the comment at its head.
        Some(("scripts", script)) => {
            let usage = format!("# {script} ");
            let said: BTreeSet<_> = text
                .lines()
                .filter_map(|line| line.strip_prefix(&usage))
                .filter_map(|line| line.split_whitespace().next())
                .map(ToOwned::to_owned)
                .collect();
            Box::new(move |name| said.contains(name))
        }
        Some(("benches", _)) => Box::new(move |name| text.contains(&format!("fn {name}("))),
        _ if names.is_empty() => return vec![format!("{file}: no test is named")],
        _ => {
            let tests = tests(&text);
            Box::new(move |name| tests.contains(name))
        }
    };
    let absent = names.iter().filter(|name| !is_there(name));
    absent.map(|name| format!("{file} has no {name}")).collect()
}

/// Tests that a page names between backticks in the last column of a table, and that are nowhere.
pub fn missing_in_table(page: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(page)).expect("the page is there");
    let mut files = Vec::new();
    for dir in ["src", "tests"] {
        super::sources(&root().join(dir), &mut files);
    }
    let read = |file| fs::read_to_string(file).expect("a source");
    let there: BTreeSet<_> = files.iter().flat_map(|file| tests(&read(file))).collect();
    let rows = text.lines().filter(|line| line.starts_with("| "));
    // Of each table, the head and the line below it name none.
    let rows = rows.filter(|row| !row.starts_with("| mistake") && !row.starts_with("| ---"));
    let mut missing = Vec::new();
    for row in rows {
        let column = row.trim_end_matches(['|', ' ']).rsplit('|').next();
        let names: Vec<_> = column
            .unwrap_or(row)
            .split('`')
            .skip(1)
            .step_by(2)
            .collect();
        assert!(!names.is_empty(), "{page} names no test: {row}");
        let absent = names.into_iter().filter(|name| !there.contains(*name));
        missing.extend(absent.map(ToOwned::to_owned));
    }
    missing
}

/// The tests of a source, by `#[test]` and by macros that write it.
fn tests(text: &str) -> BTreeSet<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = BTreeSet::new();
    let mut macros = Vec::new();
    let mut defined = None;
    for (number, line) in lines.iter().enumerate() {
        if let Some(name) = line.trim().strip_prefix("macro_rules! ") {
            defined = name.split_whitespace().next();
        }
        if line.contains("#[test]") {
            macros.extend(defined);
            let named = lines[number..].iter().find(|line| line.contains("fn "));
            found.extend(named.and_then(|line| after_fn(line)));
        }
        // At the end of an item; what a macro writes is further in.
        if line.trim_start() == "}" && !line.starts_with("     ") {
            defined = None;
        }
    }
    for name in macros {
        found.extend(arguments(&lines, name));
    }
    found
}

fn after_fn(line: &str) -> Option<String> {
    let rest = line.split("fn ").nth(1)?;
    word(rest)
}

/// The identifier at the start of a text.
fn word(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let word = &text[..end.unwrap_or(text.len())];
    (!word.is_empty()).then(|| word.to_owned())
}

/// The identifiers at the starts of the lines that a macro is given.
fn arguments(lines: &[&str], name: &str) -> BTreeSet<String> {
    let calls = [format!("{name}! {{"), format!("{name}!(")];
    let mut found = BTreeSet::new();
    let mut end = None;
    for line in lines.iter().map(|line| line.trim()) {
        match end {
            Some(closing) if line.starts_with(closing) => end = None,
            Some(_) => found.extend(word(line)),
            None if line == calls[0] => end = Some('}'),
            None => {
                let Some(rest) = line.strip_prefix(&calls[1]) else {
                    continue;
                };
                found.extend(word(rest));
                end = (!rest.contains(')')).then_some(')');
            }
        }
    }
    found
}
