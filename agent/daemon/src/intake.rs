//! A message from the broker becomes a wish: a task, a cancel, or nothing that can be answered. And a task
//! becomes a request to the model. Decides nothing about room.

use millwright_engine::sampler::Sampling;
use millwright_engine::{Prompt, Request, RequestError, text};
use millwright_task::Now;
use millwright_task::topic::{INVALID_TASK, Inbound};
use millwright_task::wire::{
    Code, Decoder, Envelope, Format, Key, Kind, Refusal, Refused, Reply, Task, decode_cancel, echo,
};
use rumqttc::v5::mqttbytes::v5::Publish;
use std::time::Duration;

/// What a message asks for.
#[derive(Debug)]
pub enum Wish {
    Task(Task),
    /// `reply` is where to say that there was nothing to cancel.
    Cancel(Key, Reply),
    /// It is malformed, and its sender can be told.
    Refused(Box<Refused>),
    /// Its topic names no sender that could be answered.
    Nothing(String),
}

/// Reads one message.
pub fn read(decoder: &Decoder, now: Now, publish: &Publish) -> Wish {
    let Ok(topic) = std::str::from_utf8(&publish.topic) else {
        return Wish::Nothing("a topic that is not UTF-8".into());
    };
    let properties = publish.properties.as_ref();
    let inbound = decoder.base.inbound(topic);
    let (Some(Inbound::Task { sender } | Inbound::Cancel { sender }), Some(inbound)) =
        (inbound, inbound)
    else {
        return Wish::Nothing(format!("the topic {} names no usable sender", echo(topic)));
    };
    let envelope = Envelope {
        sender,
        payload: &publish.payload,
        content_type: properties.and_then(|p| p.content_type.as_deref()),
        response_topic: properties.and_then(|p| p.response_topic.as_deref()),
        correlation: properties.and_then(|p| p.correlation_data.as_deref()),
        user_properties: properties.map_or(&[], |p| &p.user_properties),
        expiry: properties
            .and_then(|p| p.message_expiry_interval)
            .map(|s| Duration::from_secs(s.into())),
        retain: publish.retain,
    };
    match inbound {
        Inbound::Task { .. } => match decoder.decode(now, &envelope) {
            Ok(task) => Wish::Task(task),
            Err(refused) => Wish::Refused(refused),
        },
        Inbound::Cancel { .. } => cancel(decoder, &envelope),
    }
}

fn cancel(decoder: &Decoder, envelope: &Envelope<'_>) -> Wish {
    let reply = |task: &str| Reply {
        topic: decoder.base.result(envelope.sender, task),
        correlation: None,
        format: Format::of(envelope.content_type).unwrap_or(Format::Json),
    };
    match decode_cancel(envelope) {
        Ok(key) => {
            let reply = reply(&key.task);
            Wish::Cancel(key, reply)
        }
        Err(refusal) => {
            let key = Key {
                sender: envelope.sender.to_owned(),
                task: INVALID_TASK.to_owned(),
            };
            Wish::Refused(Box::new(Refused {
                key,
                reply: reply(INVALID_TASK),
                refusal,
            }))
        }
    }
}

/// The model's view of a task.
pub fn request(task: &Task, seed: u64) -> Request {
    let prompt = match &task.kind {
        Kind::Generate { prompt } => Prompt::Text(prompt.clone()),
        Kind::Chat { messages } => Prompt::Chat(
            messages
                .iter()
                .map(|m| text::Message {
                    role: m.role.clone(),
                    content: m.content.clone(),
                })
                .collect(),
        ),
    };
    let s = &task.sampling;
    let sampling = Sampling {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        repeat_penalty: s.repeat_penalty,
        seed,
    };
    Request {
        prompt,
        max_tokens: task.max_tokens,
        sampling,
        stop: task.stop.clone(),
    }
}

/// The sender's view of a request that the model refuses.
pub fn refusal(error: &RequestError) -> Refusal {
    match error {
        RequestError::ContextOverflow { needed, available } => {
            Refusal::context_overflow(*needed as u64, *available as u64)
        }
        RequestError::Invalid { field, reason } => Refusal::field(field, &echo(reason)),
        RequestError::NoTemplate => Refusal::new(
            Code::Unsupported,
            "the model has no chat template: use kind generate".into(),
        ),
        RequestError::Template(reason) => Refusal::field(
            "messages",
            &format!("don't go through the model's template: {}", echo(reason)),
        ),
    }
}
