//! One JSON object, read field by field: every error names its field, no field appears twice, and what
//! nobody took is refused by name. Knows JSON types; not what the fields mean.

use super::echo;
use super::event::{Code, Refusal};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// The fields of an object that haven't been taken yet.
#[derive(Debug)]
pub(super) struct Fields {
    /// `""` for the message itself, else the path of a nested object with its trailing dot: `messages[2].`
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The object that `payload` is.
    pub(super) fn parse(payload: &[u8]) -> Result<Self, Refusal> {
        let text = std::str::from_utf8(payload).map_err(|e| {
            Refusal::new(
                Code::Invalid,
                format!("the payload is not valid UTF-8 at byte {}", e.valid_up_to()),
            )
        })?;
        // serde_json's own messages repeat input only as far as our visitor does, which echoes bounded.
        let Strict(value) = serde_json::from_str(text).map_err(|e| {
            Refusal::new(Code::Invalid, format!("the payload is not valid JSON: {e}"))
        })?;
        Self::of("", value)
            .map_err(|_| Refusal::new(Code::Invalid, "the payload is not a JSON object".into()))
    }

    /// The object that `value`, found at `path`, is.
    pub(super) fn of(path: &str, value: Value) -> Result<Self, Refusal> {
        match value {
            Value::Object(map) => {
                let path = if path.is_empty() {
                    String::new()
                } else {
                    format!("{path}.")
                };
                Ok(Self { path, map })
            }
            other => Err(wrong(path, "an object", &other)),
        }
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name)
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.at(name), "a string", &other)),
        }
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(&self.at(name), "true or false", &other)),
        }
    }

    pub(super) fn whole(&mut self, name: &str) -> Result<Option<u64>, Refusal> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let n = value.as_u64();
        n.map(Some)
            .ok_or_else(|| wrong(&self.at(name), "a whole number", &value))
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Refusal> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let x = value.as_f64();
        x.map(|x| Some(x as f32))
            .ok_or_else(|| wrong(&self.at(name), "a number", &value))
    }

    /// Refuses the first field that nobody took; call it when all known ones are known by name.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        match self.map.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let field = format!("{}{}", self.path, echo(name));
                let reason = format!("is unknown; known are {}", known.join(", "));
                Err(Refusal::field(&field, &reason))
            }
        }
    }

    /// The full path of a field, for error messages.
    pub(super) fn at(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }
}

/// The refusal of a value of the wrong type.
pub(super) fn wrong(field: &str, expected: &str, found: &Value) -> Refusal {
    let found = match found {
        Value::Null => "null (leave the field out instead)",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "another kind of number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    Refusal::field(field, &format!("must be {expected}, not {found}"))
}

/// A JSON value without repeated keys: which of two would count is nobody's guess.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((key, Strict(value))) = entries.next_entry::<String, Strict>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!(
                    "the field `{}` appears twice",
                    echo(&key)
                )));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
