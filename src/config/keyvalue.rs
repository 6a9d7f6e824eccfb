//! One table of keys, from the command line or from a file, and serde's way into it.
//!
//! A `key=value,key=value` list and a TOML table both become a [`Table`] of [`Entry`]s; one serde
//! deserializer then fills the same structures from either, so that the keys of the two can't
//! drift apart, and an error always knows the key, the value as written, and the line.

use std::fmt;

use serde::de::{self, DeserializeSeed, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::error::{ConfigError, Place, Problem};
use super::size::parse_digits;

const NUMBER: &str = "a whole number";

/// Which table this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Engine,
    Net,
    Blk,
    Group,
    Switch,
}

impl Kind {
    pub(super) fn noun(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Net => "net",
            Self::Blk => "blk",
            Self::Group => "group",
            Self::Switch => "switch",
        }
    }
}

/// A value before its key gives it a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scalar {
    /// From the command line: text that the key may read as a number, a truth value or a list.
    Untyped(String),
    /// A string of the file.
    Text(String),
    /// An integer of the file.
    Integer(i64),
    /// A truth value of the file.
    Bool(bool),
    /// A list of the file.
    List(Vec<Scalar>),
    /// What no key takes: floats, dates, tables, integers beyond 64 bits.
    Other,
}

/// One key with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Scalar,
    /// The value for error messages.
    pub(super) written: String,
    pub(super) place: Place,
}

/// The keys of one device or of the engine.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) kind: Kind,
    /// The device's name; for a device without one, the default that it is going to have.
    pub(super) name: String,
    /// Of the table's head.
    pub(super) place: Place,
    pub(super) entries: Vec<Entry>,
}

impl Table {
    /// No keys, on the command line.
    pub(super) fn empty(kind: Kind) -> Self {
        Self {
            kind,
            name: String::new(),
            place: Place::Flag,
            entries: Vec::new(),
        }
    }

    /// Splits a `key=value,key=value` list; `,,` stands for a comma inside a value.
    pub(super) fn from_list(kind: Kind, list: &str) -> Result<Self, ConfigError> {
        let mut table = Self::empty(kind);
        for item in split_items(list) {
            let Some((key, value)) = item.split_once('=') else {
                // No entry to name it by: the message has the whole list.
                return Err(ConfigError::Device {
                    place: format!("--{} {list:?}", kind.noun()),
                    problem: Box::new(Problem::NotKeyValue(item)),
                });
            };
            table.entries.push(Entry::from_flag(key, value));
        }
        Ok(table)
    }

    /// The value of `name`, if it is there and text.
    pub(super) fn given_name(&self) -> Option<&str> {
        match &self.entry("name")?.value {
            Scalar::Untyped(text) | Scalar::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// Fills a serde structure from the entries.
    pub(super) fn deserialize<'a, T: de::Deserialize<'a>>(&'a self) -> Result<T, ConfigError> {
        for (index, entry) in self.entries.iter().enumerate() {
            if self.entries[..index]
                .iter()
                .any(|earlier| earlier.key == entry.key)
            {
                return Err(self.entry_error(entry, Problem::Repeated));
            }
        }
        T::deserialize(TableDeserializer {
            entries: &self.entries,
            next: 0,
        })
        .map_err(|fault| match fault.entry {
            Some(index) => self.entry_error(&self.entries[index], fault.problem),
            None => self.error(fault.problem),
        })
    }

    /// The table as a whole is refused.
    pub(super) fn error(&self, problem: Problem) -> ConfigError {
        ConfigError::Device {
            place: self.label(&self.place),
            problem: Box::new(problem),
        }
    }

    /// A key of the table is refused; without such an entry (a default), the table is.
    pub(super) fn key_error(&self, key: &str, problem: Problem) -> ConfigError {
        match self.entry(key) {
            Some(entry) => self.entry_error(entry, problem),
            None => self.error(problem),
        }
    }

    fn entry_error(&self, entry: &Entry, problem: Problem) -> ConfigError {
        if let Some(flag) = engine_flag(self.kind, entry) {
            let value = match &entry.value {
                Scalar::Untyped(text) => text.clone(),
                _ => entry.written.clone(),
            };
            return ConfigError::Flag {
                flag,
                value,
                problem: Box::new(problem),
            };
        }
        ConfigError::Value {
            place: format!("{}: ", self.label(&entry.place)),
            key: entry.key.escape_debug().to_string(),
            value: entry.written.clone(),
            problem: Box::new(problem),
        }
    }

    /// The device, for "already used by".
    pub(super) fn described(&self) -> String {
        if self.name.is_empty() {
            return format!("{} \"\"", self.kind.noun());
        }
        // A refused name may have anything in it; the message has one line.
        format!("{} {}", self.kind.noun(), self.name.escape_debug())
    }

    fn label(&self, place: &Place) -> String {
        match (self.kind, place) {
            (Kind::Engine, place) => format!("{place}: engine"),
            (_, Place::Flag) => format!("--{}", self.described()),
            (_, place) => format!("{place}: {}", self.described()),
        }
    }
}

impl Entry {
    /// A key whose value was written on the command line.
    pub(super) fn from_flag(key: &str, value: &str) -> Self {
        Self {
            key: key.to_owned(),
            value: Scalar::Untyped(value.to_owned()),
            written: format!("{value:?}"),
            place: Place::Flag,
        }
    }
}

/// The flag that sets a key of the engine.
fn engine_flag(kind: Kind, entry: &Entry) -> Option<&'static str> {
    if kind != Kind::Engine || entry.place != Place::Flag {
        return None;
    }
    match entry.key.as_str() {
        "cores" => Some("--core"),
        "idle" => Some("--idle"),
        "placement" => Some("--placement"),
        "stop_timeout" => Some("--stop-timeout"),
        _ => None,
    }
}

/// Splits at single commas and makes doubled ones single.
fn split_items(list: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(character) = chars.next() {
        if character == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(character);
        }
    }
    items
}

