//! HTTP/1.1 on a unix socket, in one thread.
//!
//! Requests of all connections are handed on one at a time, in the order in which their last byte came; the next
//! waits for the answer. So one connection's pipelined requests hold up others by one request at most, and only
//! what the limits allow is in memory: a head, a body and a reply for each connection. Only requests whose
//! answer takes time, such as those for events, hold up nobody.
//!
//! | what a client does | what it gets |
//! | --- | --- |
//! | connects when all connections are in use | the place of the one that was idle longest, if that was more than [`Limits::idle`]; else 503 |
//! | sends nothing | nothing; it is disconnected when others need its place |
//! | sends a head slowly | end of file after [`Limits::head`] |
//! | sends a body slowly | 408 after [`Limits::body`] |
//! | announces a body larger than [`Limits::max_body`], or sends it in chunks | 400, and end of file |
//! | does not read its replies | its further requests are not read; it counts as idle |
//! | breaks the syntax of HTTP | 400 (414 or 431 for a head beyond the limits), or nothing, and end of file |
//!
//! The last line is the HTTP library's: such a reply has no body, where Firecracker's says what is wrong.
//! Firecracker also keeps a connection after an oversized body. Names of headers are in Firecracker's spelling.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::CONNECTION;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use resources::{Action, Outcome, Reply};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet, LocalSet, yield_now};
use tokio::time::{Instant, sleep, timeout};

use crate::connection::{Progress, Watched};
use crate::reply::{self, HttpReply, Refusal};
use crate::routes;

/// Bytes of a head. The library's least buffer for a connection is as large.
const MAX_HEAD: usize = 8192;

/// Headers of a request.
const MAX_HEADERS: usize = 64;

/// How long connections have to pass on the last replies when the server is stopped.
const LINGER: Duration = Duration::from_millis(250);

/// Turns that connections get to notice that they are closed, before another client is turned away.
const YIELDS: usize = 4;

/// Pause after a connection could not be accepted, as when there are no descriptors left.
const BREATH: Duration = Duration::from_millis(50);

/// Descriptors that the runtime takes, and some to spare: epoll's and two copies, an eventfd, a pair of sockets.
const RUNTIME_FDS: usize = 8;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Something is at the socket's path.
    #[error(
        "cannot make the API's socket {path:?}: it exists already; if no microVM uses it any more remove it, else \
         choose another with --api-sock"
    )]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error(
        "cannot make the API's socket {path:?}; check the directory, or choose another socket with --api-sock"
    )]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The socket cannot be served.
    #[error("cannot serve the API's socket: {doing}")]
    Serve {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What clients may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Connections at a time.
    pub max_connections: usize,
    /// How long the head of a request may take from its first byte on.
    pub head: Duration,
    /// How long the body of a request may take.
    pub body: Duration,
    /// How long a connection may be idle when all are in use and another client comes.
    pub idle: Duration,
}

impl Default for Limits {
    /// Firecracker's 51200 bytes and 10 connections.
    fn default() -> Self {
        Self {
            max_body: 51200,
            max_connections: 10,
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            idle: Duration::from_secs(5),
        }
    }
}

/// The way back to the client for the answer to one action. When it is dropped without an answer, the client is
/// told that there is none (status 500).
#[derive(Debug)]
pub struct Responder(oneshot::Sender<Outcome>);

impl Responder {
    /// Answers, from whatever thread. A client that is gone does not hear it.
    pub fn send(self, outcome: Outcome) {
        // It fails when the client is gone.
        let _ = self.0.send(outcome);
    }
}

/// Who does what clients ask. It is called in the server's thread and must not block.
pub trait Handler {
    /// Takes an action; whoever it gives the [`Responder`] to answers.
    fn handle(&self, action: Action, responder: Responder);

    /// A request was answered. `path` is as the client sent it; `refusal` is what it was told when it was refused,
    /// be it by the server. Requests that are no HTTP are not heard of.
    fn answered(&self, method: &Method, path: &str, refusal: Option<&str>) {
        let _ = (method, path, refusal);
    }
}

impl<F: Fn(Action, Responder)> Handler for F {
    fn handle(&self, action: Action, responder: Responder) {
        self(action, responder);
    }
}

/// A file that is removed at the end, unless another has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    path.symlink_metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Nobody is hurt by a socket that stays.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket that listens. Clients can connect to it from the start; they are served by [`Server::run`].
#[derive(Debug)]
pub struct Server {
    listener: StdListener,
    file: Option<SocketFile>,
}

impl From<StdListener> for Server {
    /// Serves a socket that somebody else has bound, and that stays when the server ends.
    fn from(listener: StdListener) -> Self {
        Self { listener, file: None }
    }
}

