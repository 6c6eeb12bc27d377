//! Running the external programs that build the host.

use super::HostError;
use std::io::{IsTerminal, Read};
use std::process::{Command, Stdio};

/// How many lines of a failed program's output are shown.
const TAIL_LINES: usize = 30;

/// Runs `command` for the purpose `what`, and returns what it printed, standard error included.
pub fn run(what: &str, command: &mut Command) -> Result<String, HostError> {
    let shown = shown(command);
    let spawn_error = |source| HostError::Spawn { program: shown.clone(), source };
    let (mut reader, writer) = std::io::pipe().map_err(spawn_error)?;
    let errors = writer.try_clone().map_err(spawn_error)?;
    let mut child =
        command.stdin(Stdio::null()).stdout(writer).stderr(errors).spawn().map_err(spawn_error)?;
    // Our copies of the pipe's writing end live in `command`: give them up, or the read never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = Vec::new();
    reader.read_to_end(&mut output).map_err(spawn_error)?;
    let status = child.wait().map_err(spawn_error)?;
    let output = String::from_utf8_lossy(&output).into_owned();
    if status.success() {
        return Ok(output);
    }
    Err(HostError::Command {
        what: what.to_owned(),
        command: shown,
        status: status.to_string(),
        tail: tail(&output, TAIL_LINES),
    })
}

/// `program` as root: itself when we are root, else by sudo (which may ask on a terminal).
pub fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    if !std::io::stdin().is_terminal() {
        command.arg("-n");
    }
    command.arg(program);
    command
}

/// Whether we may do what root may, ourselves or by sudo.
pub fn can_be_root() -> bool {
    is_root()
        || Command::new("sudo")
            .arg(if std::io::stdin().is_terminal() { "-v" } else { "-nv" })
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

/// Whether our effective user is root.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
