//! Every bound of the protocol side, and their sum. A configuration may lower most of them, never raise one.
//! The engine's memory (weights, KV arena) is counted by the engine.

/// A task's payload, as it comes from the broker.
pub const PAYLOAD_BYTES_MAX: usize = 256 * KIB;
/// The packet size advertised to the broker: above the payload limit, so that a task somewhat too large is
/// refused with an answer instead of being dropped by the broker in silence.
pub const PACKET_BYTES_MAX: usize = 2 * PAYLOAD_BYTES_MAX;
/// Task ids: 1 to this many of `A–Z a–z 0–9 _ - .`.
pub const ID_BYTES_MAX: usize = 64;
/// A sender's topic level.
pub const SENDER_BYTES_MAX: usize = 128;
/// A reply topic, and a configured base.
pub const TOPIC_BYTES_MAX: usize = 512;
/// Its levels: brokers end the connection over a topic of too many (mosquitto at 200, EMQX at 128).
pub const TOPIC_LEVELS_MAX: usize = 64;
/// Correlation Data, which comes back unchanged.
pub const CORRELATION_BYTES_MAX: usize = 256;
/// A message's user properties, none of which mean anything to us: how many, and the bytes of all names and values.
pub const USER_PROPERTIES_MAX: usize = 32;
pub const USER_PROPERTY_BYTES_MAX: usize = 4 * KIB;
/// A cancel's payload.
pub const CANCEL_BYTES_MAX: usize = KIB;
/// What of an input a `reason` may repeat.
pub const ECHO_BYTES_MAX: usize = 64;
/// What of a prompt or an answer is logged where that is switched on.
pub const LOG_TEXT_BYTES_MAX: usize = 2 * KIB;
/// Messages of a `chat` task.
pub const MESSAGES_MAX: usize = 128;
/// Stop strings of a task, and the bytes of each.
pub const STOPS_MAX: usize = 8;
pub const STOP_BYTES_MAX: usize = 64;
/// Tokens a task may ask for.
pub const TOKENS_MAX: usize = 8192;
/// An answer longer than this fails as `too_large`: it is never cut.
pub const ANSWER_BYTES_MAX: usize = 128 * KIB;
/// Seeds survive a trip through a JavaScript number.
pub const SEED_MAX: u64 = (1 << 53) - 1;
pub const PRIORITY_MAX: u8 = 9;
pub const PRIORITY_DEFAULT: u8 = 5;

/// Tasks that wait, and the bytes of their payloads together.
pub const QUEUE_TASKS_MAX: usize = 256;
pub const QUEUE_BYTES_MAX: usize = 4 * MIB;
/// Tasks that run at the same time.
pub const RUNNING_TASKS_MAX: usize = 16;
/// Tasks that gave their slot to one of a higher priority and wait with what was made of them.
pub const SUSPENDED_TASKS_MAX: usize = 4;
/// How often a task is begun that the process never outlived; then it fails, lest it take the gateway down for ever.
pub const BEGUN_MAX: u32 = 5;
/// Final events kept for resent tasks, and the bytes of their payloads together.
pub const RECALL_TASKS_MAX: usize = 10_000;
pub const RECALL_BYTES_MAX: usize = 12 * MIB;
/// What a recalled task costs beyond its payload: key, digest, outcome, index entries.
pub const RECALL_ENTRY_BYTES: usize = 640;
/// Cancels remembered because they overtook their task: those to this gateway, and as many to its pool.
pub const CANCELS_MAX: usize = 1024;
/// QoS 1 messages that the broker may have unacknowledged with us (the receive maximum).
pub const RECEIVE_MAX: usize = 16;
/// Messages received and not yet decided, and their bytes. Far more than the receive maximum: mosquitto 2.0.11 sends
/// that many anew for each acknowledgement while its queue lasts (1000 messages unless configured), and all that was
/// in flight at once when a session is resumed. Half of it is QoS 1's alone.
pub const INBOX_MESSAGES_MAX: usize = 1024;
pub const INBOX_BYTES_MAX: usize = 16 * MIB;
/// The same of a connection whose session the broker does not keep, as a pool's: it brings no backlog, and what finds no
/// room is sent again by those who want it.
pub const RECEIVE_BRIEF_MAX: usize = 4;
pub const INBOX_BRIEF_BYTES_MAX: usize = 4 * MIB;
/// Events not yet acknowledged by the broker.
pub const OUTBOX_EVENTS_MAX: usize = 1024;
pub const OUTBOX_BYTES_MAX: usize = 8 * MIB;
/// Room that one task's events may take in the outbox; below it no further message is taken in and no further
/// task is begun, so that it outgrows its bound by the answers of those that run and no more.
pub const OUTBOX_RESERVE_BYTES: usize = ANSWER_JSON_BYTES_MAX + 16 * KIB;
pub const OUTBOX_RESERVE_EVENTS: usize = 4;
/// QoS 1 publishes in flight to the broker.
pub const INFLIGHT_MAX: usize = 16;
/// Requests handed to the MQTT client and not yet written.
pub const REQUESTS_MAX: usize = 64;
/// Changes that are not on disk; beyond, no message is taken in. Answers of those that run come on top.
pub const JOURNAL_UNKEPT_BYTES: usize = 4 * MIB;
/// Those changes, and the pages they are written into, which redb keeps in its cache or writes.
pub const JOURNAL_BYTES_MAX: usize =
    JOURNAL_UNKEPT_BYTES + RUNNING_TASKS_MAX * ANSWER_JSON_BYTES_MAX + JOURNAL_CACHE_BYTES;
