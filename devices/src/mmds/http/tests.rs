use super::*;

fn parse(bytes: &[u8]) -> (usize, Request<'_>) {
    Request::parse(bytes).unwrap().unwrap()
}

fn refusal(bytes: &[u8]) -> Status {
    Request::parse(bytes).unwrap_err().status
}

#[test]
fn a_request_is_read_when_it_is_complete() {
    let bytes = b"GET /a/b HTTP/1.1\r\nHost: x\r\naccept:  Application/JSON \r\n\r\nGET /c";
    let end = bytes.len() - b"GET /c".len();
    for len in 0..end {
        assert!(Request::parse(&bytes[..len]).unwrap().is_none(), "{len} bytes");
    }
    let (len, request) = parse(bytes);
    assert_eq!((len, request.method, request.path), (end, Method::Get, Some("/a/b")));
    assert!(request.accepts_json && !request.forwarded && !request.close);
    assert_eq!((request.minor, request.token, request.ttl), (1, None, None));
}

#[test]
fn targets_and_methods_are_told_apart() {
    for (line, method, path) in [
        ("GET / HTTP/1.1", Method::Get, Some("/")),
        ("PUT http://169.254.169.254:80/x/y HTTP/1.1", Method::Put, Some("/x/y")),
        ("GET http://169.254.169.254 HTTP/1.1", Method::Get, None),
        ("GET http:// HTTP/1.1", Method::Get, None),
        ("GET x HTTP/1.1", Method::Get, None),
        ("OPTIONS * HTTP/1.1", Method::Other, None),
        ("get / HTTP/1.1", Method::Other, Some("/")),
    ] {
        let bytes = format!("{line}\r\n\r\n");
        let (_, request) = parse(bytes.as_bytes());
        assert_eq!((request.method, request.path), (method, path), "{line}");
        assert_eq!(request.close, method == Method::Other, "{line}");
    }
}

#[test]
fn headers_are_found_whatever_their_case() {
    let (_, request) = parse(b"GET / HTTP/1.0\r\nX-METADATA-TOKEN: t\r\nx-forwarded-for: 1.2.3.4\r\n\r\n");
    assert_eq!((request.token, request.forwarded, request.minor), (Some(&b"t"[..]), true, 0));
    let (_, request) = parse(
        b"PUT / HTTP/1.1\r\nx-aws-ec2-metadata-token-ttl-seconds: 7\r\nX-aws-ec2-metadata-token: u\r\n\r\n",
    );
    assert_eq!(request.token, Some(&b"u"[..]));
    assert_eq!(request.ttl, Some(("X-aws-ec2-metadata-token-ttl-seconds", &b"7"[..])));
}

#[test]
fn the_connection_stays_open_as_the_version_has_it() {
    for (bytes, close) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], false),
        (b"GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", true),
        (b"GET / HTTP/1.0\r\n\r\n", true),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", false),
    ] {
        assert_eq!(parse(bytes).1.close, close);
    }
}

#[test]
fn what_is_no_request_is_refused() {
    assert_eq!(refusal(b"\x16\x03\x01\x02\x00"), Status::BadRequest);
    assert_eq!(refusal(b"GET / HTTP/1.1\r\nbad header\r\n\r\n"), Status::BadRequest);
    assert_eq!(refusal(b"GET / HTTP/2.0\r\n\r\n"), Status::NotImplemented);
    assert_eq!(
        refusal(b"PUT / HTTP/1.1\r\nContent-Length: 0\r\ncontent-length: 3\r\n\r\nabc"),
        Status::BadRequest
    );
    assert_eq!(refusal(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Status::BadRequest);
    assert_eq!(refusal(&[b'A'; MAX_REQUEST]), Status::HeadersTooLarge);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    assert_eq!(refusal(many.as_bytes()), Status::BadRequest);
    assert!(Request::parse(b"PUT / HTTP/1.1\r\nContent-Length: 0\r\n\r\n").unwrap().is_some());
}

#[test]
fn a_response_says_what_it_holds() {
    let response = Response::json("[1]".into()).with_header("X-a", "b").encode(1, false);
    assert_eq!(
        String::from_utf8(response).unwrap(),
        "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nX-a: b\r\nContent-Type: application/json\r\n\
         Content-Length: 3\r\n\r\n[1]"
    );
    let response = Response::text(Status::NotFound, "é").encode(0, true);
    assert_eq!(
        String::from_utf8(response).unwrap(),
        "HTTP/1.0 404 Not Found\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\né"
    );
}
