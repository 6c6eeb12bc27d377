//! `pinctl` as a user runs it, against a server whose answers are canned.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use api_server::{Limits, Responder, Server};
use resources::{Action, Fault, Reply, VmState};
use serde_json::{Value, json};

fn answer(action: Action, strays: &Value) -> Result<Reply, Fault> {
    match action {
        Action::GetCgroupThreads => Ok(Reply::Json(json!({ "threads": [thread()], "strays": strays }))),
        Action::GetConfig => Ok(Reply::Json(json!({ "machine-config": { "vcpu_count": 2 } }))),
        Action::GetMmds => Ok(Reply::Json(json!({ "a": 1 }))),
        Action::PutMmds(value) if value == json!({ "b": 2 }) => Ok(Reply::Done),
        Action::PatchMmds(value) if value == json!({ "b": null }) => Ok(Reply::Done),
        Action::SetVmState(VmState::Paused) | Action::SendCtrlAltDel => Ok(Reply::Done),
        action => Err(Fault::from(format!("not {action:?}"))),
    }
}

fn thread() -> Value {
    json!({ "tid": 7, "comm": "pinfold", "role": "main", "kernel": false, "cgroup": { "unified": "/a" } })
}

/// Runs `test` beside a server on the socket that it gets.
fn with_server(strays: Value, test: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api");
    let server = Server::bind(&socket).unwrap();
    let (stop, end) = std::io::pipe().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let handler = move |action, responder: Responder| responder.send(answer(action, &strays));
            server.run(handler, Limits::default(), &stop).unwrap();
        });
        // Dropped when the test panics as well, so that the server ends.
        let _end = end;
        test(&socket);
    });
}

fn pinctl(words: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pinctl"))
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Its exit code and what it prints.
fn run(socket: &Path, words: &[&str], input: &str) -> (i32, String) {
    let output = pinctl(&[&["--api-sock", socket.to_str().unwrap()], words].concat(), input);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

/// The one line with which it fails.
fn failure(words: &[&str]) -> String {
    let output = pinctl(words, "");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("pinctl: ") && text.ends_with('\n') && text.lines().count() == 1, "{text}");
    assert!(output.stdout.is_empty());
    text
}

#[test]
fn a_microvm_is_asked_and_told() {
    with_server(json!([]), |socket| {
        for words in
            [&["pause"][..], &["stop"], &["patch", "/mmds", r#"{"b":null}"#], &["put", "/mmds", r#"{"b":2}"#]]
        {
            assert_eq!(run(socket, words, ""), (0, String::new()), "{words:?}");
        }
        for words in [&["put", "/mmds"][..], &["put", "/mmds", "-"]] {
            assert_eq!(run(socket, words, r#"{"b":2}"#), (0, String::new()), "{words:?}");
        }
        assert_eq!(run(socket, &["get", "/mmds"], ""), (0, "{\n  \"a\": 1\n}\n".to_owned()));
        assert_eq!(run(socket, &["get", "/mmds", "--json"], ""), (0, "{\"a\":1}\n".to_owned()));
        let (code, text) = run(socket, &["config"], "");
        assert!(code == 0 && text.contains("vcpu_count"), "{text}");
        let text = failure(&["--api-sock", socket.to_str().unwrap(), "resume"]);
        assert!(text.contains("PATCH /vm (400): not SetVmState(Resumed)"), "{text}");
        let text = failure(&["--api-sock", socket.to_str().unwrap(), "put", "/vsock", "{"]);
        assert!(text.contains("PUT /vsock (400): An error occurred"), "{text}");
    });
}

#[test]
fn strays_have_an_exit_code() {
    with_server(json!([]), |socket| {
        let (code, text) = run(socket, &["threads"], "");
        assert!(code == 0 && text.ends_with("No strays.\n"), "{text}");
    });
    with_server(json!([thread()]), |socket| {
        let (code, text) = run(socket, &["threads"], "");
        assert!(code == 3 && text.contains("stray"), "{text}");
        let (code, text) = run(socket, &["--json", "threads"], "");
        let reply: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((code, reply["strays"][0]["tid"].as_u64()), (3, Some(7)));
    });
}

#[test]
fn failures_are_one_line_with_the_way_out() {
    let text = failure(&["threads", "--api-sock", "/nowhere/api"]);
    assert!(
        text.contains("/nowhere/api") && text.contains("--api-sock") && text.contains("No such file"),
        "{text}"
    );
    assert!(failure(&["get"]).contains("PATH"));
    assert!(failure(&["dance"]).contains("dance"));
    assert!(failure(&["put", "mmds", "{}"]).contains("starts with /"));
}

#[test]
fn completions_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let output = pinctl(&["completions", shell], "");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("pinctl") && text.contains("threads"), "{text}");
    }
    assert!(failure(&["completions", "tcsh"]).contains("tcsh"));
}
