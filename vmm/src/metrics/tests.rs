use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ::devices::counter::Counters;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use serde_json::{Value, json};

use super::writer::Writer;
use super::*;
use crate::sink::tests::{fifo, read_available, reader};
use std::time::Duration;

fn metrics() -> &'static Metrics {
    Box::leak(Box::new(Metrics::new()))
}

fn config(path: &Path) -> MetricsConfig {
    MetricsConfig { path: path.to_owned(), id: None, properties: None }
}

fn lines(text: &str) -> Vec<Value> {
    assert!(text.ends_with('\n'), "{text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn read(path: &Path) -> Vec<Value> {
    lines(&std::fs::read_to_string(path).unwrap())
}

#[test]
fn a_line_has_firecrackers_shape() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let metrics = metrics();
    let before = SystemTime::now();
    let properties = Some([("customer".to_owned(), "\"12\n34\"".to_owned())].into());
    let full = MetricsConfig { id: Some("vm-1".to_owned()), properties, ..config(&path) };
    Writer::new(metrics, full).unwrap().flush().unwrap();
    Writer::new(metrics, config(&path)).unwrap().flush().unwrap();

    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with(r#"{"utc_timestamp_ms":"#), "{text}");
    let [mut named, plain] = <[Value; 2]>::try_from(lines(&text)).unwrap();
    assert_eq!(named["id"], "vm-1");
    assert_eq!(named["properties"], json!({ "customer": "\"12\n34\"" }));
    let now = u128::from(plain["utc_timestamp_ms"].as_u64().unwrap());
    assert!(now >= before.duration_since(UNIX_EPOCH).unwrap().as_millis());
    let fields = named.as_object_mut().unwrap();
    for added in ["id", "properties"] {
        fields.remove(added).unwrap();
        assert!(plain.get(added).is_none());
    }
    fields.insert("utc_timestamp_ms".to_owned(), plain["utc_timestamp_ms"].clone());
    assert_eq!(named, plain);

    let vcpu = json!({
        "exit_io_in": 0, "exit_io_out": 0, "exit_mmio_read": 0, "exit_mmio_write": 0, "failures": 0
    });
    assert_eq!(plain["vcpu"], vcpu);
    assert_eq!(plain["latencies_us"], json!({ "pause_vm": 0, "resume_vm": 0 }));
    let logger = json!({ "missed_log_count": 0, "missed_metrics_count": 0, "rate_limited_log_count": 0 });
    assert_eq!(plain["logger"], logger);
    assert_eq!(plain["seccomp"], json!({ "num_faults": 0 }));
    assert_eq!(plain["vmm"], json!({ "panic_count": 0 }));
}

#[test]
fn counters_tell_their_growth_and_gauges_their_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let metrics = metrics();
    let writer = Writer::new(metrics, config(&path)).unwrap();
    metrics.latencies_us.pause_vm.store(5);
    metrics.vcpu.failures.inc();
    writer.flush().unwrap();
    metrics.vcpu.failures.inc();
    metrics.vcpu.failures.inc();
    writer.flush().unwrap();
    writer.flush().unwrap();
    let told = |line: &Value| (line["vcpu"]["failures"].as_u64(), line["latencies_us"]["pause_vm"].as_u64());
    let told: Vec<_> = read(&path).iter().map(told).collect();
    assert_eq!(told, [(Some(1), Some(5)), (Some(2), Some(5)), (Some(0), Some(5))]);
    assert_eq!(metrics.vcpu.failures.count(), 3);
}

#[test]
fn what_is_counted_while_a_line_is_written_is_in_the_next_one() {
    let counter = Counter::new();
    let told = || serde_json::to_value(&counter).unwrap();
    counter.inc();
    assert_eq!(told(), 1);
    counter.inc();
    counter.settle();
    assert_eq!(told(), 1);
    counter.settle();
    assert_eq!(told(), 0);
}

#[test]
fn exits_of_all_vcpus_are_added_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let metrics = metrics();
    let writer = Writer::new(metrics, config(&path)).unwrap();
    std::thread::scope(|scope| {
        for index in 0..4 {
            scope.spawn(move || {
                let exits = metrics.vcpu.exits(index);
                (0..1000).for_each(|_| exits.io_in());
                (0..100).for_each(|_| exits.io_out());
                (0..10).for_each(|_| exits.mmio_read());
                exits.mmio_write();
            });
        }
    });
    writer.flush().unwrap();
    metrics.vcpu.exits(u8::MAX).mmio_write();
    writer.flush().unwrap();
    let told = |line: &Value| {
        ["exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write"]
            .map(|name| line["vcpu"][name].clone())
    };
    let told: Vec<_> = read(&path).iter().map(told).collect();
    assert_eq!(told, [[4000, 400, 40, 4].map(Value::from), [0, 0, 0, 1].map(Value::from)]);
}

/// Counters of the form that devices have.
#[derive(Debug, Default)]
struct Blocks(::devices::counter::Counter);

impl Counters for Blocks {
    fn each(&self, visit: &mut dyn FnMut(&'static str, &::devices::counter::Counter)) {
        visit("read_bytes", &self.0);
    }
}

#[test]
fn devices_have_their_own_groups_and_one_for_their_kind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let metrics = metrics();
    let writer = Writer::new(metrics, config(&path)).unwrap();
    let [root, data] = [(); 2].map(|()| Arc::new(Blocks::default()));
    metrics.devices.add("block", Some("root".to_owned()), Arc::clone(&root) as _);
    metrics.devices.add("block", Some("data".to_owned()), Arc::clone(&data) as _);
    metrics.devices.add("vsock", None, Arc::new(()));
    root.0.add(4096);
    data.0.add(512);
    writer.flush().unwrap();
    data.0.add(1);
    writer.flush().unwrap();
    metrics.devices.clear();
    writer.flush().unwrap();
    let lines = read(&path);
    let told =
        |line: &Value| ["block", "block_root", "block_data"].map(|group| line[group]["read_bytes"].clone());
    assert_eq!(told(&lines[0]), [4608, 4096, 512].map(Value::from));
    assert_eq!(told(&lines[1]), [1, 0, 1].map(Value::from));
    assert_eq!(told(&lines[2]), [const { Value::Null }; 3]);
}

