//! A folder's texts: the tokenizer, the chat template, the tokens that end an answer, the licence.

use super::config::Ids;
use super::{json, read};
use crate::bundle::Licence;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;
use tokenizers::Tokenizer;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The template's name where there are several.
const DEFAULT: &str = "default";

/// All that a bundle takes from a folder beside the weights.
#[derive(Debug)]
pub struct Texts {
    /// `tokenizer.json` as it is.
    pub tokenizer: String,
    /// In Jinja, if the model can chat.
    pub chat_template: Option<String>,
    /// As written in the vocabulary.
    pub stop_tokens: Vec<String>,
    pub licence: Licence,
    /// Further files of the bundle, by name.
    pub others: Vec<(String, String)>,
}

/// `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
struct Config {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Template>),
}

#[derive(Debug, Deserialize)]
struct Template {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Described { content: String },
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Described { content: text } => text,
        }
    }
}

#[derive(Default, Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

/// Reads them. `stop_ids` are those that the model's own configuration names.
pub(super) fn read_all(dir: &Path, stop_ids: &[u32]) -> Result<Texts> {
    let text = read(dir, TOKENIZER)?;
    let text = text.with_context(|| format!("there is no {TOKENIZER}"))?;
    let tokenizer: Tokenizer = text
        .parse()
        .map_err(|e| anyhow!("{TOKENIZER} can't be understood: {e}"))?;
    let config: Config = json(dir, TOKENIZER_CONFIG)?.unwrap_or_default();
    let generation: Generation = json(dir, GENERATION_CONFIG)?.unwrap_or_default();
    let mut ids = generation.eos_token_id.map_or(vec![], Ids::into_vec);
    ids.extend(stop_ids);
    let stop_tokens = stop_tokens(&tokenizer, &ids, config.eos_token.as_ref())?;
    // What a template asks for by role.
    let roles = json!({
        "bos_token": config.bos_token.as_ref().map(Token::text),
        "eos_token": config.eos_token.as_ref().map(Token::text),
    });
    Ok(Texts {
        tokenizer: text,
        chat_template: match read(dir, CHAT_TEMPLATE)? {
            Some(template) => Some(template),
            None => config.chat_template.map(default_template).transpose()?,
        },
        stop_tokens,
        licence: licence(dir)?,
        others: vec![(TOKENIZER_CONFIG.to_owned(), format!("{roles:#}\n"))],
    })
}

fn default_template(templates: Templates) -> Result<String> {
    match templates {
        Templates::One(template) => Ok(template),
        Templates::Named(all) => {
            let found = all.into_iter().find(|template| template.name == DEFAULT);
            let found = found.with_context(|| {
                format!("{TOKENIZER_CONFIG} has chat templates, but none named {DEFAULT:?}")
            })?;
            Ok(found.template)
        }
    }
}

/// Each once, in the order of the ids.
fn stop_tokens(tokenizer: &Tokenizer, ids: &[u32], eos: Option<&Token>) -> Result<Vec<String>> {
    let mut stops: Vec<String> = Vec::new();
    for &id in ids {
        let Some(token) = tokenizer.id_to_token(id) else {
            bail!("the token {id}, which is to end an answer, is not in {TOKENIZER}");
        };
        stops.push(token);
    }
    stops.extend(eos.map(|token| token.text().to_owned()));
    let mut seen = std::collections::HashSet::new();
    stops.retain(|token| seen.insert(token.clone()));
    ensure!(
        !stops.is_empty(),
        "neither {GENERATION_CONFIG} nor config.json nor {TOKENIZER_CONFIG} names a token that ends an answer (eos)"
    );
    Ok(stops)
}

/// The licence's own files; what it is called is for people to read there.
fn licence(dir: &Path) -> Result<Licence> {
    let mut names: Vec<String> = Vec::new();
    for entry in dir.read_dir()? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_licence = ["LICENSE", "LICENCE"]
            .iter()
            .any(|start| name.to_uppercase().starts_with(start));
        if is_licence && dir.join(&name).is_file() {
            names.push(name);
        }
    }
    names.sort();
    let mut files = Vec::new();
    for name in &names {
        let text = read(dir, name)?;
        files.extend(text.map(|text| (name.clone(), text)));
    }
    Ok(Licence {
        name: match names.first() {
            Some(name) => format!("see {name}"),
            None => "unknown".to_owned(),
        },
        files,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_form_of_template_and_stop_token_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let all = |ids: &[u32]| read_all(dir.path(), ids);
        assert!(all(&[]).unwrap_err().to_string().contains(TOKENIZER));
        let description = crate::tiny::description("m", &crate::tiny::shape(), "").unwrap();
        write(TOKENIZER, &description.tokenizer);
        let error = all(&[]).unwrap_err().to_string();
        assert!(error.contains("names a token that ends"), "{error}");
        let error = all(&[4000]).unwrap_err().to_string();
        assert!(error.contains("token 4000"), "{error}");

        write(GENERATION_CONFIG, r#"{"eos_token_id": [2, 0]}"#);
        let texts = all(&[2]).unwrap();
        assert_eq!(texts.stop_tokens, ["<|im_end|>", "<|endoftext|>"]);
        assert_eq!(
            (texts.licence.name.as_str(), texts.chat_template),
            ("unknown", None)
        );

        write(GENERATION_CONFIG, r#"{"eos_token_id": 2}"#);
        write(
            TOKENIZER_CONFIG,
            r#"{"eos_token": {"content": "<|endoftext|>", "lstrip": false},
                "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
        );
        write("LICENSE.txt", "mine");
        let texts = all(&[]).unwrap();
        assert_eq!(texts.stop_tokens, ["<|im_end|>", "<|endoftext|>"]);
        assert_eq!(texts.chat_template.as_deref(), Some("d"));
        assert_eq!(texts.licence.name, "see LICENSE.txt");
        assert!(texts.others[0].1.contains("\"<|endoftext|>\""));

        write(CHAT_TEMPLATE, "j");
        assert_eq!(all(&[]).unwrap().chat_template.as_deref(), Some("j"));
    }
}
