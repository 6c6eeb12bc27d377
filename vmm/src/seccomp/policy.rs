//! From a policy, which says in JSON what the threads of each role may ask of the kernel, to programs that the kernel
//! runs. The build script includes this file too: a built-in policy that is wrong breaks the build.

use std::collections::BTreeSet;
use std::env::consts::ARCH;

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde_json::Value;

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The event loop, while the guest runs.
    Main,
    /// The API's thread.
    Api,
    /// A vCPU's.
    Vcpu,
    /// A device's own.
    Io,
    /// The process that removes the groups.
    Reaper,
}

impl Role {
    /// All roles, in order.
    pub const ALL: [Self; 5] = [Self::Main, Self::Api, Self::Vcpu, Self::Io, Self::Reaper];

    /// Its key in a policy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Api => "api",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
            Self::Reaper => "reaper",
        }
    }
}

/// The program of each role, in the order of [`Role::ALL`], as the kernel has it in memory: 8 bytes for each
/// `struct sock_filter`.
pub type Programs = [Vec<u8>; Role::ALL.len()];

/// Why a policy cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It is no JSON.
    #[error("it is no JSON")]
    Json(#[from] serde_json::Error),
    /// A role has none.
    #[error("there is no filter for the role \"{0}\"; each of main, api, vcpu, io and reaper needs one")]
    Missing(&'static str),
    /// A filter of nobody's.
    #[error("there is no role \"{0}\"; the roles are main, api, vcpu, io and reaper")]
    Unknown(String),
    /// Rules of which one would be silently lost.
    #[error(
        "in the filter of \"{role}\" the system call \"{syscall}\" has a rule without args and one with args; remove \
         one of the two"
    )]
    Mixed {
        /// The filter's role.
        role: &'static str,
        /// The call.
        syscall: String,
    },
    /// It cannot be made a program. The text says what is wrong, its causes included.
    #[error("{0}")]
    Compile(seccompiler::Error),
}

/// Compiles a policy in the JSON of the crate `seccompiler`: an object with a filter for each role.
pub fn compile(json: &str) -> Result<Programs, PolicyError> {
    let policy: Value = serde_json::from_str(json)?;
    let arch = TargetArch::try_from(ARCH).map_err(|error| PolicyError::Compile(error.into()))?;
    let mut compiled = compile_from_json(json.as_bytes(), arch).map_err(PolicyError::Compile)?;
    let mut programs = Programs::default();
    for (role, program) in Role::ALL.into_iter().zip(&mut programs) {
        let name = role.name();
        *program = bytes(&compiled.remove(name).ok_or(PolicyError::Missing(name))?);
        if let Some(syscall) = mixed(&policy[name]["filter"]) {
            return Err(PolicyError::Mixed { role: name, syscall });
        }
    }
    match compiled.into_keys().next() {
        Some(unknown) => Err(PolicyError::Unknown(unknown)),
        None => Ok(programs),
    }
}

/// The call that has rules with arguments and one without, of which the compiler would drop the latter.
fn mixed(rules: &Value) -> Option<String> {
    let calls = |with: bool| {
        let rules =
            rules.as_array().into_iter().flatten().filter(move |rule| rule["args"].is_array() == with);
        rules.filter_map(|rule| rule["syscall"].as_str()).collect::<BTreeSet<_>>()
    };
    calls(true).intersection(&calls(false)).next().map(|call| (*call).to_owned())
}

fn bytes(program: &BpfProgram) -> Vec<u8> {
    let instruction = |it: &seccompiler::sock_filter| {
        let ([a, b], [c, d, e, f]) = (it.code.to_ne_bytes(), it.k.to_ne_bytes());
        [a, b, it.jt, it.jf, c, d, e, f]
    };
    program.iter().flat_map(instruction).collect()
}
