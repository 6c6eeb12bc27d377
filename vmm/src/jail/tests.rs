use super::*;
use crate::exit::chain;

fn args(words: &[&str]) -> JailArgs {
    let least = ["jailer", "--id", "a", "--uid", "1", "--gid", "1"].iter();
    JailArgs::read(least.chain(words).map(OsString::from)).unwrap().unwrap()
}

fn order(section: &str) -> Order {
    let config = resources::MicrovmConfig::from_cgroup_json(section).unwrap();
    Order { config, cgroups_path: None, start: false, metadata: None, filters: crate::seccomp::Filters::Off }
}

#[test]
fn a_jailer_is_known_by_its_first_word_or_its_name() {
    let asked = |words: &[&str]| asked_for(words.iter().map(OsString::from));
    assert_eq!(asked(&["/bin/pinfold", "jail", "--id"]).unwrap(), ["/bin/pinfold", "--id"]);
    assert_eq!(asked(&["/opt/kata/bin/jailer", "--id"]).unwrap().len(), 2);
    for other in [&["pinfold", "--id", "jail"][..], &["/jailer/pinfold"], &[]] {
        assert_eq!(asked(other), None);
    }
}

#[test]
fn nothing_but_this_pinfold_is_jailed() {
    let own = std::env::current_exe().unwrap();
    let (name, _) = executable(&args(&["--exec-file", own.to_str().unwrap()])).unwrap();
    assert_eq!(Some(name.as_os_str()), own.file_name());
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("firecracker");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    for (path, word) in [
        (script.as_path(), "is not pinfold"),
        (folder.path(), "no regular file"),
        (&folder.path().join("missing"), "No such file"),
    ] {
        let error = chain(&executable(&args(&["--exec-file", path.to_str().unwrap()])).unwrap_err());
        assert!(error.contains(word) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn the_jailers_groups_go_around_ours() {
    let declare = |words: &[&str], section: &str| {
        let mut order = order(section);
        let around =
            declare_groups(&args(&[&["--exec-file", "f"], words].concat()), "fc".as_ref(), &mut order);
        around.map(|around| (around, order.cgroups_path, order.config.cgroup.version))
    };
    let around = vec![("memory.max".to_owned(), "1G".to_owned())];
    let (set, path, version) = declare(&["--cgroup", "memory.max=1G", "--cgroup-version=2"], "{}").unwrap();
    assert_eq!((set, path.as_deref(), version), (around, Some("/fc/a"), CgroupVersion::V2));
    let (set, path, _) = declare(&["--parent-cgroup", "x/y"], "{}").unwrap();
    assert_eq!((set, path.as_deref()), (Vec::new(), Some("/x/y/a")));
    assert_eq!(declare(&[], r#"{"parent": "/p"}"#).unwrap().1, None);
    for (words, section, word) in [
        (&["--parent-cgroup=x"][..], r#"{"parent": "/p"}"#, "cgroup.parent"),
        (&["--parent-cgroup=x"], r#"{"driver": "none"}"#, "cgroup.driver"),
        (&["--cgroup-version=1"], r#"{"version": "v2"}"#, "cgroup.version"),
    ] {
        let error = declare(words, section).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
