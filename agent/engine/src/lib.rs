//! Text in, text out: a Micro-LLM run through tract. Knows no MQTT and no tokio.

pub mod bundle;
