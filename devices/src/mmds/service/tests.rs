use std::time::Duration;

use serde_json::json;

use super::*;

fn mmds(version: Version) -> Mmds {
    let mut mmds = Mmds::new(51_200);
    mmds.put(json!({"latest": {"meta-data": {"id": "i-1", "cores": 2}}})).unwrap();
    mmds.set_version(version);
    mmds
}

/// Status and body of the response, and its other lines in lower case.
fn ask(mmds: &mut Mmds, now: Instant, line: &str, headers: &str) -> (u16, String, String) {
    let bytes = format!("{line} HTTP/1.1\r\n{headers}\r\n");
    let (_, request) = Request::parse(bytes.as_bytes()).unwrap().unwrap();
    let response =
        String::from_utf8(answer(&request, mmds, now).encode(request.minor, request.close)).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned(), head.to_ascii_lowercase())
}

fn token(mmds: &mut Mmds, now: Instant, ttl: &str) -> String {
    let (status, token, head) = ask(mmds, now, "PUT //latest/api//token", ttl);
    assert_eq!(status, 200, "{token}");
    assert!(head.contains(&ttl.trim().to_ascii_lowercase()), "{head}");
    assert!(head.contains("content-type: text/plain"), "{head}");
    token
}

#[test]
fn version_1_needs_no_token_and_looks_at_none() {
    let (mut mmds, now) = (mmds(Version::V1), Instant::now());
    for headers in ["", "X-metadata-token: rubbish\r\n"] {
        let (status, body, head) = ask(&mut mmds, now, "GET /latest/meta-data/id", headers);
        assert_eq!((status, body.as_str()), (200, "i-1"));
        assert!(head.contains("content-type: text/plain"), "{head}");
    }
    assert!(!token(&mut mmds, now, "X-metadata-token-ttl-seconds: 60\r\n").is_empty());
}

#[test]
fn version_2_needs_a_token_that_is_valid() {
    let (mut mmds, now) = (mmds(Version::V2), Instant::now());
    let line = "GET /latest/meta-data/id";
    let (status, body, _) = ask(&mut mmds, now, line, "");
    assert_eq!(status, 401);
    assert!(body.starts_with("No MMDS token provided."), "{body}");
    let (status, body, _) = ask(&mut mmds, now, line, "X-metadata-token: rubbish\r\n");
    assert_eq!((status, body.as_str()), (401, "MMDS token not valid."));
    for ttl in ["X-metadata-token-ttl-seconds: 60\r\n", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n"] {
        let token = token(&mut mmds, now, ttl);
        for name in ["X-metadata-token", "x-aws-ec2-metadata-token"] {
            let header = format!("{name}: {token}\r\n");
            let later = now + Duration::from_secs(59);
            assert_eq!(ask(&mut mmds, later, line, &header).0, 200);
            let later = now + Duration::from_secs(60);
            assert_eq!(ask(&mut mmds, later, line, &header).0, 401);
        }
    }
}

#[test]
fn the_format_follows_the_accept_header_unless_it_is_to_be_imds() {
    let (mut mmds, now) = (mmds(Version::V1), Instant::now());
    let json = "Accept: application/json\r\n";
    let (status, body, head) = ask(&mut mmds, now, "GET /latest/", json);
    assert_eq!((status, body.as_str()), (200, r#"{"meta-data":{"cores":2,"id":"i-1"}}"#));
    assert!(head.contains("content-type: application/json"), "{head}");
    for headers in ["", "Accept: */*\r\n", "Accept: text/plain\r\n"] {
        assert_eq!(ask(&mut mmds, now, "GET /latest", headers).1, "meta-data/");
    }
    assert_eq!(ask(&mut mmds, now, "GET /latest/meta-data/cores", "").0, 501);
    assert_eq!(ask(&mut mmds, now, "GET /latest/meta-data/cores", json).1, "2");

    mmds.set_imds_compat(true);
    let (status, body, head) = ask(&mut mmds, now, "GET /latest/", json);
    assert_eq!((status, body.as_str()), (200, "meta-data/"));
    assert!(head.contains("content-type: text/plain"), "{head}");
}

#[test]
fn what_cannot_be_done_has_its_status() {
    for version in [Version::V1, Version::V2] {
        let (mut mmds, now) = (mmds(version), Instant::now());
        let ttl = "X-metadata-token-ttl-seconds: 60\r\n";
        let token = format!("X-metadata-token: {}\r\n", token(&mut mmds, now, ttl));
        for (line, headers, status, text) in [
            ("GET /nothing", token.as_str(), 404, "Resource not found: /nothing."),
            ("GET http://host", "", 400, "Invalid URI."),
            ("PUT /latest", ttl, 404, "Resource not found: /latest."),
            ("PUT /latest/api/token", "", 400, "Token time to live value not found."),
            (
                "PUT /latest/api/token",
                "X-metadata-token-ttl-seconds: 0\r\n",
                400,
                "Invalid time to live value",
            ),
            (
                "PUT /latest/api/token",
                "X-metadata-token-ttl-seconds: 21601\r\n",
                400,
                "Invalid time to live value",
            ),
            (
                "PUT /latest/api/token",
                "X-metadata-token-ttl-seconds: -1\r\n",
                400,
                "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:-1",
            ),
            (
                "PUT /latest/api/token",
                "X-metadata-token-ttl-seconds: 60\r\nx-forwarded-for: 10.0.0.1\r\n",
                400,
                "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
            ),
        ] {
            let (is, body, _) = ask(&mut mmds, now, line, headers);
            assert_eq!(is, status, "{line} {headers}");
            assert!(body.starts_with(text), "{line} {headers}: {body}");
        }
        for method in ["POST", "PATCH", "DELETE", "HEAD", "OPTIONS"] {
            let (status, body, head) = ask(&mut mmds, now, &format!("{method} /latest"), "");
            assert_eq!((status, body.as_str()), (405, "Not allowed HTTP method."));
            assert!(head.contains("allow: get, put\r\n"), "{head}");
        }
    }
}
