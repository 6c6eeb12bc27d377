//! A container's `config.json`, its annotations and its `cgroupsPath`.

use cgroup::{Parent, Sums};
use resources::{MicrovmConfig, OciSpec};

/// What is taken leads to limits.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(spec) = OciSpec::from_json(text) else { return };
    if let Some(path) = &spec.cgroups_path {
        let _ = Parent::of_cgroups_path(path);
        let _ = (cgroup::is_scope_form(path), path.parse::<cgroup::ScopeName>());
    }
    let mut config = MicrovmConfig::default();
    if config.take_up(&spec).is_ok() {
        let containers = config.cgroup.containers.iter().map(|container| &container.resources);
        let _ = Sums::of(containers, config.cgroup.overhead.as_ref()).sandbox_quota();
        let _ = config.pinning();
    }
}
