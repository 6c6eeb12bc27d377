//! The configuration file, and the section of `--cgroup`.

use resources::MicrovmConfig;

/// What is taken is shown, and taken again as the same.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = MicrovmConfig::from_json(text) {
        let shown = serde_json::to_string(&config).expect("the declared state is JSON");
        let again: Result<MicrovmConfig, _> = resources::from_json(shown.as_bytes());
        assert_eq!(again.as_ref().ok(), Some(&config), "{shown}: {again:?}");
        let _ = (config.root_drive(), config.pinning(), config.needs_shared_memory());
    }
    let _ = MicrovmConfig::from_cgroup_json(text);
}
