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
        ("\"Sync\"", "\"Sync\", \"queues\": 33", "drives[0].queues", "1 to 32"),
        ("\"Sync\"", "\"Sync\", \"socket\": \"s\"", "drives[0].path_on_host", "is the server's to say"),
        ("\"tap0\"", "\"a-name-of-sixteen\"", "network-interfaces[0].host_dev_name", "1 to 15"),
        ("06:00:ac:10:00:02", "06:00", "network-interfaces[0].guest_mac", "MAC"),
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
fn a_drive_of_a_server_has_what_is_not_the_servers_to_say() {
    let drive = |more: &str| {
        let drives = format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}},
                 "drives": [{{"drive_id": "d", "is_root_device": true, "socket": "s"{more}}}]}}"#
        );
        MicrovmConfig::from_json(&drives)
    };
    assert!(drive("").unwrap().needs_shared_memory());
    drive(r#", "cache_type": "Writeback", "partuuid": "0a", "queues": 2, "is_read_only": false"#).unwrap();
    for (field, value) in [
        ("path_on_host", r#""p""#),
        ("is_read_only", "true"),
        ("rate_limiter", r#"{"ops": {"size": 1, "refill_time": 1}}"#),
        ("io_engine", r#""Async""#),
        ("io_thread", "true"),
    ] {
        let text = drive(&format!(r#", "{field}": {value}"#)).unwrap_err().to_string();
        assert!(text.starts_with(&format!("drives[0].{field}: is the server's to say")), "{text}");
    }
    let mut config = drive("").unwrap();
    let patch = |text: &str| Action::PatchDrive(serde_json::from_str(text).unwrap());
    config.apply(patch(r#"{"drive_id": "d"}"#)).unwrap();
    for more in [r#""path_on_host": "p""#, r#""rate_limiter": {"ops": {"size": 1, "refill_time": 1}}"#] {
        config.apply(patch(&format!(r#"{{"drive_id": "d", {more}}}"#))).unwrap_err();
    }
}

#[test]
fn sections_of_later_versions_are_refused_by_name() {
    for (section, value) in [("pmem", "[{}]"), ("memory-hotplug", "{}")] {
        let error = changed("{\n", &format!("{{ \"{section}\": {value},\n")).unwrap_err().to_string();
        assert!(error.starts_with(section) && error.contains("not supported yet"), "{error}");
    }
    changed("{\n", "{ \"pmem\": [], \"memory-hotplug\": null,\n").unwrap();
}

fn read(text: &str) -> MicrovmConfig {
    MicrovmConfig::from_json(text).unwrap()
}

#[test]
fn actions_change_what_they_name_and_refused_ones_nothing() {
    let mut config = read(WHOLE);
    let mut drive = config.drives[0].clone();
    drive.is_read_only = false;
    config.apply(Action::PutDrive(drive.clone())).unwrap();
    assert_eq!(config.drives, [drive.clone()], "in the place of the old one");
    drive.drive_id = "other".parse().unwrap();
    let before = config.clone();
    let error = config.apply(Action::PutDrive(drive.clone())).unwrap_err().to_string();
    assert!(error.contains("root device already"), "{error}");
    assert_eq!(config, before);
    drive.is_root_device = false;
    config.apply(Action::PutDrive(drive)).unwrap();
    assert_eq!(config.drives.len(), 2);

    let limits = RateLimiter {
        ops: Some(crate::TokenBucket { size: 5, refill_time: 9, one_time_burst: None }),
        bandwidth: None,
    };
    let patch = |id: &str, path: Option<&str>, rate_limiter| {
        Action::PatchDrive(crate::DrivePatch {
            drive_id: id.parse().unwrap(),
            path_on_host: path.map(Into::into),
            rate_limiter,
        })
    };
    config.apply(patch("other", Some("new"), Some(limits))).unwrap();
    config.apply(patch("other", None, None)).unwrap();
    assert_eq!(config.drives[1].path_on_host.as_deref(), Some(std::path::Path::new("new")));
    assert_eq!(config.drives[1].rate_limiter, Some(limits));
    assert_eq!(
        config.apply(patch("third", None, None)).unwrap_err().to_string(),
        "there is no drive \"third\""
    );

    let machine = crate::MachineConfigPatch { vcpu_count: Some(3), ..Default::default() };
    config.apply(Action::PatchMachineConfig(machine)).unwrap();
    assert_eq!((config.machine_config.vcpu_count, config.machine_config.mem_size_mib), (3, 256));
    let balloon = crate::BalloonPatch { amount_mib: 1 };
    assert!(config.apply(Action::PatchBalloon(balloon)).is_err(), "there is none");
}

#[test]
fn devices_are_checked_against_each_other() {
    let with = |section: &str| changed("{\n", &format!("{{ {section},\n")).map_err(|error| error.to_string());
    with(r#""vsock": {"guest_cid": 4294967295, "uds_path": "v"}"#).unwrap();
    with(r#""entropy": {}"#).unwrap();
    with(r#""logger": {"log_path": "l", "level": "warning"}"#).unwrap();
    with(r#""metrics": {"metrics_path": "m"}"#).unwrap();
    for (section, words) in [
        (r#""vsock": {"guest_cid": 2, "uds_path": "v"}"#, "vsock.guest_cid: 2 is reserved"),
        (r#""balloon": {"amount_mib": 257, "deflate_on_oom": true}"#, "balloon.amount_mib: 257 MiB is more"),
        (r#""mmds-config": {"network_interfaces": ["eth1"]}"#, "no network interface \"eth1\""),
        (r#""mmds-config": {"network_interfaces": ["eth0"]}"#, "vhost \"on\""),
        (r#""mmds-config": {"network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1"}"#, "link-local"),
    ] {
        let error = with(section).unwrap_err();
        assert!(error.contains(words), "{section}: {error}");
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

fn with_containers() -> MicrovmConfig {
    MicrovmConfig::from_json(WHOLE).unwrap()
}

fn ids(config: &MicrovmConfig) -> Vec<&str> {
    config.cgroup.containers.iter().map(|container| container.id.as_str()).collect()
}

fn container(id: &str) -> Box<crate::Container> {
    Box::new(crate::Container { id: id.to_owned(), resources: cgroup::Resources::default() })
}

#[test]
fn containers_come_change_and_leave() {
    let mut config = with_containers();
    let before = config.clone();
    config.apply(Action::PutContainer(container("cont-b.1"))).unwrap();
    assert_eq!(ids(&config), ["a", "cont-b.1"]);
    config.apply(Action::PutContainer(container("a"))).unwrap();
    assert_eq!(ids(&config), ["a", "cont-b.1"]);
    assert_eq!(config.cgroup.containers[0].resources, cgroup::Resources::default());
    config.apply(Action::DeleteContainer("cont-b.1".to_owned())).unwrap();
    let error = config.apply(Action::DeleteContainer("cont-b.1".to_owned())).unwrap_err();
    assert_eq!(error.to_string(), "there is no container \"cont-b.1\"");
    config.apply(Action::PutContainer(Box::new(before.cgroup.containers[0].clone()))).unwrap();
    assert_eq!(config, before);
    for bad in ["", "a/b", "..", "a b", "\u{e9}", &"x".repeat(256)] {
        config.apply(Action::PutContainer(container(bad))).unwrap_err();
    }
    assert_eq!(config, before);
}

#[test]
fn limits_change_and_places_do_not() {
    let mut config = with_containers();
    let section = |text: &str| serde_json::from_str(text).map(Action::PutCgroup).unwrap();
    let error = config.apply(section(r#"{"parent": "/kubepods/pod2", "containers": []}"#));
    assert!(error.unwrap_err().to_string().starts_with("cgroup.parent: cannot be changed"));
    assert_eq!(config, with_containers());
    for same in [r#"{"parent": "/kubepods/pod1"}"#, "{}"] {
        config.apply(section(same)).unwrap();
        assert!(ids(&config).is_empty() && config.cgroup.overhead.is_none());
        assert_eq!(config.cgroup.parent.as_deref(), Some("/kubepods/pod1"));
    }
    let patch = |text: &str| serde_json::from_str(text).map(Action::PatchCgroup).unwrap();
    config.apply(patch(r#"{"containers": [{"id": "b"}]}"#)).unwrap();
    config.apply(patch(r#"{"overhead": {"cpu": {"quota": 1000, "shares": 2}}}"#)).unwrap();
    assert_eq!(ids(&config), ["b"]);
    let quota = serde_json::from_str(r#"{"cpu": {"quota": 2000}}"#).unwrap();
    config.apply(Action::PatchOverhead(quota)).unwrap();
    let cpu = config.cgroup.overhead.as_ref().and_then(|overhead| overhead.cpu.clone()).unwrap();
    assert_eq!((cpu.quota, cpu.shares), (Some(2000), Some(2)));
    let many: Vec<_> = (0..1025).map(|number| *container(&number.to_string())).collect();
    let many = Box::new(crate::CgroupPatch { containers: Some(many), overhead: None });
    assert!(config.apply(Action::PatchCgroup(many)).unwrap_err().to_string().contains("1024"));
}

#[test]
fn vcpus_are_pinned_to_as_many_cpus() {
    let mut config = with_containers();
    assert_eq!(config.pinning(), Ok(None));
    config.cgroup.pin_vcpus = true;
    let text = config.pinning().unwrap_err().to_string();
    assert!(text.starts_with("cgroup.pin_vcpus: ") && text.contains("2 vCPUs"), "{text}");
    for (cpus, fits) in [("3,5", true), ("3", false), ("3-5", false)] {
        let resources = serde_json::from_str(&format!(r#"{{"cpu": {{"cpus": "{cpus}"}}}}"#)).unwrap();
        config.cgroup.containers = vec![crate::Container { id: "a".to_owned(), resources }];
        assert_eq!(config.pinning().ok(), fits.then(|| Some(cpus.parse().unwrap())), "{cpus}");
    }
}
