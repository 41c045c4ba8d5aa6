//! Why there is no connection, as a sentence for a person: what is wrong, where, and what to do. What a broker wrote is
//! escaped and cut; what came in its packets is not repeated.

use super::Lost;
use super::access::Access;
use super::tls::date;
use millwright_task::wire::{echo, excerpt};
use rumqttc::TlsError;
use rumqttc::v5::mqttbytes::Error as PacketError;
use rumqttc::v5::mqttbytes::v5::{ConnectReturnCode, DisconnectReasonCode};
use rumqttc::v5::{ConnectionError, StateError};
use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error as Tls};
use std::io;
use std::time::Duration;

/// Of what a library or a broker says.
const WORDS_BYTES_MAX: usize = 300;

/// `is_new`: the broker has not taken us in yet.
pub(super) fn explain(error: &ConnectionError, place: &str, access: &Access, is_new: bool) -> Lost {
    let help = |reason| Lost {
        reason,
        needs_help: true,
    };
    let wait = |reason| Lost {
        reason,
        needs_help: false,
    };
    if let Some(tls) = tls_error(error) {
        return help(format!("no TLS connection to {place}: {}", spoken(tls)));
    }
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => {
            let user = access.user().unwrap_or("without a name");
            help(format!(
                "the broker at {place} refuses user {user}: check the user and the password file"
            ))
        }
        ConnectionError::ConnectionRefused(code) => help(format!(
            "the broker at {place} refuses the connection: {code:?}"
        )),
        error if is_closed(error) && is_new => {
            let hint = if access.has_tls() {
                "it may speak no TLS there, or want another client certificate"
            } else {
                "it may want TLS there"
            };
            Lost {
                reason: format!(
                    "the broker at {place} closed the connection before it answered: {hint}"
                ),
                needs_help: access.has_tls(),
            }
        }
        ConnectionError::Tls(e) => help(format!("no TLS connection to {place}: {}", words(e))),
        ConnectionError::Io(e) => wait(format!("the broker at {place} can't be reached: {e}")),
        ConnectionError::Timeout(_) => wait(format!("the broker at {place} does not answer")),
        ConnectionError::NotConnAck(_) => help(format!(
            "what answers at {place} breaks the protocol: no CONNACK comes first"
        )),
        error if is_taken_over(error) => help(format!(
            "another client connected to {place} under this client id: each gateway needs its own"
        )),
        ConnectionError::MqttState(StateError::ServerDisconnect {
            reason_code,
            reason_string,
        }) => {
            let said = reason_string.as_deref().map(echo).unwrap_or_default();
            wait(format!(
                "the broker at {place} ended the connection: {reason_code:?} {said}"
            ))
        }
        ConnectionError::MqttState(StateError::AwaitPingResp) => {
            wait(format!("the broker at {place} went silent"))
        }
        ConnectionError::MqttState(e) => {
            wait(format!("the connection to {place} was lost: {}", words(e)))
        }
        ConnectionError::RequestsDone => wait(format!("the connection to {place} is closed")),
    }
}

/// Whether the broker doesn't take who we are: another certificate or password might do.
pub(super) fn is_refusal(error: &ConnectionError) -> bool {
    use ConnectReturnCode::{BadUserNamePassword, Banned, NotAuthorized};
    match error {
        ConnectionError::ConnectionRefused(code) => {
            matches!(code, BadUserNamePassword | NotAuthorized | Banned)
        }
        error => matches!(tls_error(error), Some(Tls::AlertReceived(_))),
    }
}

/// Whether another client came under our client id.
pub(super) fn is_taken_over(error: &ConnectionError) -> bool {
    matches!(
        error,
        ConnectionError::MqttState(StateError::ServerDisconnect {
            reason_code: DisconnectReasonCode::SessionTakenOver,
            ..
        })
    )
}

fn words(error: &impl std::fmt::Display) -> String {
    excerpt(&error.to_string(), WORDS_BYTES_MAX)
}

fn io_error(error: &ConnectionError) -> Option<&io::Error> {
    match error {
        ConnectionError::Io(e)
        | ConnectionError::Tls(TlsError::Io(e))
        | ConnectionError::MqttState(
            StateError::Io(e) | StateError::Deserialization(PacketError::Io(e)),
        ) => Some(e),
        _ => None,
    }
}

fn tls_error(error: &ConnectionError) -> Option<&Tls> {
    if let ConnectionError::Tls(TlsError::TLS(e)) = error {
        return Some(e);
    }
    io_error(error)?.get_ref()?.downcast_ref()
}

/// Whether the other end closed the connection, in whatever way.
pub(super) fn is_closed(error: &ConnectionError) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    if let ConnectionError::MqttState(StateError::ConnectionAborted) = error {
        return true;
    }
    let closed = [
        BrokenPipe,
        ConnectionAborted,
        ConnectionReset,
        UnexpectedEof,
    ];
    io_error(error).is_some_and(|e| closed.contains(&e.kind()))
}

fn spoken(error: &Tls) -> String {
    match error {
        Tls::InvalidCertificate(error) => format!("the broker's certificate {}", judged(error)),
        Tls::AlertReceived(AlertDescription::CertificateRequired) => {
            "the broker wants a client certificate: set cert and key under [broker.tls]".into()
        }
        Tls::AlertReceived(AlertDescription::CertificateExpired) => {
            "the broker finds our client certificate expired: renew it, or check the clocks".into()
        }
        Tls::AlertReceived(AlertDescription::UnknownCA) => {
            "the broker does not know the CA of our client certificate".into()
        }
        Tls::AlertReceived(alert) => {
            format!("the broker refuses our side of it ({alert:?}): check the client certificate")
        }
        Tls::InvalidMessage(_) => "what answers there speaks no TLS: check the port".into(),
        other => words(other),
    }
}

fn judged(error: &CertificateError) -> String {
    let day = |time: &UnixTime| date(Duration::from_secs(time.as_secs()));
    match error {
        // The latter of another CA of the same name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is of none of the CAs in broker.tls.ca: check that file".into()
        }
        CertificateError::ExpiredContext { time, not_after } => format!(
            "ended on {}, and it is {} here: it must be renewed",
            day(not_after),
            day(time)
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "begins on {}, and it is {} here: check this gateway's clock",
            day(not_before),
            day(time)
        ),
        CertificateError::NotValidForNameContext { .. } => {
            format!("is for another name than broker.host: {}", words(error))
        }
        other => format!("is not trusted: {}", words(other)),
    }
}
