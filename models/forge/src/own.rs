//! Somebody's own model: a Hugging Face folder or a GGUF file. What either holds is for `from_folder` and `from_gguf`;
//! here it becomes a description and its weights, whatever is to be written of them.

use crate::bundle::{Description, Licence};
use crate::gguf::{Gguf, Value};
use crate::llama::{Decoder, Weights};
use crate::{from_folder, from_gguf, tokenizer};
use anyhow::{Context, Result};
use millwright_engine::bundle::sha256_of;
use std::fs;
use std::path::Path;

/// What a model is called whose path has no name.
const NAMELESS: &str = "model";

/// Opens it and hands it on. All that can be refused of it is refused before.
pub(crate) fn open<T>(
    source: &Path,
    then: impl FnOnce(Description, &dyn Weights) -> Result<T>,
) -> Result<T> {
    if source.is_dir() {
        let weights = from_folder::Source::open(source)?;
        return then(of_folder(source, &weights)?, &weights);
    }
    let bytes = fs::read(source)?;
    let gguf = Gguf::parse(&bytes)?;
    let weights = from_gguf::Source::open(&gguf)?;
    then(of_gguf(source, &gguf, weights.decoder())?, &weights)
}

fn of_folder(path: &Path, source: &from_folder::Source) -> Result<Description> {
    let texts = source.texts(path)?;
    let mut files = Vec::new();
    for file in source.files() {
        let digest = sha256_of(&path.join(file));
        let digest = digest.with_context(|| format!("{file} can't be read"))?;
        files.push(format!("{file} (sha256 {digest})"));
    }
    Ok(Description {
        name: name(path)?,
        version: "1".to_owned(),
        decoder: source.decoder().clone(),
        tokenizer: texts.tokenizer,
        chat_template: texts.chat_template,
        stop_tokens: texts.stop_tokens,
        licence: texts.licence,
        source: format!("Hugging Face folder: {}", files.join(", ")),
        others: texts.others,
    })
}

fn of_gguf(path: &Path, gguf: &Gguf<'_>, decoder: &Decoder) -> Result<Description> {
    let vocabulary = from_gguf::vocabulary(gguf)?;
    let file = path.file_name().unwrap_or_default();
    Ok(Description {
        name: name(path)?,
        version: "1".to_owned(),
        decoder: decoder.clone(),
        tokenizer: tokenizer::build(&vocabulary)?,
        chat_template: from_gguf::chat_template(gguf)?,
        stop_tokens: from_gguf::stop_tokens(gguf, &vocabulary)?,
        licence: Licence {
            name: match gguf.get("general.license") {
                Some(Value::Text(name)) => name.clone(),
                _ => "unknown".to_owned(),
            },
            files: vec![],
        },
        source: format!(
            "GGUF file {} (sha256 {})",
            file.to_string_lossy(),
            sha256_of(path)?
        ),
        others: vec![],
    })
}

/// The path's own, without a file's ending.
fn name(path: &Path) -> Result<String> {
    let path = path.canonicalize()?;
    let own = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    let own = own.map_or(NAMELESS.into(), |own| own.to_string_lossy());
    Ok(own.to_lowercase())
}