#[test]
fn what_a_full_fifo_has_no_room_for_is_in_the_next_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path());
    let metrics = metrics();
    let writer = Writer::new(metrics, config(&path)).unwrap();
    let mut flushed = 0;
    while writer.flush().is_ok() {
        flushed += 1;
    }
    metrics.vcpu.failures.inc();
    writer.flush().unwrap_err();
    metrics.vcpu.failures.inc();
    let mut reader = reader(&path);
    let mut text = read_available(&mut reader);
    writer.flush().unwrap();
    text.extend(read_available(&mut reader));

    let lines = lines(std::str::from_utf8(&text).unwrap());
    let last = lines.last().unwrap();
    assert_eq!(last["vcpu"]["failures"], 2);
    assert_eq!(last["logger"]["missed_metrics_count"], 2);
    assert!(lines.len() == flushed + 1 || lines.len() == flushed + 2, "{} of {flushed}", lines.len());
}

#[test]
fn requests_are_counted_where_firecracker_does() {
    let metrics = metrics();
    for (method, path, refused) in [
        ("GET", "/", false),
        ("GET", "/version", false),
        ("PUT", "/drives/rootfs", false),
        ("PUT", "/drives/rootfs", true),
        ("PUT", "/mmds/config", false),
        ("PATCH", "/drives/rootfs?x=/y", true),
        ("PATCH", "/nothing", true),
        ("DELETE", "/drives/rootfs", false),
    ] {
        metrics.count_request(method, path, refused);
    }
    let told = serde_json::to_value(metrics).unwrap();
    let nonzero = |group: &str| {
        let figures = told[group].as_object().unwrap().iter().filter(|(_, figure)| **figure != 0);
        figures.map(|(name, figure)| (name.clone(), figure.clone())).collect::<serde_json::Map<_, _>>()
    };
    let expected = json!({ "instance_info_count": 1, "vmm_version_count": 1 });
    assert_eq!(Value::from(nonzero("get_api_requests")), expected);
    let expected = json!({ "drive_count": 2, "drive_fails": 1, "mmds_count": 1 });
    assert_eq!(Value::from(nonzero("put_api_requests")), expected);
    let expected = json!({ "drive_count": 1, "drive_fails": 1 });
    assert_eq!(Value::from(nonzero("patch_api_requests")), expected);
}

#[test]
fn the_start_is_measured_from_what_was_handed_over() {
    let metrics = metrics();
    let start = || serde_json::to_value(&metrics.api_server).unwrap();
    metrics.note_start(None, None, Some(7));
    assert_eq!(start(), json!({ "process_startup_time_us": 0, "process_startup_time_cpu_us": 0 }));
    metrics.note_start(Some(u64::MAX), Some(u64::MAX), Some(7));
    assert_eq!(start(), json!({ "process_startup_time_us": 0, "process_startup_time_cpu_us": 7 }));
    let now = Timestamp::now().wall_us;
    metrics.note_start(Some(now - 1000), Some(0), None);
    assert!(start()["process_startup_time_us"].as_u64().unwrap() >= 1000);
    let cpu = start()["process_startup_time_cpu_us"].as_u64().unwrap();
    assert!(cpu > 0 && cpu <= Timestamp::now().cpu_us);
    metrics.latencies_us.pause_vm.store_since(Instant::now() - Duration::from_millis(3));
    assert!(serde_json::to_value(&metrics.latencies_us.pause_vm).unwrap().as_u64().unwrap() >= 3000);
}

/// Counts what its timer does.
struct Counted(FlushTimer, Rc<Cell<u32>>);

impl MutEventSubscriber for Counted {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.0.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.0.process(events, ops);
        self.1.set(self.1.get() + 1);
    }
}

/// All that concerns the figures and the writer of the process, which tests share.
#[test]
fn metrics_are_set_up_once_and_written_when_the_timer_expires() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    assert!(!flush().unwrap());
    let error = init(config(dir.path())).unwrap_err();
    assert!(crate::exit::chain(&error).contains(dir.path().to_str().unwrap()));
    init(config(&path)).unwrap();
    let error = init(config(&path)).unwrap_err();
    assert!(error.to_string().ends_with("Reinitialization of metrics not allowed."), "{error}");
    assert!(flush().unwrap());
    assert_eq!(read(&path).len(), 1);

    let mut manager = EventManager::new().unwrap();
    let expired = Rc::new(Cell::new(0));
    let timer = FlushTimer::every(Duration::from_millis(1)).unwrap();
    manager.add_subscriber(Counted(timer, Rc::clone(&expired)));
    assert_eq!(read(&path).len(), 2, "at once");
    while expired.get() < 3 {
        manager.run().unwrap();
    }
    assert_eq!(read(&path).len(), 5);
    drop(manager);
    assert_eq!(read(&path).len(), 6, "at the end");

    std::thread::spawn(|| panic!("for the test")).join().unwrap_err();
    let lines = read(&path);
    assert_eq!(lines.last().unwrap()["vmm"]["panic_count"], 1);
    assert_eq!(lines.len(), 7);
}