pub const JOURNAL_CACHE_BYTES: usize = 2 * MIB;
/// Events from the model's thread to the agent.
pub const WORKER_EVENTS_MAX: usize = 256;

/// A token takes four bytes, and each byte of a prompt may be one.
const TOKEN_BYTES: usize = 4;
/// What one that was put aside holds: its payload, its tokens, and its text twice.
const SUSPENDED_BYTES_MAX: usize =
    PAYLOAD_BYTES_MAX + TOKEN_BYTES * (PAYLOAD_BYTES_MAX + TOKENS_MAX) + 2 * ANSWER_BYTES_MAX;
/// JSON may escape each byte of an answer as `\u00XX`.
const ANSWER_JSON_BYTES_MAX: usize = 6 * ANSWER_BYTES_MAX;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// What all of the above may hold at once.
pub const MEMORY_BYTES_MAX: usize = (1 + TOKEN_BYTES) * QUEUE_BYTES_MAX
    + QUEUE_TASKS_MAX * (TOPIC_BYTES_MAX + CORRELATION_BYTES_MAX + SENDER_BYTES_MAX + ID_BYTES_MAX)
    + RUNNING_TASKS_MAX * (PAYLOAD_BYTES_MAX + ANSWER_JSON_BYTES_MAX)
    + SUSPENDED_TASKS_MAX * SUSPENDED_BYTES_MAX
    + RECALL_BYTES_MAX
    + RECALL_TASKS_MAX * RECALL_ENTRY_BYTES
    + 2 * CANCELS_MAX * (SENDER_BYTES_MAX + ID_BYTES_MAX + 64)
    + INBOX_BYTES_MAX
    + INBOX_BRIEF_BYTES_MAX
    + 2 * INBOX_MESSAGES_MAX * KIB
    + OUTBOX_BYTES_MAX
    + JOURNAL_BYTES_MAX
    + WORKER_EVENTS_MAX * KIB;

const _: () = assert!(
    MEMORY_BYTES_MAX <= 110 * MIB,
    "the bounds add up to more than the budget"
);
const _: () =
    assert!(PACKET_BYTES_MAX > PAYLOAD_BYTES_MAX + TOPIC_BYTES_MAX + CORRELATION_BYTES_MAX);
const _: () = assert!(OUTBOX_RESERVE_BYTES * 2 < OUTBOX_BYTES_MAX);
const _: () = assert!(OUTBOX_EVENTS_MAX > (QUEUE_TASKS_MAX + RUNNING_TASKS_MAX) * 3);
const _: () = assert!(INFLIGHT_MAX < REQUESTS_MAX);
const _: () = assert!(INBOX_MESSAGES_MAX / 2 >= RECEIVE_MAX);
const _: () = assert!(INBOX_BYTES_MAX / 2 >= RECEIVE_MAX * PACKET_BYTES_MAX);
const _: () = assert!(INBOX_BRIEF_BYTES_MAX / 2 >= RECEIVE_BRIEF_MAX * PACKET_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of the shipped broker's configuration.
    fn of_the_broker(name: &str) -> usize {
        let text = include_str!("../../../deploy/mosquitto/millwright.conf");
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
        let value = values.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(values.next().is_none(), "{name} twice");
        value.trim().parse().unwrap()
    }

    #[test]
    fn the_shipped_broker_carries_what_the_agent_may_send_and_queues_no_more_than_it_takes() {
        let packet = of_the_broker("max_packet_size ");
        // The event's other fields, the topic and the properties.
        assert!(
            packet > ANSWER_JSON_BYTES_MAX + 16 * KIB + TOPIC_BYTES_MAX + CORRELATION_BYTES_MAX
        );
        assert!(packet > PACKET_BYTES_MAX);
        assert_eq!(of_the_broker("max_inflight_messages "), RECEIVE_MAX);
        let queued = of_the_broker("max_queued_messages ");
        assert!(queued + RECEIVE_MAX <= INBOX_MESSAGES_MAX && queued > QUEUE_TASKS_MAX);
        assert_eq!(of_the_broker("max_queued_bytes "), INBOX_BYTES_MAX);
    }
}