impl Server {
    /// Makes the socket, which is removed when the server ends. Nothing that exists is removed to make place, as
    /// in Firecracker.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let listener = StdListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ServerError::Exists { path: path.to_owned() },
            _ => ServerError::Bind { path: path.to_owned(), source },
        })?;
        let file = SocketFile { path: path.to_owned(), identity: identity(path) };
        Ok(Self { listener, file: Some(file) })
    }

    /// Makes what serving takes, so that the thread that serves needs to make no descriptors of its own.
    pub fn prepare(self) -> Result<Prepared, ServerError> {
        let failed = |doing| move |source| ServerError::Serve { doing, source };
        // The library panics when it cannot have some of its descriptors.
        let spare: io::Result<Vec<_>> = (0..RUNTIME_FDS).map(|_| self.listener.try_clone()).collect();
        drop(spare.map_err(failed("making the runtime"))?);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(failed("making the runtime"))?;
        self.listener.set_nonblocking(true).map_err(failed("fcntl"))?;
        let served = self.listener.try_clone().map_err(failed("dup"))?;
        Ok(Prepared { runtime, served, server: self })
    }

    /// Serves in the calling thread, see [`Prepared::run`].
    pub fn run(
        self,
        handler: impl Handler + 'static,
        limits: Limits,
        stop: &impl AsRawFd,
    ) -> Result<(), ServerError> {
        self.prepare()?.run(handler, limits, stop)
    }
}

/// A socket that is ready to be served, in whatever thread.
#[derive(Debug)]
pub struct Prepared {
    runtime: Runtime,
    served: StdListener,
    server: Server,
}

impl Prepared {
    /// Serves until `stop` is readable; then connections get a moment to pass on the last replies, and the socket
    /// is removed. Starts no thread. `stop` owns its descriptor, such as an eventfd.
    pub fn run(
        self,
        handler: impl Handler + 'static,
        limits: Limits,
        stop: &impl AsRawFd,
    ) -> Result<(), ServerError> {
        let failed = |doing| move |source| ServerError::Serve { doing, source };
        let Self { runtime, served, server: Server { listener: _listener, file } } = self;
        let service = Rc::new(Service { handler: Box::new(handler), turn: Mutex::new(()), limits });
        LocalSet::new().block_on(&runtime, async {
            let listener = UnixListener::from_std(served).map_err(failed("epoll_ctl"))?;
            // SAFETY: `stop` is borrowed for the whole of this function, so its descriptor stays open and the same
            // for longer than this.
            let stop = unsafe { AsyncFd::register_with_interest(stop.as_raw_fd(), Interest::READABLE) }
                .map_err(|error| failed("watching for the end")(error.into()))?;
            let mut connections = Connections::new(service);
            loop {
                tokio::select! {
                    _ = stop.readable() => break,
                    () = connections.reap() => {}
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => connections.admit(stream).await,
                        Err(_) => sleep(BREATH).await,
                    },
                }
            }
            drop(listener);
            connections.finish().await;
            Ok(())
        })?;
        drop(file);
        Ok(())
    }
}

/// The connections there are.
struct Connections {
    service: Rc<Service>,
    tasks: JoinSet<()>,
    open: Vec<Open>,
    /// Becomes `true` when connections are to end.
    ending: watch::Sender<bool>,
}

struct Open {
    progress: Progress,
    task: AbortHandle,
}

impl Connections {
    fn new(service: Rc<Service>) -> Self {
        Self { service, tasks: JoinSet::new(), open: Vec::new(), ending: watch::Sender::new(false) }
    }

    /// Waits for the end of a connection and forgets it; for ever while there is none.
    async fn reap(&mut self) {
        if self.tasks.join_next().await.is_none() {
            std::future::pending::<()>().await;
        }
        self.forget_ended();
    }

    fn forget_ended(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|open| !open.task.is_finished());
    }

    /// Serves a new client, or turns it away.
    async fn admit(&mut self, stream: UnixStream) {
        let Limits { max_connections, idle, .. } = self.service.limits;
        // What was closed before this client came may not have been seen yet: the runtime looks for events when
        // this yields, then runs this before the connections, which need a turn or two to end.
        for _ in 0..YIELDS {
            if self.open.len() < max_connections {
                break;
            }
            yield_now().await;
            self.forget_ended();
        }
        if self.open.len() >= max_connections && !self.evict(idle) {
            // The buffer of a new socket has place for it; a client that is gone does not need it.
            let _ = stream.try_write(reply::TOO_MANY);
            return;
        }
        let progress = Progress::new();
        let serving = serve(stream, progress.clone(), Rc::clone(&self.service), self.ending.subscribe());
        let task = self.tasks.spawn_local(serving);
        self.open.push(Open { progress, task });
    }

    /// Ends the connection that is idle longest, if it is so for more than `idle`.
    fn evict(&mut self, idle: Duration) -> bool {
        let idles = self.open.iter().enumerate();
        let oldest = idles.filter_map(|(index, open)| Some((open.progress.idle_since()?, index))).min();
        match oldest {
            Some((since, index)) if Instant::now().duration_since(since) >= idle => {
                self.open.swap_remove(index).task.abort();
                true
            }
            _ => false,
        }
    }

    /// Lets requests that are being answered end, for a moment.
    async fn finish(mut self) {
        self.ending.send_replace(true);
        // Those that do not end in time are dropped.
        let _ = timeout(LINGER, async { while self.tasks.join_next().await.is_some() {} }).await;
    }
}

