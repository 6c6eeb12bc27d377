use serde_json::json;

use super::*;

fn ask(method: Method, path: &str, body: &str) -> Result<Request, String> {
    parse(&method, path, body.as_bytes()).map_err(|fault| {
        assert!(!fault.too_large);
        fault.message
    })
}

fn refused(method: Method, path: &str, body: &str) -> String {
    ask(method, path, body).unwrap_err()
}

#[test]
fn requests_become_actions() {
    assert_eq!(ask(Method::GET, "/", ""), Ok(Action::GetInstance.into()));
    assert_eq!(ask(Method::GET, "/vm/config", ""), Ok(Action::GetConfig.into()));
    assert_eq!(ask(Method::GET, "/vm/config/", ""), Ok(Action::GetConfig.into()));
    assert_eq!(ask(Method::GET, "/cgroup/threads", ""), Ok(Action::GetCgroupThreads.into()));
    let start = r#"{"action_type": "InstanceStart"}"#;
    assert_eq!(ask(Method::PUT, "/actions", start), Ok(Action::Start.into()));
    let paused = r#"{"state": "Paused"}"#;
    assert_eq!(ask(Method::PATCH, "/vm", paused), Ok(Action::SetVmState(VmState::Paused).into()));
    assert_eq!(ask(Method::PUT, "/mmds", "[1]"), Ok(Action::PutMmds(json!([1])).into()));
    assert_eq!(ask(Method::PATCH, "/mmds", "{}"), Ok(Action::PatchMmds(json!({})).into()));
}

#[test]
fn katas_requests_are_taken() {
    let body = r#"{"drive_id": "drive1", "path_on_host": "/d", "rate_limiter": null}"#;
    let Action::PatchDrive(patch) = ask(Method::PATCH, "/drives/drive1", body).unwrap().action else {
        panic!()
    };
    assert_eq!(patch.rate_limiter, None);
    let body = r#"{"guest_cid": 4294967295, "uds_path": "kata.hvsock", "vsock_id": "root"}"#;
    let request = ask(Method::PUT, "/vsock", body).unwrap();
    assert!(
        request.deprecated
            && matches!(request.action, Action::PutVsock(vsock) if vsock.guest_cid == u32::MAX)
    );
}