/// A serde error that remembers which entry it came from.
#[derive(Debug)]
struct Fault {
    entry: Option<usize>,
    problem: Problem,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problem.fmt(f)
    }
}

impl std::error::Error for Fault {}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Self {
        Self {
            entry: None,
            problem,
        }
    }
}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Problem::Malformed(message.to_string()).into()
    }

    fn unknown_field(_field: &str, expected: &'static [&'static str]) -> Self {
        Problem::UnknownKey(expected.join(", ")).into()
    }
}

/// The entries as a serde map.
struct TableDeserializer<'a> {
    entries: &'a [Entry],
    next: usize,
}

impl<'de> de::Deserializer<'de> for TableDeserializer<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for TableDeserializer<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let Some(entry) = self.entries.get(self.next) else {
            return Ok(None);
        };
        let key: de::value::StrDeserializer<'_, Fault> = entry.key.as_str().into_deserializer();
        seed.deserialize(key)
            .map(Some)
            .map_err(|fault| self.at_current(fault))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let value = ValueDeserializer {
            value: &self.entries[self.next].value,
            lenient: false,
        };
        let result = seed
            .deserialize(value)
            .map_err(|fault| self.at_current(fault));
        self.next += 1;
        result
    }
}

impl TableDeserializer<'_> {
    fn at_current(&self, fault: Fault) -> Fault {
        Fault {
            entry: Some(self.next),
            ..fault
        }
    }
}

/// One value, read as the type that the structure asks for.
struct ValueDeserializer<'a> {
    value: &'a Scalar,
    /// Text may also be written as a number. A newtype structure asks for it.
    lenient: bool,
}

impl ValueDeserializer<'_> {
    fn number(&self) -> Result<u64, Problem> {
        match self.value {
            Scalar::Untyped(text) => parse_digits(text, NUMBER),
            Scalar::Integer(number) => {
                u64::try_from(*number).map_err(|_| Problem::Expected(NUMBER.to_owned()))
            }
            _ => Err(Problem::Expected(NUMBER.to_owned())),
        }
    }

    fn truth(&self) -> Result<bool, Problem> {
        match self.value {
            Scalar::Bool(truth) => Ok(*truth),
            Scalar::Untyped(text) if text == "true" || text == "on" => Ok(true),
            Scalar::Untyped(text) if text == "false" || text == "off" => Ok(false),
            _ => Err(Problem::Expected("true or false".to_owned())),
        }
    }

    fn text(&self) -> Result<String, Problem> {
        match self.value {
            Scalar::Untyped(text) | Scalar::Text(text) => Ok(text.clone()),
            Scalar::Integer(number) if self.lenient => Ok(number.to_string()),
            _ => Err(Problem::Expected("a string".to_owned())),
        }
    }

    fn list(&self) -> Result<Vec<Scalar>, Problem> {
        match self.value {
            Scalar::List(items) => Ok(items.clone()),
            Scalar::Untyped(text) => Ok(text
                .split([',', '+'])
                .map(|item| Scalar::Untyped(item.to_owned()))
                .collect()),
            _ => Err(Problem::Expected("a list".to_owned())),
        }
    }
}

impl<'de> de::Deserializer<'de> for ValueDeserializer<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_bool(self.truth()?)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_u64(self.number()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(ValueDeserializer {
            lenient: true,
            ..self
        })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_seq(Items {
            items: self.list()?.into_iter(),
        })
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 u8 u16 u32 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

/// The items of a list.
struct Items {
    items: std::vec::IntoIter<Scalar>,
}

impl<'de> de::SeqAccess<'de> for Items {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let Some(item) = self.items.next() else {
            return Ok(None);
        };
        let value = ValueDeserializer {
            value: &item,
            lenient: false,
        };
        seed.deserialize(value).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::split_items;

    #[test]
    fn a_doubled_comma_is_a_comma_of_the_value() {
        for (list, items) in [
            ("a=1,b=2", vec!["a=1", "b=2"]),
            ("path=/a,,b,x=1", vec!["path=/a,b", "x=1"]),
            ("a,,,b", vec!["a,", "b"]),
            (",a", vec!["", "a"]),
            ("", vec![""]),
        ] {
            assert_eq!(split_items(list), items, "{list}");
        }
    }
}
