//! The API's thread, and the way from it to the event loop.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use api_server::{Handler, Limits, Method, Responder, Server, ServerError};
use event_manager::{EventOps, Events, MutEventSubscriber};
use resources::Action;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::args::Args;
use crate::event_loop::EventLoop;
use crate::metrics::METRICS;
use crate::seccomp::{Filters, Role};

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The socket.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The thread, or its eventfds.
    #[error("cannot start the thread of the API: {doing}")]
    Thread {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// The thread that serves HTTP. It ends when this is dropped.
pub struct Api {
    /// Until the end.
    requests: Option<Receiver<(Action, Responder)>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    /// Binds the socket and starts the thread; `event_loop` is woken by each request.
    pub fn start(args: &Args, filters: &Filters, event_loop: &mut EventLoop) -> Result<Self, ApiError> {
        let failed = |doing| move |source| ApiError::Thread { doing, source };
        let server = Server::bind(&args.api_sock)?.prepare()?;
        let limits = Limits { max_body: args.http_api_max_payload_size, ..Limits::default() };
        let stop = EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(failed("eventfd"))?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(failed("eventfd"))?;
        event_loop.add(Doorbell(wake.try_clone().map_err(failed("dup"))?));
        let (sender, requests) = mpsc::channel();
        let handler = HandOver { sender, wake };
        let stopped = Arc::clone(&stop);
        let serve = move || {
            if let Err(error) = server.run(handler, limits, &stopped) {
                log::error!("the API ends: {}", crate::exit::chain(&error));
            }
        };
        let thread = filters.spawn(Role::Api, "pinfold_api".to_owned(), serve).map_err(failed("spawn"))?;
        Ok(Self { requests: Some(requests), stop, thread: Some(thread) })
    }

    /// The next request, if there is one.
    pub fn next(&self) -> Option<(Action, Responder)> {
        self.requests.as_ref()?.try_recv().ok()
    }
}

/// Hands requests over to the event loop, and counts them.
struct HandOver {
    sender: Sender<(Action, Responder)>,
    wake: EventFd,
}

impl Handler for HandOver {
    fn handle(&self, action: Action, responder: Responder) {
        // When nobody listens any more the responder is dropped, and says so.
        if self.sender.send((action, responder)).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            log::error!("a request cannot wake the event loop: {error}");
        }
    }

    fn answered(&self, method: &Method, path: &str, refusal: Option<&str>) {
        METRICS.count_request(method.as_str(), path, refusal.is_some());
        if let Some(message) = refusal {
            log::info!("{method} {path} was refused: {message}");
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // Whoever still waits for an answer is told that there will be none.
        self.requests = None;
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop the API: {error}");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Wakes the event loop, whose owner then asks for requests.
struct Doorbell(EventFd);

impl MutEventSubscriber for Doorbell {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        crate::event_loop::register(ops, Events::new(&self.0, EventSet::IN), "requests to the API");
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // It fails when there is nothing to drain.
        let _ = self.0.read();
    }
}
