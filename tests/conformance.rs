//! docs/conformance.md: which section of VIRTIO 1.3 is followed where, and tested where; and which
//! tests and benches hold the project to what it promises.
//!
//! The page is made from the sources: every place that names a section (`§2.7.13`) is listed, code
//! and tests apart (`sections`), and every promise with what holds it (`promises`, checked by
//! `evidence`). A section with code and without a test fails the test here, and so does a promise
//! whose tests are not there, and a page that is not what it would be made of now;
//! `UPDATE_DOCS=1 cargo test --features testing --test conformance` writes it.

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the tests beside them")]
mod conformance {
    mod evidence;
    mod promises;
    mod sections;

    use std::fmt::Write as _;
    use std::path::{Path, PathBuf};

    use sections::{Places, Section};

    const HEAD: &str = "\
# Conformance

Made from the sources by `UPDATE_DOCS=1 cargo test --features testing --test conformance`; a test
holds that it is up to date.

## Section of VIRTIO 1.3 → code → test

The comments that name a section. Every section that has code has a test.

| section | code | tests |
| --- | --- | --- |
";

    const PROMISES: &str = "
## Promise → test or bench

What holds the project to what it promises (tests/conformance/promises.rs). Each name is one of a
test that is there, or of a bench or script to be run by hand.
";

    pub(crate) fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    /// The sources below `dir`.
    pub(crate) fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    fn page() -> String {
        let mut page = HEAD.to_owned();
        for (section, Places { code, tests }) in sections::all() {
            let list = |places: std::collections::BTreeSet<String>| {
                places.into_iter().collect::<Vec<_>>().join("; ")
            };
            let _ = writeln!(
                page,
                "| {} | {} | {} |",
                number(&section),
                list(code),
                list(tests)
            );
        }
        page += PROMISES;
        for (subject, promises) in promises::ALL {
            let _ = write!(
                page,
                "\n### {subject}\n\n| promise | held by |\n| --- | --- |\n"
            );
            for (promise, held_by) in *promises {
                let held_by: Vec<_> = held_by.iter().map(|held| evidence::shown(held)).collect();
                let _ = writeln!(page, "| {promise} | {} |", held_by.join("; "));
            }
        }
        page
    }

    fn number(section: &Section) -> String {
        let parts: Vec<_> = section.iter().map(u32::to_string).collect();
        parts.join(".")
    }

    #[test]
    fn every_section_with_code_has_a_test() {
        let untested: Vec<_> = sections::all()
            .into_iter()
            .filter(|(_, places)| !places.code.is_empty() && places.tests.is_empty())
            .map(|(section, places)| format!("§{}: {:?}", number(&section), places.code))
            .collect();
        assert!(
            untested.is_empty(),
            "name these sections at the tests of them:\n{}",
            untested.join("\n")
        );
    }

    #[test]
    fn every_promise_is_held_by_what_is_there() {
        let promises = promises::ALL.iter().flat_map(|(_, promises)| *promises);
        let wrong: Vec<_> = promises
            .flat_map(|(promise, held_by)| {
                let nothing = held_by
                    .is_empty()
                    .then(|| format!("nothing holds it: {promise}"));
                nothing
                    .into_iter()
                    .chain(held_by.iter().flat_map(|held| evidence::missing(held)))
            })
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn tests_that_the_list_of_defects_names_are_there() {
        let missing = evidence::missing_in_table("docs/defects.md");
        assert!(missing.is_empty(), "docs/defects.md: no test {missing:?}");
    }

    #[test]
    fn the_page_is_what_the_sources_say() {
        let path = root().join("docs/conformance.md");
        let wanted = page();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &wanted).expect("docs can be written");
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == wanted,
            "docs/conformance.md is out of date: \
             UPDATE_DOCS=1 cargo test --features testing --test conformance"
        );
    }
}