#[test]
fn deprecated_fields_are_told() {
    for (method, path, body, deprecated) in [
        (
            Method::PUT,
            "/machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "None"}"#,
            true,
        ),
        (Method::PUT, "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 1}"#, false),
        (Method::PATCH, "/machine-config", r#"{"cpu_template": "None"}"#, true),
        (Method::PUT, "/vsock", r#"{"guest_cid": 3, "uds_path": "s"}"#, false),
        (Method::PUT, "/mmds/config", r#"{"network_interfaces": ["a"]}"#, true),
        (Method::PUT, "/mmds/config", r#"{"network_interfaces": ["a"], "version": "V2"}"#, false),
    ] {
        assert_eq!(ask(method, path, body).unwrap().deprecated, deprecated, "{path} {body}");
    }
}

#[test]
fn ids_of_path_and_body_must_agree() {
    let drive = r#"{"drive_id": "a", "is_root_device": false, "path_on_host": "f"}"#;
    assert!(ask(Method::PUT, "/drives/a", drive).is_ok());
    let mismatch = "The id from the path [b] does not match the id from the body [a]!";
    assert_eq!(refused(Method::PUT, "/drives/b", drive), mismatch);
    assert_eq!(refused(Method::PATCH, "/network-interfaces/b", r#"{"iface_id": "a"}"#), mismatch);
    for path in ["/drives", "/drives/"] {
        assert_eq!(refused(Method::PUT, path, drive), "The ID cannot be empty.");
    }
    assert!(refused(Method::PUT, "/drives/a-b", drive).starts_with("API Resource IDs"));
    assert!(refused(Method::PUT, "/drives/a/b", drive).starts_with("Invalid request method and/or path"));
}

#[test]
fn containers_have_ids_of_their_own_kind() {
    let path = "/cgroup/containers/cont-2cpu.400m";
    let action = ask(Method::PUT, path, r#"{"id": "cont-2cpu.400m"}"#).unwrap().action;
    assert!(matches!(action, Action::PutContainer(container) if container.id == "cont-2cpu.400m"));
    let gone = Action::DeleteContainer("cont-2cpu.400m".to_owned());
    assert_eq!(ask(Method::DELETE, path, ""), Ok(gone.into()));
    assert!(refused(Method::PUT, path, r#"{"id": "other"}"#).contains("does not match"));
    assert_eq!(refused(Method::DELETE, "/cgroup/containers/", ""), "The ID cannot be empty.");
    assert!(refused(Method::DELETE, "/cgroup/containers/a%20b", "").starts_with("A container's ID"));
    assert!(refused(Method::DELETE, path, "{}").starts_with("Invalid request method"));
    assert_eq!(refused(Method::PATCH, "/cgroup", "{}"), "Empty PATCH request.");
}

#[test]
fn events_are_asked_for_by_a_query() {
    let asked = |path: &str| ask(Method::GET, path, "").map(|request| request.action);
    let events = |since, timeout_ms| Ok(Action::GetCgroupEvents(EventsQuery { since, timeout_ms }));
    assert_eq!(asked("/cgroup/events"), events(0, 0));
    assert_eq!(asked("/cgroup/events?timeout_ms=60000&since=7"), events(7, 60_000));
    for (query, named) in [
        ("since=-1", "-1"),
        ("since", "since"),
        ("until=3", "`until`"),
        ("timeout_ms=60001", "60000"),
        ("since=99999999999999999999", "99999999999999999999"),
    ] {
        let text = asked(&format!("/cgroup/events?{query}")).unwrap_err();
        assert!(text.contains(named), "{text}");
    }
}

#[test]
fn what_is_wrong_in_a_body_is_named() {
    let prefix = "An error occurred when deserializing the json body of a request: ";
    for (path, body, named) in [
        ("/boot-source", r#"{"kernel_image_path": "k", "kernel": 1}"#, "kernel: unknown field `kernel`"),
        ("/boot-source", "{}", "missing field `kernel_image_path`"),
        ("/boot-source", r#"{"kernel_image_path": 1}"#, "kernel_image_path: invalid type: integer"),
        ("/boot-source", r#"{"kernel_image_path": "k"} {}"#, "trailing characters"),
        ("/boot-source", "garbage", "expected value"),
        (
            "/entropy",
            r#"{"rate_limiter": {"ops": {"size": -1, "refill_time": 1}}}"#,
            "rate_limiter.ops.size: ",
        ),
        ("/actions", r#"{"action_type": "Stop"}"#, "action_type: unknown variant `Stop`"),
    ] {
        let text = refused(Method::PUT, path, body);
        assert!(text.starts_with(prefix) && text[prefix.len()..].contains(named), "{text}");
    }
    let deep = "[".repeat(10_000);
    assert!(refused(Method::PUT, "/mmds", &deep).contains("recursion limit"));
    let bytes = parse(&Method::PUT, "/mmds", b"\"\xff\"").unwrap_err();
    assert!(bytes.message.contains("invalid unicode"), "{}", bytes.message);
}

#[test]
fn firecrackers_texts_for_what_is_no_request() {
    assert_eq!(refused(Method::GET, "/", "{}"), "GET request cannot have a body.");
    assert_eq!(refused(Method::GET, "/nowhere", "{}"), "GET request cannot have a body.");
    assert_eq!(refused(Method::PUT, "/actions", ""), "Empty PUT request.");
    assert_eq!(refused(Method::PATCH, "/vm", ""), "Empty PATCH request.");
    assert_eq!(refused(Method::PATCH, "/machine-config", "{}"), "Empty PATCH request.");
    for (method, path, body) in [
        (Method::GET, "/nowhere", ""),
        (Method::GET, "", ""),
        (Method::GET, "*", ""),
        (Method::GET, "/version?x=1", ""),
        (Method::GET, "/actions", ""),
        (Method::PUT, "/version", "{}"),
        (Method::DELETE, "/vsock", ""),
        (Method::PUT, "/drives/a?b", "{}"),
    ] {
        let text = format!("Invalid request method and/or path: {method} {path}.");
        assert_eq!(refused(method, path, body), text);
    }
}

#[test]
fn what_comes_later_is_refused_by_name() {
    for (method, path, body) in [
        (Method::PUT, "/snapshot/create", "{}"),
        (Method::GET, "/hotplug/memory", ""),
        (Method::DELETE, "/drives/a", ""),
        (Method::PUT, "/pmem/a", "{}"),
        (Method::PATCH, "/balloon/hinting/start", ""),
    ] {
        let text = refused(method.clone(), path, body);
        assert!(text.starts_with(method.as_str()) && text.ends_with("is not supported yet."), "{text}");
    }
}

#[test]
fn no_route_is_there_twice() {
    for (index, route) in ROUTES.iter().enumerate() {
        let path = route.path.replace(['{', '}'], "");
        let first = ROUTES.iter().position(|other| other.matches(&route.method, &path).is_some());
        assert_eq!(first, Some(index), "{} {}", route.method, route.path);
    }
}

#[test]
fn questions_that_take_time_are_read() {
    let diagnosis = |window_ms| Action::GetCgroupDiagnosis(DiagnosisQuery { window_ms });
    let what_if = |bandwidth, cpus: Option<&str>, window_ms| {
        let cpus = cpus.map(|cpus| cpus.parse().unwrap());
        Action::GetCgroupWhatIf(Box::new(WhatIfQuery { bandwidth, cpus, window_ms }))
    };
    let quota = |quota, period| Some(Bandwidth { quota, period });
    for (path, action) in [
        ("/cgroup/diagnosis", diagnosis(1000)),
        ("/cgroup/diagnosis?window_ms=60000", diagnosis(60_000)),
        ("/cgroup/what-if", what_if(None, None, 2000)),
        (
            "/cgroup/what-if?quota=50000&cpus=0-1,3",
            what_if(quota(Some(50_000), 100_000), Some("0-1,3"), 2000),
        ),
        ("/cgroup/what-if?quota=max&cpus=", what_if(quota(None, 100_000), None, 2000)),
        ("/cgroup/what-if?period=1000&quota=1000", what_if(quota(Some(1000), 1000), None, 2000)),
    ] {
        assert!(action.takes_time());
        assert_eq!(ask(Method::GET, path, ""), Ok(action.into()), "{path}");
    }
    for (path, words) in [
        ("/cgroup/diagnosis?window_ms=99", "100 to 60000"),
        ("/cgroup/diagnosis?window_ms=60001", "100 to 60000"),
        ("/cgroup/diagnosis?window=5", "`window`"),
        ("/cgroup/what-if?quota=999", "999"),
        ("/cgroup/what-if?quota=-1", "`-1`"),
        ("/cgroup/what-if?quota=5000&period=999", "999"),
        ("/cgroup/what-if?quota=5000&period=1000001", "1000001"),
        ("/cgroup/what-if?period=5000", "quota"),
        ("/cgroup/what-if?cpus=3-1", "3-1"),
        ("/cgroup/what-if?cpus=x", "cpus"),
        ("/cgroup/what-if?quota=5000&period=1000000&window_ms=1999", "2000 at least"),
    ] {
        let text = refused(Method::GET, path, "");
        assert!(text.contains(words), "{path}: {text}");
    }
}
