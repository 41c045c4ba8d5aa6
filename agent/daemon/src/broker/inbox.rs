//! Where messages wait for the dispatcher: bounded in count and bytes, and behind when a broker sends more than that.

use super::Message;
use millwright_task::limits::{INBOX_MESSAGES_MAX, USER_PROPERTIES_MAX};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Publish;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};

/// The inbox, from the poller's side.
pub(super) struct Intake {
    messages: mpsc::Sender<Message>,
    /// Bytes that may be held, and those that still may.
    bytes_max: usize,
    room: Arc<Semaphore>,
    /// Messages of QoS 1 taken in whose acknowledgement is not written.
    owed: usize,
    /// One of QoS 1 found no room. Those that follow wait at the broker too, so that their order is kept.
    overflowed: bool,
}

pub(super) fn open(bytes_max: usize) -> (Intake, mpsc::Receiver<Message>) {
    let (messages, receiver) = mpsc::channel(INBOX_MESSAGES_MAX);
    let intake = Intake {
        messages,
        bytes_max,
        room: Arc::new(Semaphore::new(bytes_max)),
        owed: 0,
        overflowed: false,
    };
    (intake, receiver)
}

impl Intake {
    /// Takes a message in, or leaves it: at the broker, unacknowledged, if it is of QoS 1.
    pub(super) fn take(&mut self, publish: Publish, generation: u64) {
        let owed = publish.qos == QoS::AtLeastOnce;
        if owed && self.overflowed {
            return;
        }
        if self.place(publish, generation).is_some() {
            self.owed += usize::from(owed);
        } else if owed {
            tracing::warn!("more messages arrive at once than may be held: the rest waits");
            self.overflowed = true;
        } else {
            tracing::debug!("a message of QoS 0 was dropped: the inbox is full");
        }
    }

    /// An acknowledgement was written.
    pub(super) fn acknowledged(&mut self) {
        self.owed = self.owed.saturating_sub(1);
    }

    /// Whether messages were left and all that were taken are gone: from the last connection too, or a new one would
    /// find no room either.
    pub(super) fn is_behind(&self) -> bool {
        self.overflowed && self.owed == 0 && self.messages.capacity() == INBOX_MESSAGES_MAX
    }

    /// Another connection: the broker sends again what it saw no acknowledgement of.
    pub(super) fn reset(&mut self) {
        self.owed = 0;
        self.overflowed = false;
    }

    /// QoS 0 has no bound at the broker; it never takes the half that the rest is meant for.
    fn place(&self, publish: Publish, generation: u64) -> Option<()> {
        let publish = own(publish);
        let bytes = publish.size();
        let half_full = self.messages.capacity() <= INBOX_MESSAGES_MAX / 2
            || self.room.available_permits() < self.bytes_max / 2 + bytes;
        if half_full && publish.qos == QoS::AtMostOnce {
            return None;
        }
        let message = Message {
            publish,
            generation,
            _room: Arc::clone(&self.room)
                .try_acquire_many_owned(u32::try_from(bytes).ok()?)
                .ok()?,
        };
        self.messages.try_send(message).ok()
    }
}

/// The message in memory of its own, without what nobody reads. As it came it holds the whole buffer that it was read
/// with, and an empty user property takes ten times the memory that it took of the packet.
fn own(mut publish: Publish) -> Publish {
    publish.topic = publish.topic.to_vec().into();
    publish.payload = publish.payload.to_vec().into();
    if let Some(properties) = &mut publish.properties {
        // One too many is enough to be refused for.
        properties.user_properties.truncate(USER_PROPERTIES_MAX + 1);
        properties.user_properties.shrink_to_fit();
        properties.subscription_identifiers = Vec::new();
        let correlation = properties.correlation_data.take();
        properties.correlation_data = correlation.map(|data| data.to_vec().into());
    }
    publish
}

#[cfg(test)]
mod tests {
    use super::*;
    use millwright_task::limits::INBOX_BYTES_MAX;
    use rumqttc::v5::mqttbytes::v5::PublishProperties;

    fn message(qos: QoS, bytes: usize) -> Publish {
        Publish::new("t", qos, vec![b'x'; bytes], None)
    }

    fn held(messages: &mut mpsc::Receiver<Message>) -> usize {
        std::iter::from_fn(|| messages.try_recv().ok()).count()
    }

    #[tokio::test]
    async fn what_finds_no_room_waits_at_the_broker_until_the_rest_is_acknowledged() {
        for (bytes, room) in [(10, INBOX_MESSAGES_MAX), (INBOX_BYTES_MAX / 20, 19)] {
            let (mut intake, mut messages) = open(INBOX_BYTES_MAX);
            for _ in 0..room + 3 {
                intake.take(message(QoS::AtLeastOnce, bytes), 1);
            }
            assert!(!intake.is_behind(), "the taken ones are not acknowledged");
            assert_eq!(held(&mut messages), room);
            // There is room again, but a later one must not overtake those that wait.
            intake.take(message(QoS::AtLeastOnce, bytes), 1);
            assert_eq!(held(&mut messages), 0);
            (0..room - 1).for_each(|_| intake.acknowledged());
            assert!(!intake.is_behind());
            intake.acknowledged();
            assert!(intake.is_behind());
            intake.reset();
            assert!(!intake.is_behind());
            intake.take(message(QoS::AtLeastOnce, bytes), 2);
            assert_eq!(held(&mut messages), 1);
        }
    }

    #[tokio::test]
    async fn what_an_old_connection_left_is_not_run_away_from() {
        let (mut intake, mut messages) = open(INBOX_BYTES_MAX);
        for _ in 0..=INBOX_MESSAGES_MAX {
            intake.take(message(QoS::AtLeastOnce, 10), 1);
        }
        intake.reset();
        intake.take(message(QoS::AtLeastOnce, 10), 2);
        assert!(
            !intake.is_behind(),
            "a third connection would find no room either"
        );
        assert_eq!(held(&mut messages), INBOX_MESSAGES_MAX);
        assert!(intake.is_behind());
    }

    #[tokio::test]
    async fn a_message_is_held_without_its_buffer_and_without_what_nobody_reads() {
        let (mut intake, mut messages) = open(INBOX_BYTES_MAX);
        let mut publish = message(QoS::AtLeastOnce, 10);
        let pair = || (String::new(), String::new());
        publish.properties = Some(PublishProperties {
            user_properties: std::iter::repeat_with(pair).take(100_000).collect(),
            subscription_identifiers: vec![1; 100_000],
            ..PublishProperties::default()
        });
        let buffer = publish.payload.as_ptr();
        intake.take(publish, 1);
        let held = messages.try_recv().unwrap().publish;
        assert_ne!(held.payload.as_ptr(), buffer);
        let properties = held.properties.unwrap();
        assert!(properties.user_properties.capacity() <= USER_PROPERTIES_MAX + 1);
        assert_eq!(properties.user_properties.len(), USER_PROPERTIES_MAX + 1);
        assert_eq!(properties.subscription_identifiers.capacity(), 0);
    }

    #[tokio::test]
    async fn qos_0_leaves_half_of_the_room() {
        for (bytes, room) in [(10, INBOX_MESSAGES_MAX / 2), (INBOX_BYTES_MAX / 20, 9)] {
            let (mut intake, mut messages) = open(INBOX_BYTES_MAX);
            for _ in 0..room + 3 {
                intake.take(message(QoS::AtMostOnce, bytes), 1);
            }
            for _ in 0..9 {
                intake.take(message(QoS::AtLeastOnce, bytes), 1);
            }
            assert_eq!(held(&mut messages), room + 9);
            assert!(!intake.is_behind());
        }
    }
}
