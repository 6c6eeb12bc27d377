//! The API of a VM under test, as bytes on a socket.

use super::PATIENCE;
use crate::case::Failure;
use crate::check;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A client that makes a connection for each request, unless asked for one.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value, Failure> {
        Ok(serde_json::from_str(&self.body)?)
    }

    /// The text of a refusal.
    pub fn fault(&self) -> Result<String, Failure> {
        check!(self.status == 400, "not refused: {self:?}");
        let body = self.json()?;
        body["fault_message"].as_str().map(str::to_owned).ok_or_else(|| Failure(format!("no text: {self:?}")))
    }
}

impl Api {
    /// Waits until somebody listens on `socket`.
    pub fn connect(socket: &Path) -> Result<Self, Failure> {
        let api = Self { socket: socket.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while let Err(failure) = api.connection() {
            check!(Instant::now() < deadline, "{failure}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(api)
    }

    /// A connection to send several requests on.
    pub fn connection(&self) -> Result<Connection, Failure> {
        let stream = UnixStream::connect(&self.socket)
            .map_err(|error| Failure(format!("cannot connect to {}: {error}", self.socket.display())))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    /// Sends a request with a body, as clients do.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<Response, Failure> {
        let mut connection = self.connection()?;
        connection.send(&request(method, path, body))?;
        connection.response()
    }

    /// GET, which has to succeed.
    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        let response = self.request("GET", path, "")?;
        check!(response.status == 200, "GET {path}: {response:?}");
        response.json()
    }

    /// PUT, which has to succeed.
    pub fn put(&self, path: &str, body: &Value) -> Result<(), Failure> {
        self.change("PUT", path, body)
    }

    /// PATCH, which has to succeed.
    pub fn patch(&self, path: &str, body: &Value) -> Result<(), Failure> {
        self.change("PATCH", path, body)
    }

    /// Declares what a configuration file holds, but for the placement, and starts it. The vCPU threads are where they
    /// belong when this returns; the guest has hardly begun.
    pub fn start(&self, config: &Value) -> Result<(), Failure> {
        for section in ["boot-source", "machine-config", "balloon"] {
            if let Some(body) = config.get(section) {
                self.put(&format!("/{section}"), body)?;
            }
        }
        for (list, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
            for body in config[list].as_array().into_iter().flatten() {
                let id = body[id].as_str().unwrap_or_default();
                self.put(&format!("/{list}/{id}"), body)?;
            }
        }
        self.put("/actions", &json!({ "action_type": "InstanceStart" }))
    }

    fn change(&self, method: &str, path: &str, body: &Value) -> Result<(), Failure> {
        let response = self.request(method, path, &body.to_string())?;
        check!(response.status == 204 && response.body.is_empty(), "{method} {path} {body}: {response:?}");
        Ok(())
    }
}

/// A request as text.
pub fn request(method: &str, path: &str, body: &str) -> String {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    match body {
        "" => format!("{head}\r\n"),
        body => {
            format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }
    }
}

impl Connection {
    /// Sends bytes as they are.
    pub fn send(&mut self, text: &str) -> Result<(), Failure> {
        Ok(self.stream.get_mut().write_all(text.as_bytes())?)
    }

    /// Reads the next answer.
    pub fn response(&mut self) -> Result<Response, Failure> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let count = self.stream.read_line(&mut head)?;
            check!(count > 0, "the connection was closed after `{head}`");
        }
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let length = head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map_or(Ok(0), |(_, value)| value.trim().parse())?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        let status = status.ok_or_else(|| Failure(format!("no status in `{head}`")))?;
        Ok(Response { status, head, body: String::from_utf8_lossy(&body).into_owned() })
    }
}
