//! As much of HTTP/1.0 and 1.1 as the guest needs to read metadata: requests without a body, one after another.

/// Bytes that a request may have.
pub(super) const MAX_REQUEST: usize = 4096;

/// Headers that a request may have.
const MAX_HEADERS: usize = 64;

/// Names of the token headers: ours, and those of EC2's service.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
    Other,
}

/// What we look at in a request.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    /// The path, of either form of the target. None if there is none in it.
    pub(super) path: Option<&'a str>,
    /// The last digit of the version.
    pub(super) minor: u8,
    /// Whether the connection is to be closed after the response.
    pub(super) close: bool,
    /// Whether JSON is asked for.
    pub(super) accepts_json: bool,
    /// Whether it came through a proxy that says so.
    pub(super) forwarded: bool,
    pub(super) token: Option<&'a [u8]>,
    /// The lifetime asked for, with the name of its header.
    pub(super) ttl: Option<(&'static str, &'a [u8])>,
}

impl<'a> Request<'a> {
    /// Reads the request that `bytes` begin with, and says how many bytes it has. None if it is not complete.
    ///
    /// # Errors
    /// The response to what is no request that we take, after which nothing can be read.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Option<(usize, Self)>, Response> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        let len = match parsed.parse(bytes) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) if bytes.len() < MAX_REQUEST => return Ok(None),
            Ok(httparse::Status::Partial) => {
                return Err(Response::text(Status::HeadersTooLarge, "The request is too large."));
            }
            Err(httparse::Error::Version) => {
                return Err(Response::text(Status::NotImplemented, "Unsupported HTTP version."));
            }
            Err(_) => return Err(Response::text(Status::BadRequest, "Invalid request.")),
        };
        let headers = Headers(parsed.headers);
        if headers.all("Content-Length").any(|len| len != b"0") || headers.get("Transfer-Encoding").is_some()
        {
            return Err(Response::text(Status::BadRequest, "Invalid request: it has a body."));
        }
        let method = match parsed.method {
            Some("GET") => Method::Get,
            Some("PUT") => Method::Put,
            _ => Method::Other,
        };
        let minor = parsed.version.unwrap_or_default();
        let connection = headers.get("Connection").unwrap_or_default();
        let close = if minor == 0 {
            !connection.eq_ignore_ascii_case(b"keep-alive")
        } else {
            connection.eq_ignore_ascii_case(b"close")
        };
        let request = Self {
            method,
            path: parsed.path.and_then(path_of),
            minor,
            // What another method is followed by is not known, so nothing is read after it.
            close: close || method == Method::Other,
            accepts_json: headers
                .get("Accept")
                .is_some_and(|is| is.eq_ignore_ascii_case(b"application/json")),
            forwarded: headers.get("X-Forwarded-For").is_some(),
            token: TOKEN.into_iter().find_map(|name| headers.get(name)),
            ttl: TTL.into_iter().find_map(|name| Some((name, headers.get(name)?))),
        };
        Ok(Some((len, request)))
    }
}

struct Headers<'h, 'a>(&'h [httparse::Header<'a>]);

impl<'a> Headers<'_, 'a> {
    /// The values of the headers of that name, without the white space around them.
    fn all(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        let headers = self.0.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        headers.map(|header| header.value.trim_ascii())
    }

    /// The value of the first of them.
    fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.all(name).next()
    }
}

/// The path in a target of the form `/path` or `http://host/path`.
fn path_of(target: &str) -> Option<&str> {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map(|at| &rest[at..]),
        None => target.starts_with('/').then_some(target),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    HeadersTooLarge,
    NotImplemented,
    Unavailable,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadersTooLarge => "431 Request Header Fields Too Large",
            Self::NotImplemented => "501 Not Implemented",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

#[derive(Debug)]
pub(super) struct Response {
    status: Status,
    content_type: &'static str,
    header: Option<(&'static str, String)>,
    body: String,
}

impl Response {
    pub(super) fn text(status: Status, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain", header: None, body: body.into() }
    }

    pub(super) fn json(body: String) -> Self {
        Self { content_type: "application/json", ..Self::text(Status::Ok, body) }
    }

    pub(super) fn with_header(self, name: &'static str, value: impl Into<String>) -> Self {
        Self { header: Some((name, value.into())), ..self }
    }

    /// Writes the response to a request of version 1.`minor`.
    pub(super) fn encode(&self, minor: u8, close: bool) -> Vec<u8> {
        let Self { status, content_type, header, body } = self;
        let header = header.as_ref().map(|(name, value)| format!("{name}: {value}\r\n")).unwrap_or_default();
        let head = format!(
            "HTTP/1.{minor} {status}\r\nConnection: {connection}\r\n{header}Content-Type: {content_type}\r\n\
             Content-Length: {length}\r\n\r\n",
            status = status.line(),
            connection = if close { "close" } else { "keep-alive" },
            length = body.len(),
        );
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

#[cfg(test)]
mod tests;
