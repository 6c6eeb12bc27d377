//! The configuration file: what is taken, what is refused and in what words.

use super::*;

const WHOLE: &str = r#"{
    "boot-source": { "kernel_image_path": "vmlinux", "initrd_path": "initrd", "boot_args": "console=ttyS0" },
    "drives": [ { "drive_id": "rootfs", "path_on_host": "disk", "is_root_device": true, "is_read_only": true,
                  "cache_type": "Writeback", "io_engine": "Sync", "rate_limiter": null } ],
    "network-interfaces": [ { "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02",
                              "rx_rate_limiter": {}, "tx_rate_limiter": {}, "vhost": "on" } ],
    "machine-config": { "vcpu_count": 2, "mem_size_mib": 256, "smt": false },
    "cgroup": { "parent": "/kubepods/pod1", "driver": "cgroupfs",
                "containers": [ { "id": "a", "resources": { "cpu": { "quota": 200000, "period": 100000 } } } ] }
}"#;

/// A valid configuration with one piece of text exchanged.
fn changed(from: &str, to: &str) -> Result<MicrovmConfig, ConfigError> {
    assert!(WHOLE.contains(from), "{from} is not in the configuration");
    MicrovmConfig::from_json(&WHOLE.replacen(from, to, 1))
}

#[test]
fn a_whole_configuration_is_read_and_survives_a_round_trip() {
    let config = MicrovmConfig::from_json(WHOLE).unwrap();
    assert_eq!(config.machine_config.vcpu_count, 2);
    assert_eq!(config.network_interfaces[0].vhost, crate::VhostMode::On);
    assert_eq!(config.root_drive().unwrap().0, 0);
    let again = MicrovmConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn sections_that_may_be_left_out_get_firecrackers_defaults() {
    let config =
        MicrovmConfig::from_json(r#"{"boot-source": {"kernel_image_path": "k"}, "drives": []}"#).unwrap();
    assert_eq!(config.machine_config, MachineConfig::default());
    assert_eq!(config.cgroup.sandbox_name.as_str(), "kata-sandbox");
    assert_eq!(config.cgroup.vcpus_name.as_str(), "kata-sandbox-vcpus");
    assert_eq!(config.cgroup.overhead_name.as_str(), "kata-sandbox-overhead");
}

#[test]
fn every_error_names_its_field() {
    let cases = [
        ("\"smt\"", "\"smtx\"", "machine-config", "unknown field `smtx`"),
        ("\"boot-source\"", "\"boot-sources\"", "", "unknown field `boot-sources`"),
        ("\"vcpu_count\": 2", "\"vcpu_count\": \"2\"", "machine-config.vcpu_count", "invalid type"),
        ("\"vcpu_count\": 2", "\"vcpu_count\": 300", "machine-config.vcpu_count", "invalid value"),
        ("\"vcpu_count\": 2", "\"vcpu_count\": 33", "machine-config.vcpu_count", "1 to 32"),
        ("\"vcpu_count\": 2", "\"vcpu_count\": 0", "machine-config.vcpu_count", "1 to 32"),
        ("\"mem_size_mib\": 256", "\"mem_size_mib\": 0", "machine-config.mem_size_mib", "more than 0"),
        (
            "\"mem_size_mib\": 256",
            "\"mem_size_mib\": 18446744073709551615",
            "machine-config.mem_size_mib",
            "address",
        ),
        ("\"mem_size_mib\": 256", "\"mem_size_mib\": -1", "machine-config.mem_size_mib", "invalid value"),
        (
            "\"smt\": false",
            "\"smt\": true, \"cpu_template\": \"T2\"",
            "machine-config.cpu_template",
            "not supported",
        ),
        ("\"drive_id\": \"rootfs\"", "\"drive_id\": \"root/fs\"", "drives[0].drive_id", "letters"),
        ("\"path_on_host\": \"disk\", ", "", "drives[0].path_on_host", "missing"),
        ("\"Sync\"", "\"Async\"", "drives[0].io_engine", "not supported yet"),
        (
            "\"rate_limiter\": null",
            "\"rate_limiter\": {\"ops\":{\"size\":1,\"refill_time\":1}}",
            "drives[0].rate_limiter",
            "not supported yet",
        ),
        ("\"tap0\"", "\"a-name-of-sixteen\"", "network-interfaces[0].host_dev_name", "1 to 15"),
        ("06:00:ac:10:00:02", "06:00", "network-interfaces[0].guest_mac", "MAC"),
        ("\"cgroupfs\"", "\"systemd\"", "cgroup.driver", "not supported yet"),
        ("\"cgroupfs\"", "\"dbus\"", "cgroup.driver", "unknown variant"),
        (
            "\"machine-config\": {",
            "\"machine-config\": { \"mem_size_mib\": 1,",
            "machine-config",
            "duplicate field",
        ),
    ];
    for (from, to, field, words) in cases {
        let text = changed(from, to).unwrap_err().to_string();
        assert!(text.starts_with(field), "{to}: {text}");
        assert!(text.contains(words), "{to}: {text}");
        assert!(!text.contains('\n'), "{to}: {text}");
    }
}

#[test]
fn sections_of_later_versions_are_refused_by_name() {
    for section in NOT_YET {
        let error = changed("{\n", &format!("{{ \"{section}\": {{}},\n")).unwrap_err();
        assert_eq!(error, ConfigError::NotYet(section));
    }
}

#[test]
fn ids_and_root_devices_are_single() {
    let drive = r#"{ "drive_id": "rootfs", "path_on_host": "disk", "is_root_device": false }, "#;
    let error = changed("\"drives\": [ ", &format!("\"drives\": [ {drive}")).unwrap_err().to_string();
    assert!(error.starts_with("drives[1].drive_id"), "{error}");
    let drive = r#"{ "drive_id": "other", "path_on_host": "disk", "is_root_device": true }, "#;
    let error = changed("\"drives\": [ ", &format!("\"drives\": [ {drive}")).unwrap_err().to_string();
    assert!(error.starts_with("drives[1].is_root_device"), "{error}");
}

#[test]
fn what_is_not_json_is_refused() {
    for text in ["", "{", "[]", "null", "{\"drives\": []}", "\u{0}"] {
        assert!(MicrovmConfig::from_json(text).is_err(), "{text:?}");
    }
}

#[test]
fn the_example_is_valid() {
    MicrovmConfig::from_json(include_str!("../assets/examples/vm.json")).unwrap();
}
