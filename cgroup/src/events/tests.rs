use std::fs;
use std::path::Path;

use super::*;
use crate::stats::tests::{fake, layout};

const QUIET: &str = "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n";

fn write(dir: &Path, path: &str, text: &str) {
    fs::write(dir.join(path), text).unwrap();
}

fn readable(notifier: &EventNotifier) -> bool {
    let mut poll = libc::pollfd { fd: notifier.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[test]
fn v2_events_of_the_sandbox_and_of_the_groups_above() {
    let dir = fake(&[
        ("p/box/memory.events", QUIET),
        ("p/memory.events", "max 5\noom 1\noom_kill 1\n"),
        ("memory.events", QUIET),
    ]);
    let (mut log, notifier) = layout(dir.path(), &[], Some("/p/box")).watch().unwrap();
    let notifier = notifier.unwrap();
    assert!(!readable(&notifier));
    assert_eq!((log.check().0, log.last_id()), (0, 0), "what was before does not count");
    write(dir.path(), "p/box/memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n");
    write(dir.path(), "p/memory.events", "max 5\noom 1\noom_kill 2\n");
    assert!(readable(&notifier));
    notifier.drain();
    assert!(!readable(&notifier));
    assert_eq!(log.check().0, 4);
    let seen: Vec<_> = log.since(0).map(|e| (e.id, e.group.as_str(), e.kind, e.count, e.total)).collect();
    assert_eq!(
        seen,
        [
            (1, "/p/box", EventKind::Max, 7, 7),
            (2, "/p/box", EventKind::Oom, 2, 2),
            (3, "/p/box", EventKind::OomKill, 1, 1),
            (4, "/p", EventKind::OomKill, 1, 2),
        ]
    );
    assert_eq!(log.since(3).count(), 1);
    assert_eq!(log.since(4).count(), 0);
    assert_eq!(serde_json::to_value(log.since(3).next()).unwrap()["kind"], "oom_kill");
}

#[test]
fn v1_counts() {
    let dir = fake(&[
        ("memory/p/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"),
        ("memory/p/box/memory.failcnt", "3\n"),
    ]);
    let (mut log, notifier) = layout(dir.path(), &["memory"], Some("/p/box")).watch().unwrap();
    assert!(notifier.is_none());
    write(dir.path(), "memory/p/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
    write(dir.path(), "memory/p/box/memory.failcnt", "10\n");
    assert_eq!(log.check().0, 2);
    let seen: Vec<_> = log.since(0).map(|event| (event.kind, event.count, event.total)).collect();
    assert_eq!(seen, [(EventKind::OomKill, 1, 1), (EventKind::Max, 7, 10)]);
}

#[test]
fn a_flood_of_limit_hits_does_not_wash_kills_away() {
    let dir = fake(&[("p/box/memory.events", QUIET)]);
    let (mut log, _) = layout(dir.path(), &[], Some("/p/box")).watch().unwrap();
    write(dir.path(), "p/box/memory.events", "max 1\noom 0\noom_kill 1\n");
    log.check();
    for max in 2..300 {
        write(dir.path(), "p/box/memory.events", &format!("max {max}\noom 0\noom_kill 1\n"));
        log.check();
    }
    assert_eq!((log.kept.len(), log.last_id()), (KEPT, 300));
    assert_eq!(log.since(0).next().unwrap().kind, EventKind::OomKill);
    assert_eq!(log.since(0).last().unwrap().total, 299);
}

#[test]
fn what_cannot_be_read_is_said_once() {
    let dir = fake(&[("p/box/memory.events", QUIET), ("p/memory.events", QUIET)]);
    let (mut log, _) = layout(dir.path(), &[], Some("/p/box")).watch().unwrap();
    write(dir.path(), "p/memory.events", "max many\n");
    fs::remove_file(dir.path().join("p/box/memory.events")).unwrap();
    let (new, errors) = log.check();
    assert_eq!((new, errors.len()), (0, 1));
    assert!(errors[0].to_string().contains("p/memory.events"), "{}", errors[0]);
    assert_eq!(log.check().1.len(), 0);
    write(dir.path(), "p/memory.events", "max many\n");
    layout(dir.path(), &[], None).watch().unwrap_err();
}
