use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn read(spec: &Value) -> Result<OciSpec, String> {
    OciSpec::from_json(&spec.to_string()).map_err(|error| error.to_string())
}

fn resources(value: Value) -> Resources {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_containers_specification_gives_path_and_limits() {
    // Of what docker writes, the parts around what matters.
    let spec = read(&json!({
        "ociVersion": "1.2.0", "process": { "args": ["sh"] }, "hooks": {},
        "linux": {
            "cgroupsPath": "/docker/4f", "namespaces": [ { "type": "pid" } ], "seccomp": { "x": [] },
            "resources": {
                "devices": [ { "allow": false, "access": "rwm" } ], "pids": { "limit": 5 }, "unheard": 1,
                "memory": { "limit": 536_870_912, "swap": -1, "news": true },
                "cpu": { "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0-1", "news": {} },
            },
        },
    }))
    .unwrap();
    assert_eq!(spec.cgroups_path.as_deref(), Some("/docker/4f"));
    let limits = json!({ "memory": { "limit": 536_870_912 },
        "cpu": { "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0-1" } });
    assert_eq!(spec.limits, Some(resources(limits)));
    assert_eq!(spec.overhead, None);
}

#[test]
fn what_says_nothing_gives_nothing() {
    for spec in [
        json!({}),
        json!({ "linux": null, "annotations": null }),
        json!({ "linux": { "cgroupsPath": "", "resources": { "cpu": {}, "memory": null, "pids": { "limit": 5 } } } }),
        json!({ "annotations": { POD[1]: "{}", OVERHEAD[1]: "null", "other": "x" } }),
    ] {
        assert_eq!(read(&spec), Ok(OciSpec::default()), "{spec}");
    }
}

#[test]
fn containerds_annotations_are_the_pods_size() {
    let spec = read(&json!({
        "linux": { "resources": { "cpu": { "shares": 2, "cpus": "3" } } },
        "annotations": { PERIOD: "100000", QUOTA: "150000", SHARES: "1536", MEMORY: "1073741824" },
    }));
    let limits = json!({ "memory": { "limit": 1_073_741_824 },
        "cpu": { "shares": 1536, "quota": 150_000, "period": 100_000, "cpus": "3" } });
    assert_eq!(spec.unwrap().limits, Some(resources(limits)));
    // Not known to the kubelet: no limit.
    let spec = read(&json!({ "annotations": { PERIOD: "100000", QUOTA: "0", SHARES: "2", MEMORY: "0" } }));
    let sums = cgroup::Sums::of(spec.unwrap().limits.iter(), None);
    assert_eq!((sums.vcpus.quota, sums.memory, sums.vcpus.shares), (None, None, Some(2)));
}

#[test]
fn cri_os_annotations_are_the_pods_size_and_overhead_and_the_newer_name_goes_first() {
    let pod = r#"{"cpu_period":100000,"cpu_quota":200000,"cpu_shares":2048,"memory_limit_in_bytes":5,"unified":{}}"#;
    let spec = read(&json!({ "annotations": {
        POD[0]: pod, POD[1]: "not read", OVERHEAD[1]: r#"{"cpu_quota":25000,"memory_limit_in_bytes":7}"#,
    } }))
    .unwrap();
    let limits =
        json!({ "memory": { "limit": 5 }, "cpu": { "shares": 2048, "quota": 200_000, "period": 100_000 } });
    assert_eq!(spec.limits, Some(resources(limits)));
    let overhead = json!({ "memory": { "limit": 7 }, "cpu": { "quota": 25_000 } });
    assert_eq!(spec.overhead, Some(resources(overhead)));
}

#[test]
fn wrong_types_are_named() {
    for (spec, field) in [
        (json!({ "linux": [1] }), "linux"),
        (json!({ "linux": { "cgroupsPath": 5 } }), "linux.cgroupsPath: "),
        (json!({ "linux": { "resources": { "cpu": { "shares": -1 } } } }), "linux.resources.cpu.shares: "),
        (json!({ "linux": { "resources": { "cpu": { "period": 5 } } } }), "linux.resources.cpu.period: "),
        (json!({ "linux": { "resources": { "cpu": { "cpus": "x" } } } }), "linux.resources.cpu.cpus: "),
        (
            json!({ "linux": { "resources": { "memory": { "limit": "1G" } } } }),
            "linux.resources.memory.limit: ",
        ),
        (json!({ "annotations": { "a": 1 } }), "annotations.a: "),
        (json!({ "annotations": { QUOTA: "two" } }), "annotations.io.kubernetes.cri.sandbox-cpu-quota: "),
        (json!({ "annotations": { PERIOD: "5" } }), "annotations.io.kubernetes.cri.sandbox-cpu-period: "),
        (
            json!({ "annotations": { POD[0]: "{\"cpu_quota\":[]}" } }),
            "annotations.pod-linux-resources.crio.io: ",
        ),
    ] {
        let error = read(&spec).unwrap_err();
        assert!(error.starts_with(field), "{error}");
    }
    for text in ["", "[]", "{} {}", "{\"linux\":{}"] {
        assert!(OciSpec::from_json(text).is_err(), "{text}");
    }
}

#[test]
fn what_is_declared_goes_before_the_specification() {
    let spec = OciSpec {
        limits: Some(resources(json!({ "memory": { "limit": 5 } }))),
        overhead: Some(resources(json!({ "memory": { "limit": 7 } }))),
        ..OciSpec::default()
    };
    let declared = |text| MicrovmConfig::from_cgroup_json(text).unwrap();
    let mut config = declared(r#"{"containers": [{"id": "a"}], "overhead": {"memory": {"limit": 9}}}"#);
    let before = config.clone();
    config.take_up(&spec).unwrap();
    assert_eq!(config, before);
    let mut config = declared("{}");
    config.take_up(&spec).unwrap();
    assert_eq!(config.cgroup.containers[0].id, CONTAINER);
    assert_eq!(Some(&config.cgroup.containers[0].resources), spec.limits.as_ref());
    assert_eq!(config.cgroup.overhead, spec.overhead);
}

proptest! {
    #[test]
    fn whatever_is_around_them_the_limits_are_read(
        quota in any::<i64>(), period in 1_000..=1_000_000u64, shares in any::<u64>(), limit in any::<i64>(),
        noise in "[a-z]{1,8}x", junk in any::<u64>(), path in "(/[a-z:.]{1,8}){1,4}",
    ) {
        let spec = json!({
            &noise: junk,
            "linux": {
                &noise: { "deep": [junk] }, "cgroupsPath": &path,
                "resources": {
                    &noise: [], "memory": { "limit": limit, &noise: null },
                    "cpu": { "quota": quota, "period": period, "shares": shares, &noise: "" },
                },
            },
        });
        let read = read(&spec).unwrap();
        prop_assert_eq!(read.cgroups_path, Some(path));
        let wanted = json!({ "memory": { "limit": limit },
            "cpu": { "quota": quota, "period": period, "shares": shares } });
        prop_assert_eq!(read.limits, Some(resources(wanted)));
        // In the annotations the same limits are the same.
        let annotations = json!({ "annotations": {
            QUOTA: quota.to_string(), PERIOD: period.to_string(), SHARES: shares.to_string(), MEMORY: limit.to_string(),
        } });
        prop_assert_eq!(OciSpec::from_json(&annotations.to_string()).unwrap().limits, Some(resources(json!({
            "memory": { "limit": limit }, "cpu": { "quota": quota, "period": period, "shares": shares } }))));
    }

    #[test]
    fn no_text_is_too_much(text in ".{0,200}", value in "[0-9a-z\"{}\\[\\]:, -]{0,40}") {
        let _ = OciSpec::from_json(&text);
        let _ = read(&json!({ "annotations": { POD[0]: &value, QUOTA: value, MEMORY: text } }));
    }
}
