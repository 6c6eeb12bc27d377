use super::*;

/// Controllers apart, as on the machines of the developers, with an empty v2.
const APART: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
const APART_OWN: &str = "9:name=systemd:/\n4:memory:/a/b:c\n1:cpu:/\n0::/x\n";

fn path(text: &str) -> CgroupPath {
    text.parse().unwrap()
}

fn v2_only(mount: &str, own: &str) -> Option<Hierarchy> {
    Hierarchies::parse(mount, own).v2
}

#[test]
fn v1_apart_and_hybrid() {
    let all = Hierarchies::parse(APART, APART_OWN);
    assert_eq!(all.own_cgroup("memory"), Some(&path("/a/b:c")));
    assert_eq!(all.own_cgroup(""), Some(&path("/x")));
    assert_eq!(all.own_cgroup("pids"), None);
    let Chosen::V1(v1) = all.choose(VersionChoice::Auto).unwrap() else { panic!("controllers are in v1") };
    assert_eq!(v1.iter().map(|h| h.key.as_str()).collect::<Vec<_>>(), ["name=systemd", "memory", "cpu", ""]);
    assert_eq!(v1[1].dir(&path("/p")).unwrap(), Path::new("/sys/fs/cgroup/memory/p"));
    assert_eq!(v1[1].dir(&CgroupPath::root()).unwrap().as_os_str(), "/sys/fs/cgroup/memory");
    assert!(v1[0].only_tracks() && v1[3].only_tracks() && v1[2].has("cpu") && !v1[2].has("cpuacct"));
    assert!(matches!(all.choose(VersionChoice::V2).unwrap(), Chosen::V2(v2) if v2.key.is_empty()));
}

#[test]
fn v1_mounted_together_and_hybrid_with_controllers_in_v2() {
    let mounts = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate";
    let all = Hierarchies::parse(mounts, "3:cpu,cpuacct:/a\n2:net_cls,net_prio:/\n0::/");
    let Chosen::V1(v1) = all.choose(VersionChoice::Auto).unwrap() else { panic!("cpu is in v1") };
    assert!(v1[0].has("cpu") && v1[0].has("cpuacct"));
    let all = Hierarchies::parse(
        &mounts.lines().skip(1).collect::<Vec<_>>().join("\n"),
        "2:net_cls,net_prio:/\n0::/",
    );
    assert!(matches!(all.choose(VersionChoice::Auto).unwrap(), Chosen::V2(_)));
    assert!(matches!(all.choose(VersionChoice::V1).unwrap(), Chosen::V1(_)));
}

#[test]
fn nothing_mounted_is_said() {
    for (mounts, own) in
        [("", "0::/"), ("1 2 0:3 / /x rw - cgroup cgroup rw,name=systemd", "1:name=systemd:/\n0::/")]
    {
        let all = Hierarchies::parse(mounts, own);
        for version in [VersionChoice::Auto, VersionChoice::V1, VersionChoice::V2] {
            assert!(matches!(all.choose(version), Err(HierarchyError::NotMounted { .. })), "{version:?}");
        }
    }
}

#[test]
fn v2_wherever_it_is_mounted() {
    let v2 = v2_only("1 2 0:3 / /mnt/my\\040cg\\134x rw - cgroup2 none rw", "0::/a").unwrap();
    assert_eq!(v2.dir(&path("/p/q")).unwrap(), Path::new("/mnt/my cg\\x/p/q"));
}

#[test]
fn a_mount_of_a_part_shows_that_part_only() {
    let v2 =
        v2_only("1 2 0:3 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw", "0::/docker/abc/d").unwrap();
    assert_eq!(v2.dir(v2.own.as_ref().unwrap()).unwrap(), Path::new("/sys/fs/cgroup/d"));
    assert_eq!(v2.dir(&path("/kubepods")), None);
    assert_eq!(v2.dir(&path("/docker/abcd")), None);
}

#[test]
fn the_writable_and_widest_mount_is_taken() {
    let mounts = "\
1 2 0:3 / /ro ro - cgroup2 cgroup rw
1 2 0:3 /a /part rw - cgroup2 cgroup rw
1 2 0:3 / /whole rw - cgroup2 cgroup rw
1 2 0:3 / /hidden rw - cgroup2 cgroup rw
1 2 0:4 / /hidden rw - tmpfs tmpfs rw
1 2 0:3 /../.. /outside rw - cgroup2 cgroup rw";
    assert_eq!(v2_only(mounts, "0::/").unwrap().point, Path::new("/whole"));
    let hidden = mounts.lines().skip(3).collect::<Vec<_>>().join("\n");
    assert_eq!(v2_only(&hidden, "0::/"), None);
    let error = Hierarchies::parse(&hidden, "0::/").choose(VersionChoice::V2).unwrap_err().to_string();
    assert!(error.contains("what is mounted on /outside is outside"), "{error}");
}

#[test]
fn our_own_group_may_be_gone_or_out_of_sight() {
    let mount = "1 2 0:3 / /c rw - cgroup2 cgroup rw";
    for own in ["0::/a (deleted)", "0::/../a", "0::relative"] {
        assert_eq!(v2_only(mount, own).unwrap().own, None, "{own}");
    }
}

#[test]
fn garbage_is_passed_over() {
    for text in
        ["", "\n\n", " - ", "a b c", "1 2 3 / /x rw - cgroup2", "1 2 3 / /\\0 rw - cgroup2 c rw", "::", ":"]
    {
        let _ = Hierarchies::parse(text, text);
        let _ = Hierarchies::parse(text, "0::/");
    }
    assert_eq!(unescape("\\"), b"\\");
    assert_eq!(unescape("\\999a\\040"), b"\\999a ");
}

#[test]
fn which_groups_were_made_for_a_sandbox() {
    for not in [
        "/",
        "/system.slice/containerd.service",
        "/user.slice/user-0.slice/session-3.scope",
        "/user.slice/user-1000.slice/user@1000.service",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope",
        "/init.scope",
    ] {
        assert!(!made_for_us(&path(not)), "{not}");
    }
    for made in
        ["/kubepods/pod1/sandbox", "/docker/abc", "/m.slice/cri-abc.scope", "/system.slice/c.service/kata/x"]
    {
        assert!(made_for_us(&path(made)), "{made}");
    }
}
