//! Prompts and answers in the log, where somebody switched that on: each piece on one line, escaped and cut.

use millwright_task::job::Outcome;
use millwright_task::limits::LOG_TEXT_BYTES_MAX;
use millwright_task::wire;

pub(super) fn log_prompt(task: &wire::Task) {
    let (sender, id) = (&task.key.sender, &task.key.task);
    let log = |role: &str, text: &str| {
        let text = wire::excerpt(text, LOG_TEXT_BYTES_MAX);
        tracing::info!(sender, task = id, role, "{text}");
    };
    match &task.kind {
        wire::Kind::Generate { prompt } => log("prompt", prompt),
        wire::Kind::Chat { messages } => messages.iter().for_each(|m| log(&m.role, &m.content)),
    }
}

pub(super) fn log_answer(key: &wire::Key, outcome: &Outcome) {
    if let Outcome::Done { product, .. } | Outcome::Stopped(product) = outcome {
        let text = wire::excerpt(&product.text, LOG_TEXT_BYTES_MAX);
        tracing::info!(
            sender = key.sender,
            task = key.task,
            role = "answer",
            "{text}"
        );
    }
}
