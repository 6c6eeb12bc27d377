//! What the guest's requests are answered with. The texts of errors are Firecracker's.

use std::time::Instant;

use super::http::{Method, Request, Response, Status};
use super::store::{Format, Mmds, ReadError, Version, squeeze_slashes};
use super::token::TokenError;

/// Where tokens are put.
const TOKEN_PATH: &str = "/latest/api/token";

/// Answers `request` at the time `now`.
pub(super) fn answer(request: &Request<'_>, mmds: &mut Mmds, now: Instant) -> Response {
    let Some(path) = request.path else {
        return Response::text(Status::BadRequest, "Invalid URI.");
    };
    match request.method {
        Method::Get => match unauthorized(request, mmds, now) {
            Some(refusal) => refusal,
            None => get(path, request.accepts_json, mmds),
        },
        Method::Put => put(path, request, mmds, now),
        Method::Other => Response::text(Status::MethodNotAllowed, "Not allowed HTTP method.")
            .with_header("Allow", "GET, PUT"),
    }
}

/// The refusal of a request that must have a token and has none that is valid.
fn unauthorized(request: &Request<'_>, mmds: &mut Mmds, now: Instant) -> Option<Response> {
    let text = match (mmds.version(), request.token) {
        (Version::V1, _) => return None,
        (Version::V2, Some(token)) if mmds.tokens().is_valid(token, now) => return None,
        (Version::V2, Some(_)) => "MMDS token not valid.",
        (Version::V2, None) => {
            "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the \
             session token."
        }
    };
    Some(Response::text(Status::Unauthorized, text))
}

fn get(path: &str, accepts_json: bool, mmds: &Mmds) -> Response {
    let format = if accepts_json && !mmds.imds_compat() { Format::Json } else { Format::Imds };
    match (mmds.read(path, format), format) {
        (Ok(body), Format::Json) => Response::json(body),
        (Ok(body), Format::Imds) => Response::text(Status::Ok, body),
        (Err(ReadError::NotFound), _) => not_found(path),
        (Err(ReadError::NotImds), _) => Response::text(
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        ),
    }
}

/// Makes a token. A request that was forwarded gets none, so that an open proxy in the guest gives nobody else
/// access.
fn put(path: &str, request: &Request<'_>, mmds: &mut Mmds, now: Instant) -> Response {
    if request.forwarded {
        let text = "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For";
        return Response::text(Status::BadRequest, text);
    }
    if squeeze_slashes(path) != TOKEN_PATH {
        return not_found(path);
    }
    let Some((header, value)) = request.ttl else {
        let text = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                    `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
        return Response::text(Status::BadRequest, text);
    };
    let value = String::from_utf8_lossy(value);
    let Ok(ttl) = value.parse() else {
        let text = format!("Invalid header. Reason: Invalid value. Key:{header}; Value:{value}");
        return Response::text(Status::BadRequest, text);
    };
    match mmds.tokens().issue(ttl, now) {
        Ok(token) => Response::text(Status::Ok, token).with_header(header, ttl.to_string()),
        Err(error @ TokenError::Ttl(_)) => Response::text(Status::BadRequest, error.to_string()),
        Err(error @ TokenError::Random(_)) => Response::text(Status::Unavailable, error.to_string()),
    }
}

fn not_found(path: &str) -> Response {
    Response::text(Status::NotFound, format!("Resource not found: {path}."))
}

#[cfg(test)]
mod tests;
