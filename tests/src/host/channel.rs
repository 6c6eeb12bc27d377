//! The harness's end of the line to the host's agent.

use crate::agent::{Reply, Request};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// A connection to the agent.
pub struct Channel {
    stream: UnixStream,
    replies: Receiver<Reply>,
}

/// Why no reply came.
#[derive(Debug, PartialEq, Eq)]
pub enum Silence {
    /// The time is over.
    Timeout,
    /// The other end is gone.
    Closed,
}

impl Channel {
    /// Connects to QEMU's socket of the virtio port.
    pub fn connect(socket: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let lines = BufReader::new(stream.try_clone()?).lines();
        let (sender, replies) = mpsc::channel();
        std::thread::spawn(move || {
            // What is no reply (the port's first moments may bring noise) is passed over.
            for reply in lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()) {
                if sender.send(reply).is_err() {
                    return;
                }
            }
        });
        Ok(Self { stream, replies })
    }

    /// Sends a request.
    pub fn send(&mut self, request: &Request) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }

    /// Waits for the next reply.
    pub fn receive(&self, timeout: Duration) -> Result<Reply, Silence> {
        self.replies.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => Silence::Timeout,
            RecvTimeoutError::Disconnected => Silence::Closed,
        })
    }
}
