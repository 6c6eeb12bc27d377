//! What a connection is at, so that slow clients can be told from patient ones.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No byte of a request has come since then.
    Idle(Instant),
    /// The head of a request has been coming since then.
    Head(Instant),
    /// A request is being read or answered.
    Serving,
}

/// Who tells what a connection is at.
#[derive(Clone, Debug)]
pub(crate) struct Progress(watch::Sender<Stage>);

impl Progress {
    /// Of a new connection.
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Stage::Idle(Instant::now())))
    }

    /// The head of a request is complete.
    pub(crate) fn served_from_now(&self) {
        self.0.send_replace(Stage::Serving);
    }

    /// The answer to a request is on its way.
    pub(crate) fn idle_from_now(&self) {
        self.0.send_replace(Stage::Idle(Instant::now()));
    }

    /// Since when the connection is idle; `None` when it is not.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        match *self.0.borrow() {
            Stage::Idle(since) => Some(since),
            Stage::Head(_) | Stage::Serving => None,
        }
    }

    /// Waits for a head that takes longer than `limit`.
    pub(crate) async fn overdue(&self, limit: Duration) {
        let mut stage = self.0.subscribe();
        loop {
            let now = *stage.borrow_and_update();
            // The sender is `self`: it is there as long as this runs.
            match now {
                Stage::Head(since) => {
                    if timeout_at(since + limit, stage.changed()).await.is_err() {
                        return;
                    }
                }
                Stage::Idle(_) | Stage::Serving => drop(stage.changed().await),
            }
        }
    }
}

/// A stream that tells when the first bytes of a request come.
pub(crate) struct Watched {
    stream: UnixStream,
    progress: Progress,
}

impl Watched {
    /// `stream`, which tells `progress`.
    pub(crate) fn new(stream: UnixStream, progress: Progress) -> Self {
        Self { stream, progress }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.progress.0.send_if_modified(|stage| {
                let starts = matches!(stage, Stage::Idle(_));
                if starts {
                    *stage = Stage::Head(Instant::now());
                }
                starts
            });
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
