use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use resources::{Fault, Reply};
use serde_json::json;

use super::*;

const LONG: Duration = Duration::from_secs(600);

/// No limit of time matters, but where a test sets one.
fn patient() -> Limits {
    Limits { head: LONG, body: LONG, idle: LONG, ..Limits::default() }
}

/// A server in a thread of its own, and what it was asked.
struct Running {
    directory: tempfile::TempDir,
    asked: Receiver<(Action, Responder)>,
    /// Becomes readable when this is dropped.
    stop: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn new(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&directory.path().join("api")).unwrap();
        let (sender, asked) = mpsc::channel();
        let (reader, stop) = io::pipe().unwrap();
        let thread = thread::spawn(move || {
            let handler = move |action, responder| sender.send((action, responder)).unwrap();
            server.run(handler, limits, &OwnedFd::from(reader)).unwrap();
        });
        Self { directory, asked, stop: Some(stop), thread: Some(thread) }
    }

    /// A server that answers everything at once: with the metadata that it is given, or that it is done.
    fn echo(limits: Limits) -> Self {
        let mut running = Self::new(limits);
        let (_, never) = mpsc::channel();
        let asked = std::mem::replace(&mut running.asked, never);
        thread::spawn(move || {
            for (action, responder) in asked {
                responder.send(match action {
                    Action::PutMmds(value) => Ok(Reply::Json(value)),
                    _ => Ok(Reply::Done),
                });
            }
        });
        running
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("api")
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Client { stream, rest: Vec::new() }
    }

    /// A new client's whole reply to these bytes.
    fn ask(&self, bytes: &str) -> String {
        self.connect().ask(bytes)
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

struct Client {
    stream: UnixStream,
    rest: Vec<u8>,
}

impl Client {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// One reply, whole; empty at the end of the connection.
    fn reply(&mut self) -> String {
        loop {
            let text = String::from_utf8_lossy(&self.rest).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
                let length: usize = length.map_or(0, |length| length.parse().unwrap());
                if body.len() >= length {
                    let size = head.len() + 4 + length;
                    self.rest.drain(..size);
                    return text[..size].to_owned();
                }
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return std::mem::take(&mut self.rest).iter().map(|byte| char::from(*byte)).collect();
                }
                Ok(count) => self.rest.extend_from_slice(&buffer[..count]),
                // What it was sent was not read to its end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return String::new(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn ask(&mut self, bytes: impl AsRef<[u8]>) -> String {
        self.send(bytes);
        self.reply()
    }

    fn is_at_end(&mut self) -> bool {
        self.reply().is_empty()
    }
}

fn put_mmds(body: &str) -> String {
    format!("PUT /mmds HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

const GET: &str = "GET / HTTP/1.1\r\n\r\n";
const DONE: &str = "HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

fn body(reply: &str) -> serde_json::Value {
    serde_json::from_str(reply.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn replies_are_firecrackers() {
    let running = Running::new(patient());
    let mut client = running.connect();
    let mut exchange = |request: &str, outcome| {
        client.send(request);
        running.asked.recv().unwrap().1.send(outcome);
        client.reply()
    };
    assert_eq!(exchange(GET, Ok(Reply::Done)), DONE);
    assert_eq!(
        exchange(GET, Ok(Reply::Json(json!({ "id": "a" })))),
        "HTTP/1.1 200 OK\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{\"id\":\"a\"}"
    );
    let reply = exchange(GET, Err(Fault::from("no\nway".to_owned())));
    assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{reply}");
    assert_eq!(body(&reply), json!({ "fault_message": "no\nway" }));
    let reply = exchange(GET, Err(Fault { message: "much".to_owned(), too_large: true }));
    assert!(reply.starts_with("HTTP/1.1 413 Payload Too Large\r\n"), "{reply}");
    let old = r#"{"guest_cid":3,"uds_path":"s","vsock_id":"v"}"#;
    let old = format!("PUT /vsock HTTP/1.1\r\nContent-Length: {}\r\n\r\n{old}", old.len());
    assert!(exchange(&old, Ok(Reply::Done)).contains("\r\nDeprecation: true\r\n"));
    let reply = client.ask("GET /nowhere HTTP/1.1\r\n\r\n");
    let text = "Invalid request method and/or path: GET /nowhere.";
    assert_eq!(body(&reply), json!({ "fault_message": text }));
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let running = Running::new(patient());
    let mut client = running.connect();
    client.send((0..100).map(|number| put_mmds(&number.to_string())).collect::<String>());
    for number in 0..100 {
        let (action, responder) = running.asked.recv().unwrap();
        assert_eq!(action, Action::PutMmds(json!(number)));
        responder.send(Ok(Reply::Json(json!(number))));
        assert_eq!(body(&client.reply()), json!(number));
    }
}

#[test]
fn requests_of_all_connections_are_handed_on_one_at_a_time() {
    let running = Running::new(patient());
    let mut clients: Vec<_> = (0..5).map(|_| running.connect()).collect();
    let mut observer = running.connect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(put_mmds(&number.to_string()));
        // What is refused at once waits for no turn: when it is answered, what came before it has been read.
        for _ in 0..3 {
            assert!(observer.ask("GET /nowhere HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 400 "));
        }
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let (action, responder) = running.asked.recv().unwrap();
        assert_eq!(action, Action::PutMmds(json!(number)));
        assert!(running.asked.try_recv().is_err());
        responder.send(Ok(Reply::Done));
        assert_eq!(client.reply(), DONE);
    }
}

#[test]
fn a_last_request_is_the_last() {
    let running = Running::echo(patient());
    let mut client = running.connect();
    let reply = client.ask("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(reply.contains("\r\nConnection: close\r\n"), "{reply}");
    assert!(client.is_at_end());
}

#[test]
fn a_crowd_leaves_nothing_behind() {
    let running = Running::echo(patient());
    for _ in 0..5 {
        let crowd: Vec<_> = (0..60).map(|_| running.connect()).collect();
        drop(crowd);
        assert_eq!(running.ask(GET), DONE);
    }
}

#[test]
fn an_unanswered_request_is_told_so() {
    let running = Running::new(patient());
    let mut client = running.connect();
    client.send(GET);
    drop(running.asked.recv().unwrap());
    let reply = client.reply();
    assert!(reply.starts_with("HTTP/1.1 500 Internal Server Error\r\n"), "{reply}");
    assert!(body(&reply)["fault_message"].is_string());
    client.send(GET);
    running.asked.recv().unwrap().1.send(Ok(Reply::Done));
    assert_eq!(client.reply(), DONE);
}

#[test]
fn bodies_are_limited_by_their_length() {
    let running = Running::echo(Limits { max_body: 20, ..patient() });
    let fits = put_mmds(&format!("{:>20}", 7));
    assert_eq!(body(&running.ask(&fits)), json!(7));
    let mut client = running.connect();
    let reply = client.ask(put_mmds(&format!("{:>21}", 7)));
    assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{reply}");
    let text = "Request payload with size 21 is larger than the limit of 20 allowed by server.\nAll previous \
                unanswered requests will be dropped.";
    assert_eq!(body(&reply), json!({ "error": text }));
    assert!(client.is_at_end());
    // Nothing is reserved for what is only announced.
    let huge = format!("PUT /mmds HTTP/1.1\r\nContent-Length: {}\r\n\r\n", u64::MAX - 2);
    assert!(running.ask(&huge).starts_with("HTTP/1.1 400 "));
}

#[test]
fn chunked_bodies_are_refused() {
    let running = Running::echo(patient());
    let mut client = running.connect();
    let reply = client.ask("PUT /mmds HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n7\r\n0\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{reply}");
    assert!(body(&reply)["error"].as_str().unwrap().starts_with("Chunked"));
    assert!(client.is_at_end());
}

#[test]
fn expect_gets_its_continue() {
    let running = Running::echo(patient());
    let mut client = running.connect();
    let head = "PUT /mmds HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n";
    assert_eq!(client.ask(head), "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(body(&client.ask("7")), json!(7));
    let head = "PUT /mmds HTTP/1.1\r\nContent-Length: 51201\r\nExpect: 100-continue\r\n\r\n";
    assert!(client.ask(head).starts_with("HTTP/1.1 400 "));
}

#[test]
fn one_connection_too_many_is_turned_away() {
    let running = Running::echo(patient());
    let mut clients: Vec<_> = (0..10).map(|_| running.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.ask(GET), DONE);
    }
    let mut late = running.connect();
    let reply = late.reply();
    assert!(reply.starts_with("HTTP/1.1 503 Service Unavailable\r\nServer: Firecracker API\r\n"), "{reply}");
    assert_eq!(body(&reply), json!({ "error": "Too many open connections" }));
    assert!(late.is_at_end());
    // A place that becomes free is given to the next, without waiting.
    for _ in 0..100 {
        drop(clients.remove(0));
        clients.push(running.connect());
        assert_eq!(clients[9].ask(GET), DONE);
    }
}

#[test]
fn the_connection_that_is_idle_longest_makes_place() {
    let running = Running::echo(Limits { idle: Duration::ZERO, max_connections: 2, ..patient() });
    let (mut first, mut second) = (running.connect(), running.connect());
    assert_eq!(first.ask(GET), DONE);
    assert_eq!(second.ask(GET), DONE);
    assert_eq!(first.ask(GET), DONE);
    let mut third = running.connect();
    assert_eq!(third.ask(GET), DONE);
    assert!(second.is_at_end());
    assert_eq!(first.ask(GET), DONE);
}

#[test]
fn a_client_that_is_served_or_sends_does_not_make_place() {
    let running = Running::new(Limits { idle: Duration::ZERO, max_connections: 2, ..patient() });
    let (mut first, mut second) = (running.connect(), running.connect());
    first.send(GET);
    let (_, responder) = running.asked.recv().unwrap();
    let head = "PUT /mmds HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n";
    assert_eq!(second.ask(head), "HTTP/1.1 100 Continue\r\n\r\n");
    assert!(running.connect().reply().starts_with("HTTP/1.1 503 "));
    responder.send(Ok(Reply::Done));
    assert_eq!(first.reply(), DONE);
    second.send("7");
    running.asked.recv().unwrap().1.send(Ok(Reply::Done));
    assert_eq!(second.reply(), DONE);
}

#[test]
fn slow_heads_and_bodies_are_cut_off() {
    let running = Running::echo(Limits {
        head: Duration::from_millis(20),
        body: Duration::from_millis(20),
        ..patient()
    });
    // Idle is not slow.
    let mut idle = running.connect();
    assert_eq!(idle.ask(GET), DONE);
    let mut client = running.connect();
    client.send("GET / HTTP/1.1\r\nA:");
    assert!(client.is_at_end());
    let mut client = running.connect();
    let reply = client.ask("PUT /mmds HTTP/1.1\r\nContent-Length: 2\r\n\r\n1");
    assert!(reply.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{reply}");
    assert!(client.is_at_end());
    // The second request of a connection as well.
    let mut client = running.connect();
    assert_eq!(client.ask(GET), DONE);
    client.send("G");
    assert!(client.is_at_end());
    assert_eq!(idle.ask(GET), DONE);
}

#[test]
fn half_requests_and_garbage_end_in_a_close() {
    let running = Running::echo(patient());
    for half in ["G", "GET / HTTP/1.1\r\n", "PUT /mmds HTTP/1.1\r\nContent-Length: 9\r\n\r\n1"] {
        let mut client = running.connect();
        client.send(half);
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        let reply = client.reply();
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 400 "), "{half}: {reply}");
        assert!(client.is_at_end());
    }
    for garbage in [
        &b"\0\xff\x16\x03\x01"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"PUT /mmds HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /mmds HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n1",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let mut client = running.connect();
        client.send([garbage, b"\r\n\r\n"].concat());
        let reply = client.reply();
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 400 "), "{reply}");
        assert!(client.is_at_end());
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
    for large in [long, many] {
        let reply = running.ask(&large);
        assert!(reply.starts_with("HTTP/1.1 431 ") || reply.starts_with("HTTP/1.1 414 "), "{reply}");
    }
    let reply = running.ask("POST / HTTP/1.1\r\n\r\n");
    assert!(body(&reply)["error"].as_str().unwrap().starts_with("Invalid HTTP Method: POST."));
    assert_eq!(running.ask(GET), DONE);
}

#[test]
fn a_client_that_closes_its_side_gets_its_reply() {
    let running = Running::echo(patient());
    let mut client = running.connect();
    client.send(GET);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.reply(), DONE);
    assert!(client.is_at_end());
}

#[test]
fn a_client_that_goes_away_holds_nobody_up() {
    let running = Running::new(patient());
    let mut client = running.connect();
    client.send(GET);
    let (_, responder) = running.asked.recv().unwrap();
    drop(client);
    responder.send(Ok(Reply::Done));
    let mut client = running.connect();
    client.send(GET);
    running.asked.recv().unwrap().1.send(Ok(Reply::Done));
    assert_eq!(client.reply(), DONE);
}

#[test]
fn replies_that_nobody_reads_hold_nobody_up() {
    let running = Running::echo(Limits { max_body: 200_000, ..patient() });
    let deaf = running.connect();
    let large = put_mmds(&format!("\"{}\"", "a".repeat(190_000)));
    // Written by a thread, as it comes to a halt when the server stops to read.
    let mut stream = deaf.stream.try_clone().unwrap();
    let writer = thread::spawn(move || while stream.write_all(large.as_bytes()).is_ok() {});
    for _ in 0..100 {
        assert_eq!(running.ask(GET), DONE);
    }
    deaf.stream.shutdown(std::net::Shutdown::Both).unwrap();
    writer.join().unwrap();
}

#[test]
fn the_end_lets_the_last_reply_out_and_removes_the_socket() {
    let mut running = Running::new(patient());
    let mut idle = running.connect();
    let mut client = running.connect();
    client.send(GET);
    let (_, responder) = running.asked.recv().unwrap();
    drop(running.stop.take());
    assert!(idle.is_at_end());
    responder.send(Ok(Reply::Done));
    assert!(client.reply().starts_with("HTTP/1.1 204 "));
    assert!(client.is_at_end());
    running.end();
    assert!(!running.path().exists());
}

#[test]
fn the_end_waits_for_no_answer() {
    let mut running = Running::new(patient());
    let mut client = running.connect();
    client.send(GET);
    let _unanswered = running.asked.recv().unwrap();
    running.end();
    assert!(client.is_at_end());
}

#[test]
fn no_threads_are_started() {
    let running = Running::echo(patient());
    assert_eq!(running.ask(GET), DONE);
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // A thread of another test may have ended meanwhile.
        let comm = std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default();
        assert!(!comm.starts_with("tokio"), "{comm}");
    }
}

#[test]
fn a_socket_that_exists_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api");
    let server = Server::bind(&path).unwrap();
    let text = Server::bind(&path).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains("--api-sock"), "{text}");
    // Another's socket is not removed.
    std::fs::remove_file(&path).unwrap();
    let other = Server::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    drop(other);
    assert!(!path.exists());
    let text = Server::bind(&directory.path().join("none/api")).unwrap_err().to_string();
    assert!(text.contains("none/api"), "{text}");
}

#[test]
fn a_bound_socket_is_served_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api");
    let server = Server::from(StdListener::bind(&path).unwrap());
    let (reader, writer) = io::pipe().unwrap();
    drop(writer);
    server.run(|_, _| {}, patient(), &reader.as_fd()).unwrap();
    assert!(path.exists());
}

/// Refuses to start and does all else, and tells of what was answered.
struct Teller(mpsc::Sender<(Method, String, Option<String>)>);

impl Handler for Teller {
    fn handle(&self, action: Action, responder: Responder) {
        responder.send(match action {
            Action::Start => Err(Fault::from("No kernel.".to_owned())),
            _ => Ok(Reply::Done),
        });
    }

    fn answered(&self, method: &Method, path: &str, refusal: Option<&str>) {
        self.0.send((method.clone(), path.to_owned(), refusal.map(str::to_owned))).unwrap();
    }
}

#[test]
fn whatever_is_answered_is_told_of_refused_or_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api");
    let server = Server::bind(&path).unwrap();
    let (sender, told) = mpsc::channel();
    let (reader, stop) = io::pipe().unwrap();
    let thread = thread::spawn(move || server.run(Teller(sender), patient(), &reader.as_fd()).unwrap());
    let ask = |request: String| {
        let stream = UnixStream::connect(&path).unwrap();
        assert!(Client { stream, rest: Vec::new() }.ask(&request).starts_with("HTTP/1.1 "));
        told.recv().unwrap()
    };
    let put = |path: &str, body: &str| {
        format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };

    assert_eq!(ask("GET /version HTTP/1.1\r\n\r\n".to_owned()), (Method::GET, "/version".to_owned(), None));
    let (method, path, refusal) = ask(put("/actions", r#"{"action_type":"InstanceStart"}"#));
    assert_eq!((method, path.as_str(), refusal.as_deref()), (Method::PUT, "/actions", Some("No kernel.")));
    // By the routes, for what the body says.
    let (method, path, refusal) = ask(put("/drives/a", r#"{"drive_id":"b","is_root_device":true}"#));
    assert_eq!((method, path.as_str()), (Method::PUT, "/drives/a"));
    assert!(refusal.unwrap().contains("does not match the id"));
    // By the server, for its size.
    let (.., refusal) = ask("PUT /mmds HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n".to_owned());
    assert!(refusal.unwrap().contains("larger than the limit"));
    drop(stop);
    thread.join().unwrap();
}

#[test]
fn who_waits_for_events_holds_up_nobody() {
    let running = Running::new(patient());
    let (mut waiting, mut other) = (running.connect(), running.connect());
    waiting.send("GET /cgroup/events?timeout_ms=60000 HTTP/1.1\r\n\r\n");
    let (action, late) = running.asked.recv().unwrap();
    assert!(matches!(action, Action::GetCgroupEvents(query) if query.timeout_ms == 60_000));
    other.send("GET /version HTTP/1.1\r\n\r\n");
    let (action, responder) = running.asked.recv().unwrap();
    assert_eq!(action, Action::GetVersion);
    responder.send(Ok(Reply::Text("text/plain; version=0.0.4", "up 1\n".to_owned())));
    let reply = other.reply();
    assert!(reply.contains("Content-Type: text/plain; version=0.0.4\r\n"), "{reply}");
    assert!(reply.ends_with("\r\n\r\nup 1\n"), "{reply}");
    late.send(Ok(Reply::Json(json!({ "events": [] }))));
    assert!(waiting.reply().ends_with(r#"{"events":[]}"#));
}
