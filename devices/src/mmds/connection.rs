//! One HTTP connection.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use smoltcp::socket::tcp::{Socket, State};

use super::http::{MAX_REQUEST, Request, Response};
use super::service;
use super::store::Mmds;

#[derive(Default)]
pub(super) struct Connection {
    request: Vec<u8>,
    response: Vec<u8>,
    /// Bytes of the response that the socket has taken.
    sent: usize,
    /// Whether the response is the last.
    closing: bool,
    /// Since when we wait for the guest: to connect, to ask, or to take the response. None before it connects.
    waiting_since: Option<Instant>,
}

impl Connection {
    /// Since when we wait for the guest; bytes of a request or acknowledgements do not count, a request does.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since
    }

    /// Does what can be done without waiting. Returns whether that gave the stack something to do.
    pub(super) fn serve(&mut self, socket: &mut Socket<'_>, mmds: &Mutex<Mmds>, now: Instant) -> bool {
        if socket.state() == State::Listen {
            self.waiting_since = None;
            return false;
        }
        self.waiting_since.get_or_insert(now);
        let mut progress = false;
        while matches!(socket.state(), State::Established | State::CloseWait) {
            let mut news = false;
            if self.sent < self.response.len() {
                // Not an error: data can be sent in both states.
                let sent = socket.send_slice(&self.response[self.sent..]).unwrap_or(0);
                self.sent += sent;
                progress |= sent > 0;
                if self.sent < self.response.len() {
                    return progress;
                }
                self.response = Vec::new();
                self.sent = 0;
                self.waiting_since = Some(now);
                news = true;
            }
            if !self.closing {
                let received = self.receive(socket) > 0;
                progress |= received;
                // What was looked at before and was no complete request is not looked at again.
                let answered = (received || news) && self.answer(mmds, now);
                if received || answered {
                    continue;
                }
                if socket.may_recv() {
                    return progress;
                }
            }
            socket.close();
            return true;
        }
        progress
    }

    /// Takes what the socket has received, as far as a request goes.
    fn receive(&mut self, socket: &mut Socket<'_>) -> usize {
        let room = MAX_REQUEST - self.request.len();
        // An error is the end of what the guest sends.
        socket
            .recv(|data| {
                let taken = data.len().min(room);
                self.request.extend_from_slice(&data[..taken]);
                (taken, taken)
            })
            .unwrap_or(0)
    }

    /// Answers the next request, if it is complete.
    fn answer(&mut self, mmds: &Mutex<Mmds>, now: Instant) -> bool {
        let (len, minor, response) = match Request::parse(&self.request) {
            Ok(None) => return false,
            Ok(Some((len, request))) => {
                self.closing = request.close;
                // A panic elsewhere left the document as it was before or after a change.
                let mut mmds = mmds.lock().unwrap_or_else(PoisonError::into_inner);
                (len, request.minor, service::answer(&request, &mut mmds, now))
            }
            Err(refusal) => {
                self.closing = true;
                (self.request.len(), 1, refusal)
            }
        };
        self.request.drain(..len);
        self.response = Response::encode(&response, minor, self.closing);
        true
    }
}
