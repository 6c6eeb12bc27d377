use super::*;
use crate::file::Kernel;

#[test]
fn texts_of_kernel_6_1() {
    let cpu = "usage_usec 1834057\nuser_usec 1231007\nsystem_usec 603050\nnr_periods 12\nnr_throttled 3\n\
               throttled_usec 71942\nnr_bursts 0\nburst_usec 0\n";
    assert_eq!(
        keyed(cpu, ["usage_usec", "throttled_usec", "core_sched.force_idle_usec"]),
        Ok([Some(1_834_057), Some(71_942), None])
    );
    let io = "254:0 rbytes=1056768 wbytes=4096 rios=69 wios=1 dbytes=0 dios=0\n254:16 \n";
    let devices = io_stat(io).unwrap();
    assert_eq!((devices[0].device.as_str(), devices[0].transfers.read_operations), ("254:0", 69));
    assert_eq!(devices[1].transfers, Transfers::default());
    let psi = "some avg10=1.53 avg60=0.87 avg300=0.20 total=1157622\n\
               full avg10=0.00 avg60=0.00 avg300=0.00 total=1157\n";
    let read = pressure(psi).unwrap();
    assert!((read.some.avg10 - 1.53).abs() < 1e-9);
    assert_eq!((read.some.total_usec, read.full.unwrap().total_usec), (1_157_622, 1157));
    assert_eq!(pressure("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n").unwrap().full, None);
    assert_eq!(
        schedstat("154862001 9277482 301\n"),
        Ok(SchedStat { run_usec: 154_862, wait_usec: 9277, timeslices: 301 })
    );
    assert_eq!((limit("max\n"), limit("4096\n")), (Ok(None), Ok(Some(4096))));
}

#[test]
fn texts_of_v1() {
    let bytes = "254:0 Read 1056768\n254:0 Write 4096\n254:0 Sync 1060864\n254:0 Async 0\n254:0 Discard 0\n\
                 254:0 Total 1060864\n8:0 Read 5\nTotal 1060869\n";
    let mut devices = Vec::new();
    let place: fn(&mut Transfers, bool) -> &mut u64 =
        |t, write| if write { &mut t.write_bytes } else { &mut t.read_bytes };
    blkio(bytes, &mut devices, place).unwrap();
    blkio("Total 0\n", &mut devices, place).unwrap();
    assert_eq!(devices.len(), 2);
    let transfers = devices[0].transfers;
    assert_eq!(
        (transfers.read_bytes, transfers.write_bytes, devices[1].transfers.read_bytes),
        (1_056_768, 4096, 5)
    );
}

#[test]
fn hostile_texts_are_refused() {
    for bad in ["", "x", "-1", "+1", "1 2", "18446744073709551616", "0x1", "1.5", "\u{0661}"] {
        number(bad).unwrap_err();
        limit(bad).unwrap_err();
    }
    for bad in ["usage_usec", "usage_usec x", "usage_usec -5", " ", "a 1\n\nb 2"] {
        keyed(bad, ["usage_usec"]).unwrap_err();
    }
    for bad in ["8 rbytes=1", "8:x rbytes=1", "8:0 rbytes", "8:0 rbytes=x", "8:0 wios=-1", "\n"] {
        io_stat(bad).unwrap_err();
    }
    for bad in ["Total", "Total x", "8:0 Read", "8:0 Read x", "8:0 Read 1 2", "x Read 1"] {
        blkio(bad, &mut Vec::new(), |t, _| &mut t.read_bytes).unwrap_err();
    }
    for bad in [
        "",
        "full avg10=0 avg60=0 avg300=0 total=0",
        "some avg10=NaN avg60=0 avg300=0 total=0",
        "some avg10=inf avg60=0 avg300=0 total=0",
        "some avg10=101 avg60=0 avg300=0 total=0",
        "some avg10=0 avg60=0 total=0",
        "some avg10=0 avg60=0 avg300=0 total=-1",
        "any avg10=0 avg60=0 avg300=0 total=0",
        "\n",
    ] {
        pressure(bad).unwrap_err();
    }
    for bad in ["", "1 2", "1 2 3 4", "1 x 3"] {
        schedstat(bad).unwrap_err();
    }
}

#[test]
fn an_error_names_the_file_and_a_missing_file_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.current");
    assert!(matches!(read(&Kernel, &path, number), Ok(None)));
    std::fs::write(&path, "lots\u{1b}[2J").unwrap();
    let error = read(&Kernel, &path, number).unwrap_err().to_string();
    assert!(error.contains("memory.current") && error.contains("lots"), "{error}");
    assert!(!error.contains('\u{1b}'), "{error}");
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(read(&Kernel, &path, number).unwrap_err().to_string().contains("memory.current"));
    let path = Path::new("/proc/self/schedstat");
    SchedStat::parse(&std::fs::read_to_string(path).unwrap(), path).unwrap();
    let error = SchedStat::parse("1 2", path).unwrap_err().to_string();
    assert!(error.contains("schedstat"), "{error}");
}

#[test]
fn time_of_the_host() {
    let text = "cpu  10 1 5 100 7 2 3 40 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n";
    assert_eq!(host_time(text), Ok(HostTime { busy: 21, stolen: 40 }));
    for bad in ["", "cpu 1 2 3", "cpu a b c d e f g h"] {
        host_time(bad).unwrap_err();
    }
}

#[test]
fn quotas() {
    assert_eq!(cpu_max("max 100000\n"), Ok((None, 100_000)));
    assert_eq!(cpu_max("20000 100000\n"), Ok((Some(20_000), 100_000)));
    for bad in ["", "max", "-1 100000", "1 2 3"] {
        cpu_max(bad).unwrap_err();
    }
}