/// Serves one connection to its end.
async fn serve(
    stream: UnixStream,
    progress: Progress,
    service: Rc<Service>,
    mut ending: watch::Receiver<bool>,
) {
    let limit = service.limits.head;
    let answer = service_fn(|request| {
        let (service, progress) = (Rc::clone(&service), progress.clone());
        async move {
            progress.served_from_now();
            let last = request
                .headers()
                .get(CONNECTION)
                .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
            let mut reply = service.answer(request).await;
            if last {
                reply::ends_connection(&mut reply);
            }
            progress.idle_from_now();
            Ok::<_, Infallible>(reply)
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .title_case_headers(true)
        .auto_date_header(false)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD)
        .max_buf_size(2 * MAX_HEAD)
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(Watched::new(stream, progress.clone())), answer);
    tokio::pin!(connection);
    loop {
        tokio::select! {
            // An error is the client's: it breaks off, or what it sends is no HTTP, which it has been told.
            _ = connection.as_mut() => return,
            () = progress.overdue(limit) => return,
            Ok(()) = ending.changed() => connection.as_mut().graceful_shutdown(),
        }
    }
}

/// What all connections share.
struct Service {
    handler: Box<dyn Handler>,
    /// Held from the moment an action is handed on until it is answered. It is fair.
    turn: Mutex<()>,
    limits: Limits,
}

impl Service {
    async fn answer(&self, request: hyper::Request<Incoming>) -> HttpReply {
        let (head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("", |path| path.as_str());
        let mut deprecated = false;
        let outcome = self.outcome(&head.method, path, body, &mut deprecated).await;
        self.handler.answered(&head.method, path, outcome.as_ref().err().map(Refusal::message));
        let mut reply =
            outcome.map_or_else(|refusal| reply::refused(&refusal), |answer| reply::done(&answer));
        if deprecated {
            reply::deprecates(&mut reply);
        }
        reply
    }

    /// Sets `deprecated` once it is known.
    async fn outcome(
        &self,
        method: &Method,
        path: &str,
        body: Incoming,
        deprecated: &mut bool,
    ) -> Result<Reply, Refusal> {
        if ![Method::GET, Method::PUT, Method::PATCH, Method::DELETE].contains(method) {
            return Err(bad(format!("Invalid HTTP Method: {method}.")));
        }
        let body = self.read(body).await?;
        let request = routes::parse(method, path, &body).map_err(Refusal::Fault)?;
        drop(body);
        *deprecated = request.deprecated;
        // Who waits for events, say, must not hold up the others.
        let _turn = match request.action.takes_time() {
            true => None,
            false => Some(self.turn.lock().await),
        };
        let (sender, answer) = oneshot::channel();
        self.handler.handle(request.action, Responder(sender));
        match answer.await {
            Ok(outcome) => outcome.map_err(Refusal::Fault),
            Err(_) => Err(Refusal::Unanswered),
        }
    }

    /// The body, unless it breaks the limits.
    async fn read(&self, body: Incoming) -> Result<Vec<u8>, Refusal> {
        let Some(announced) = body.size_hint().exact() else {
            return Err(bad("Chunked bodies are not supported: send a Content-Length.".to_owned()));
        };
        let limit = self.limits.max_body;
        if !usize::try_from(announced).is_ok_and(|announced| announced <= limit) {
            return Err(bad(format!(
                "Request payload with size {announced} is larger than the limit of {limit} allowed by server."
            )));
        }
        match timeout(self.limits.body, collect(body)).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(_)) => Err(bad("The body ends before its Content-Length.".to_owned())),
            Err(_) => {
                let message = "The body does not come in time.".to_owned();
                Err(Refusal::Rules(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }
}

fn bad(message: String) -> Refusal {
    Refusal::Rules(StatusCode::BAD_REQUEST, message)
}

/// Copies the pieces of a body: each keeps a whole read buffer alive, however small it is.
async fn collect(mut body: Incoming) -> Result<Vec<u8>, hyper::Error> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame?.data_ref() {
            bytes.extend_from_slice(data);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
