//! A TOML file as tables of keys, each value with the line it stands on.
//!
//! Only the shape is checked here: `[engine]` once, `[[net]]`, `[[blk]]`, `[[group]]` and
//! `[[switch]]` any number of times, nothing else. What the keys may be is up to the structures in
//! `validate`.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Place, Problem};
use super::keyvalue::{Entry, Kind, Scalar, Table};

const TABLES: &str = "engine, net, blk, group, switch";

/// Reads and takes apart one file; the tables are in the order of the file.
pub(super) fn read(path: &Path) -> Result<Vec<Table>, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(source) => Err(ConfigError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Takes apart the text of a file; `path` is for error messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Table>, ConfigError> {
    let source = Source { path, text };
    let root = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        place: source.place(error.span().unwrap_or_default()),
        message: error.message().split('\n').collect::<Vec<_>>().join("; "),
    })?;
    let mut tables: Vec<(usize, Table)> = Vec::new();
    let mut add = |kind, span: Range<usize>, keys: &DeTable<'_>| {
        tables.push((span.start, source.table(kind, span, keys)));
    };
    for (key, value) in root.get_ref() {
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("engine", DeValue::Table(keys)) => add(Kind::Engine, key.span(), keys),
            ("engine", _) => {
                return Err(source.refused(key.get_ref(), value, "a table, [engine]"));
            }
            ("net", _) => source.tables(Kind::Net, value, &mut add)?,
            ("blk", _) => source.tables(Kind::Blk, value, &mut add)?,
            ("group", _) => source.tables(Kind::Group, value, &mut add)?,
            ("switch", _) => source.tables(Kind::Switch, value, &mut add)?,
            (name, value) => {
                let place = source.place(key.span());
                let problem = Problem::UnknownKind {
                    what: if value.is_table() || value.is_array() {
                        "table"
                    } else {
                        "key"
                    },
                    given: name.to_owned(),
                    known: TABLES,
                };
                return Err(ConfigError::Device {
                    place: place.to_string(),
                    problem: Box::new(problem),
                });
            }
        }
    }
    tables.sort_by_key(|(start, _)| *start);
    Ok(tables.into_iter().map(|(_, table)| table).collect())
}

/// The file, to find lines and the written form of values in.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.as_bytes().iter().take(span.start);
        let line = before.filter(|byte| **byte == b'\n').count() + 1;
        Place::File {
            path: self.path.to_owned(),
            line,
        }
    }

    /// The first line of a value as it stands in the file.
    fn written(&self, span: Range<usize>) -> String {
        let value = self.text.get(span).unwrap_or_default();
        value.lines().next().unwrap_or_default().to_owned()
    }

    fn table(&self, kind: Kind, span: Range<usize>, keys: &DeTable<'_>) -> Table {
        let mut entries: Vec<(usize, Entry)> = keys
            .iter()
            .map(|(key, value)| {
                let entry = Entry {
                    key: key.get_ref().to_string(),
                    value: scalar(value.get_ref()),
                    written: self.written(value.span()),
                    place: self.place(key.span()),
                };
                (key.span().start, entry)
            })
            .collect();
        // In the order of the file, so that the first mistake is the one that is reported.
        entries.sort_by_key(|(start, _)| *start);
        let entries = entries.into_iter().map(|(_, entry)| entry).collect();
        Table {
            kind,
            name: String::new(),
            place: self.place(span),
            entries,
        }
    }

    /// Calls `add` for each table in the list of tables of a kind.
    fn tables(
        &self,
        kind: Kind,
        value: &Spanned<DeValue<'_>>,
        add: &mut dyn FnMut(Kind, Range<usize>, &DeTable<'_>),
    ) -> Result<(), ConfigError> {
        let key = kind.noun();
        let expected = format!("tables, [[{key}]]");
        let DeValue::Array(items) = value.get_ref() else {
            return Err(self.refused(key, value, &expected));
        };
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(keys) => add(kind, item.span(), keys),
                _ => return Err(self.refused(key, item, &expected)),
            }
        }
        Ok(())
    }

    fn refused(&self, key: &str, value: &Spanned<DeValue<'_>>, expected: &str) -> ConfigError {
        ConfigError::Value {
            place: format!("{}: ", self.place(value.span())),
            key: key.to_owned(),
            value: self.written(value.span()),
            problem: Box::new(Problem::Expected(expected.to_owned())),
        }
    }
}

fn scalar(value: &DeValue<'_>) -> Scalar {
    match value {
        DeValue::String(text) => Scalar::Text(text.to_string()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Scalar::Integer(number),
            Err(_) => Scalar::Other,
        },
        DeValue::Boolean(truth) => Scalar::Bool(*truth),
        DeValue::Array(items) => {
            Scalar::List(items.iter().map(|item| scalar(item.get_ref())).collect())
        }
        DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Table(_) => Scalar::Other,
    }
}
