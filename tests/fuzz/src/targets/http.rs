//! What a client writes to the API's socket: requests with their heads, whole or not.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;

use api_server::{Limits, Responder, Server};
use resources::{Action, Fault, Reply};
use vmm_sys_util::eventfd::EventFd;

/// A server whose every other action fails.
fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let path = crate::host::fresh_path();
        let server = Server::bind(&path).expect("a fresh path");
        std::thread::spawn(move || {
            let never = EventFd::new(0).expect("the host has descriptors");
            let answer = |action: Action, responder: Responder| {
                responder.send(match action {
                    Action::GetVersion => Ok(Reply::Json(serde_json::json!({"firecracker_version": "1"}))),
                    Action::GetPrometheus => Ok(Reply::Text("text/plain", "a 1\n".to_owned())),
                    Action::PutMmds(_) => Err(Fault { message: "too much".to_owned(), too_large: true }),
                    Action::Start => Err(Fault::from("not now".to_owned())),
                    _ => Ok(Reply::Done),
                });
            };
            server.run(answer, Limits::default(), &never).expect("the server serves");
        });
        path
    })
}

/// One connection: everything is sent, then read until its end.
pub fn run(bytes: &[u8]) {
    let mut stream = UnixStream::connect(socket()).expect("the server listens");
    // A server that has had enough hangs up before the end.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{answer:?}");
}
