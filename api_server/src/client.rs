//! A client of the API that waits for each reply.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot reach a microVM on {socket:?}; check that it runs, or name its socket with --api-sock")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the microVM on {socket:?} gave no answer to {method} {path}; check that it still runs")]
    Exchange {
        /// The socket.
        socket: PathBuf,
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// What went wrong.
        source: hyper::Error,
    },
    /// The request cannot be sent as it is.
    #[error("{path:?} is no path of a request; it starts with / and holds no spaces")]
    Path {
        /// What was given.
        path: String,
    },
    /// The answer is a refusal.
    #[error("the microVM on {socket:?} refuses {method} {path} ({status}): {message}")]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// HTTP's status code.
        status: u16,
        /// Why, in the server's words.
        message: String,
    },
    /// The answer is not JSON.
    #[error("the microVM on {socket:?} answers {method} {path} with something else than JSON")]
    NotJson {
        /// The socket.
        socket: PathBuf,
        /// The request's method.
        method: Method,
        /// The request's path.
        path: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// No runtime for the conversation.
    #[error("cannot wait for the microVM's answer")]
    Runtime(#[source] io::Error),
}

/// A client of one microVM.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Of the microVM whose API is on this unix socket. Each request makes a connection of its own.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks and waits for the answer: `None` when it is done and there is nothing to say. A plain text is a string.
    ///
    /// # Errors
    /// When nobody answers, and when the answer is a refusal.
    pub fn request(
        &self,
        method: &Method,
        path: &str,
        body: Option<String>,
    ) -> Result<Option<Value>, ClientError> {
        let socket = || self.socket.clone();
        let exchange = |source| ClientError::Exchange {
            socket: socket(),
            method: method.clone(),
            path: path.to_owned(),
            source,
        };
        let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        request = request.header(ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .ok()
            .filter(|_| path.starts_with('/'))
            .ok_or_else(|| ClientError::Path { path: path.to_owned() })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(ClientError::Runtime)?;
        let (status, is_text, bytes) = runtime.block_on(async {
            let stream = UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Connect { socket: socket(), source })?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(exchange)?;
            // It ends with the runtime; what goes wrong is told to the sender.
            tokio::spawn(connection);
            let reply = sender.send_request(request).await.map_err(exchange)?;
            let status = reply.status();
            let kind = reply.headers().get(CONTENT_TYPE);
            let is_text = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
            Ok((status, is_text, reply.into_body().collect().await.map_err(exchange)?.to_bytes()))
        })?;
        if !status.is_success() {
            let (method, path) = (method.clone(), path.to_owned());
            let message = refusal(&bytes);
            return Err(ClientError::Refused {
                socket: socket(),
                method,
                path,
                status: status.as_u16(),
                message,
            });
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        if is_text {
            return Ok(Some(Value::String(String::from_utf8_lossy(&bytes).into_owned())));
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|source| ClientError::NotJson {
            socket: socket(),
            method: method.clone(),
            path: path.to_owned(),
            source,
        })
    }
}

/// The words of a refusal, in whichever form it comes.
fn refusal(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let words = json.get("fault_message").or_else(|| json.get("error")).and_then(Value::as_str);
    words.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use resources::{Action, Fault, Reply};
    use serde_json::json;

    use super::*;
    use crate::{Limits, Server};

    #[test]
    fn questions_are_answered_or_refused() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api");
        let client = Client::new(&socket);
        let text = client.request(&Method::GET, "/", None).unwrap_err().to_string();
        assert!(text.contains(socket.to_str().unwrap()) && text.contains("--api-sock"), "{text}");

        let server = Server::bind(&socket).unwrap();
        let (stop, end) = io::pipe().unwrap();
        let thread = std::thread::spawn(move || {
            let handler = |action, responder: crate::Responder| {
                responder.send(match action {
                    Action::PutMmds(value) => Ok(Reply::Json(value)),
                    Action::Start => Err(Fault::from("no kernel".to_owned())),
                    _ => Ok(Reply::Done),
                });
            };
            server.run(handler, Limits::default(), &stop).unwrap();
        });
        assert_eq!(client.request(&Method::GET, "/", None).unwrap(), None);
        let body = json!({ "a": ["b"] });
        assert_eq!(client.request(&Method::PUT, "/mmds", Some(body.to_string())).unwrap(), Some(body));
        let start = json!({ "action_type": "InstanceStart" }).to_string();
        let text = client.request(&Method::PUT, "/actions", Some(start)).unwrap_err().to_string();
        assert!(text.contains("PUT /actions (400): no kernel"), "{text}");
        let large = " ".repeat(60_000);
        let text = client.request(&Method::PUT, "/mmds", Some(large)).unwrap_err().to_string();
        assert!(text.contains("60000 is larger than the limit"), "{text}");
        for path in ["version", "/a b", ""] {
            let error = client.request(&Method::GET, path, None).unwrap_err();
            assert!(matches!(error, ClientError::Path { .. }), "{error}");
        }
        drop(end);
        thread.join().unwrap();
    }
}
