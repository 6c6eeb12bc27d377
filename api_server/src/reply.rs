//! Replies, with Firecracker's headers and bodies.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Response, StatusCode};
use resources::{Fault, Outcome, Reply};
use serde_json::{Value, json};

/// A whole reply.
pub(crate) type HttpReply = Response<Full<Bytes>>;

/// What a client beyond the number of connections gets, before its connection is closed.
pub(crate) const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nServer: Firecracker API\r\n\
    Connection: close\r\nContent-Type: application/json\r\nContent-Length: 37\r\n\r\n\
    {\"error\":\"Too many open connections\"}";

fn reply(status: StatusCode, body: Option<&Value>) -> HttpReply {
    let bytes = body.map_or_else(Bytes::new, |value| Bytes::from(value.to_string()));
    let mut reply = Response::new(Full::new(bytes));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Firecracker API"));
    headers.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
    if body.is_some() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    reply
}

/// The reply to a request that became an action, or that is refused for what it says.
pub(crate) fn from_outcome(outcome: &Outcome, deprecated: bool) -> HttpReply {
    let mut reply = match outcome {
        Ok(Reply::Done) => reply(StatusCode::NO_CONTENT, None),
        Ok(Reply::Json(value)) => reply(StatusCode::OK, Some(value)),
        Ok(Reply::Text(kind, text)) => {
            let mut reply = reply(StatusCode::OK, None);
            *reply.body_mut() = Full::new(Bytes::from(text.clone()));
            reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            reply
        }
        Err(Fault { message, too_large }) => {
            let status = if *too_large { StatusCode::PAYLOAD_TOO_LARGE } else { StatusCode::BAD_REQUEST };
            fault_message(status, message)
        }
    };
    if deprecated {
        reply.headers_mut().insert("Deprecation", HeaderValue::from_static("true"));
    }
    reply
}

/// The reply to a request that nobody answers.
pub(crate) fn unanswered() -> HttpReply {
    let message = "The request was not answered: the microVM is ending.";
    fault_message(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn fault_message(status: StatusCode, message: &str) -> HttpReply {
    reply(status, Some(&json!({ "fault_message": message })))
}

/// The reply to what breaks the rules of HTTP, or the server's. The rest of such a request is not read, so that the
/// connection cannot go on.
pub(crate) fn http_error(status: StatusCode, message: &str) -> HttpReply {
    let text = format!("{message}\nAll previous unanswered requests will be dropped.");
    let mut reply = reply(status, Some(&json!({ "error": text })));
    ends_connection(&mut reply);
    reply
}

/// Says that the connection ends with this reply.
pub(crate) fn ends_connection(reply: &mut HttpReply) {
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}
