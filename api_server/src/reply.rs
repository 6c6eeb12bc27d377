//! Replies, with Firecracker's headers and bodies.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Response, StatusCode};
use resources::{Fault, Reply};
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

/// Why a request is not done.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// What it says, or what became of its action.
    Fault(Fault),
    /// It breaks the rules of HTTP, or the server's. The rest of it is not read, so that the connection cannot go on.
    Rules(StatusCode, String),
    /// Nobody answers.
    Unanswered,
}

impl Refusal {
    /// What the client is told.
    pub(crate) fn message(&self) -> &str {
        match self {
            Self::Fault(fault) => &fault.message,
            Self::Rules(_, message) => message,
            Self::Unanswered => "The request was not answered: the microVM is ending.",
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Fault(Fault { too_large: true, .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Fault(_) => StatusCode::BAD_REQUEST,
            Self::Rules(status, _) => *status,
            Self::Unanswered => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// The reply to a request that is done.
pub(crate) fn done(answer: &Reply) -> HttpReply {
    match answer {
        Reply::Done => reply(StatusCode::NO_CONTENT, None),
        Reply::Json(value) => reply(StatusCode::OK, Some(value)),
        Reply::Text(kind, text) => {
            let mut reply = reply(StatusCode::OK, None);
            *reply.body_mut() = Full::new(Bytes::from(text.clone()));
            reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            reply
        }
    }
}

/// The reply to a request that is not done.
pub(crate) fn refused(refusal: &Refusal) -> HttpReply {
    let (status, message) = (refusal.status(), refusal.message());
    match refusal {
        Refusal::Rules(..) => {
            let text = format!("{message}\nAll previous unanswered requests will be dropped.");
            let mut reply = reply(status, Some(&json!({ "error": text })));
            ends_connection(&mut reply);
            reply
        }
        _ => reply(status, Some(&json!({ "fault_message": message }))),
    }
}

/// Says that the request uses what Firecracker has deprecated.
pub(crate) fn deprecates(reply: &mut HttpReply) {
    reply.headers_mut().insert("Deprecation", HeaderValue::from_static("true"));
}

/// Says that the connection ends with this reply.
pub(crate) fn ends_connection(reply: &mut HttpReply) {
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}
