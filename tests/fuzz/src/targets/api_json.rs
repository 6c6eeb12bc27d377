//! Paths, queries and bodies of the API's requests, and whether the declared state takes them up.

use api_server::Method;
use resources::MicrovmConfig;

/// Requests of one input.
const MAX_REQUESTS: usize = 16;

/// Requests to one microVM, with a zero between two: a line with method and path, then the body.
pub fn run(bytes: &[u8]) {
    let mut config = MicrovmConfig::default();
    for request in bytes.split(|byte| *byte == 0).take(MAX_REQUESTS) {
        let (line, body) = match request.iter().position(|byte| *byte == b'\n') {
            Some(end) => (&request[..end], &request[end + 1..]),
            None => (request, &[][..]),
        };
        let line = String::from_utf8_lossy(line);
        let (method, path) = line.split_once(' ').unwrap_or(("GET", &line));
        let Ok(method) = Method::from_bytes(method.as_bytes()) else { continue };
        match api_server::parse(&method, path, body) {
            Ok(request) => {
                let _ = (request.action.check_phase(true), request.action.check_phase(false));
                if let Err(error) = config.apply(request.action) {
                    assert!(!resources::chain(&error).is_empty());
                }
                let _ = (config.pinning(), config.root_drive(), config.needs_shared_memory());
                // What is declared can be shown.
                serde_json::to_string(&config).expect("the declared state is JSON");
            }
            Err(fault) => assert!(!fault.message.is_empty()),
        }
    }
}
