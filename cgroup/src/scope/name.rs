//! The names of scopes, in runc's form `slice:prefix:name`, and where systemd keeps them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name of a unit (systemd.unit(5)).
const MAX_UNIT: usize = 255;

/// Which systemd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Manager {
    /// Process 1.
    System,
    /// That of the user who runs us.
    User,
}

impl Manager {
    /// The one that looks after processes of ours.
    #[must_use]
    pub fn ours() -> Self {
        // SAFETY: geteuid has no preconditions and cannot fail.
        if unsafe { libc::geteuid() } == 0 { Self::System } else { Self::User }
    }

    /// Where runc makes a scope whose slice is left out.
    fn default_slice(self) -> &'static str {
        match self {
            Self::System => "system.slice",
            Self::User => "user.slice",
        }
    }
}

impl fmt::Display for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::System => "system",
            Self::User => "user's",
        })
    }
}

/// Why a text names no scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeNameError {
    /// It has another form.
    #[error(
        "`{0}` does not have the systemd driver's form slice:prefix:name, such as kubepods-pod1.slice:cri-containerd:ID; \
         a path belongs to the cgroupfs driver"
    )]
    Form(String),
    /// The slice has no name that systemd takes.
    #[error(
        "`{0}` is no slice: it ends with .slice and has a name between single dashes, such as kubepods-pod1.slice"
    )]
    Slice(String),
    /// The unit has no name that systemd takes.
    #[error("`{0}` cannot name a scope: use letters, digits and `:-_.\\@`, {MAX_UNIT} in all at most")]
    Unit(String),
    /// It would be a slice.
    #[error("`{0}` names a slice, which holds no processes of its own: leave out .slice at the end")]
    NoScope(String),
}

/// The name of a scope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScopeName {
    manager: Manager,
    slice: String,
    unit: String,
}

/// Whether a text has the form `slice:prefix:name`.
#[must_use]
pub fn is_scope_form(text: &str) -> bool {
    !text.starts_with('/') && text.split(':').count() == 3
}

impl FromStr for ScopeName {
    type Err = ScopeNameError;

    /// From `slice:prefix:name`, for our own manager: the unit `prefix-name.scope` in `slice`, by default in
    /// `system.slice` (`user.slice` of a user's manager), as runc's `cgroupsPath` has it.
    fn from_str(text: &str) -> Result<Self, ScopeNameError> {
        Self::of(Manager::ours(), text)
    }
}

impl ScopeName {
    fn of(manager: Manager, text: &str) -> Result<Self, ScopeNameError> {
        let shown = |text: &str| text.escape_debug().to_string();
        let parts: Vec<&str> = text.split(':').collect();
        let &[slice, prefix, name] = &parts[..] else { return Err(ScopeNameError::Form(shown(text))) };
        if text.starts_with('/') {
            return Err(ScopeNameError::Form(shown(text)));
        }
        let slice = if slice.is_empty() { manager.default_slice() } else { slice };
        if expand(slice).is_none() {
            return Err(ScopeNameError::Slice(shown(slice)));
        }
        if name.ends_with(".slice") {
            return Err(ScopeNameError::NoScope(shown(name)));
        }
        let unit = format!("{prefix}-{name}.scope");
        if name.is_empty() || !is_unit(&unit) {
            return Err(ScopeNameError::Unit(shown(&unit)));
        }
        Ok(Self { manager, slice: slice.to_owned(), unit })
    }

    /// The scope of a microVM that was given no other place: `pinfold-<id>.scope` in `machine.slice`, where systemd
    /// keeps virtual machines, or in a user's `app.slice` (systemd.special(7)).
    ///
    /// # Errors
    /// When `id` holds what no unit's name may hold.
    pub fn of_vm(id: &str) -> Result<Self, ScopeNameError> {
        let manager = Manager::ours();
        let slice = if manager == Manager::System { "machine.slice" } else { "app.slice" };
        Self::of(manager, &format!("{slice}:pinfold:{id}"))
    }

    /// Which systemd makes it.
    #[must_use]
    pub fn manager(&self) -> Manager {
        self.manager
    }

    /// The slice's unit.
    #[must_use]
    pub fn slice(&self) -> &str {
        &self.slice
    }

    /// The scope's unit.
    #[must_use]
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// Its path below the manager's own group.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}/{}", expand(&self.slice).unwrap_or_default(), self.unit)
    }
}

/// The path of a slice below its manager's group, empty for the root slice: `a-b.slice` is in `a.slice`. `None` when
/// it is no slice's name.
fn expand(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice").filter(|_| is_unit(slice))?;
    if name == "-" {
        return Some(String::new());
    }
    let (mut path, mut prefix) = (String::new(), String::new());
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        path.push_str(&format!("/{prefix}{part}.slice"));
        prefix.push_str(&format!("{part}-"));
    }
    Some(path)
}

fn is_unit(name: &str) -> bool {
    name.len() <= MAX_UNIT && name.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_expanded_as_runc_does() {
        for (text, unit, path) in [
            ("system.slice:docker:4f", "docker-4f.scope", "/system.slice/docker-4f.scope"),
            (":docker:4f", "docker-4f.scope", "/system.slice/docker-4f.scope"),
            ("a-b.slice:cri:4f", "cri-4f.scope", "/a.slice/a-b.slice/cri-4f.scope"),
            (
                "kubepods-burstable-pod1_2.slice:crio:4f",
                "crio-4f.scope",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/crio-4f.scope",
            ),
            ("-.slice:p:n", "p-n.scope", "/p-n.scope"),
            ("a.slice::n", "-n.scope", "/a.slice/-n.scope"),
            ("a.slice:p:n.scope", "p-n.scope.scope", "/a.slice/p-n.scope.scope"),
        ] {
            let name = ScopeName::of(Manager::System, text).unwrap();
            assert_eq!((name.unit(), name.path().as_str()), (unit, path), "{text}");
        }
        let name = ScopeName::of(Manager::User, ":p:n").unwrap();
        assert_eq!((name.slice(), name.manager()), ("user.slice", Manager::User));
    }

    #[test]
    fn what_names_no_scope_is_refused_in_its_own_words() {
        let of = |text: &str| ScopeName::of(Manager::System, text).unwrap_err();
        for text in ["", "/a/b", "a.slice", "a.slice:p", "a.slice:p:n:m", "/a:b:c"] {
            assert_eq!(of(text), ScopeNameError::Form(text.to_owned()));
        }
        for slice in
            [".slice", "a", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice", "a.slice ", "a\u{e9}.slice"]
        {
            assert_eq!(of(&format!("{slice}:p:n")), ScopeNameError::Slice(slice.to_owned()));
        }
        for text in
            ["a.slice:p:", "a.slice:p/q:n", "a.slice:p:n m", &format!("a.slice:p:{}", "n".repeat(248))]
        {
            assert!(matches!(of(text), ScopeNameError::Unit(_)), "{text}");
        }
        assert_eq!(of("a.slice:p:n.slice"), ScopeNameError::NoScope("n.slice".to_owned()));
    }

    #[test]
    fn a_vm_has_a_scope_of_its_own() {
        let name = ScopeName::of_vm("vm-1").unwrap();
        assert_eq!(name.unit(), "pinfold-vm-1.scope");
        assert!(["machine.slice", "app.slice"].contains(&name.slice()));
    }
}
