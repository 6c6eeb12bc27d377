use super::*;

/// Reads as its offset, and remembers writes.
#[derive(Default)]
struct Probe(Vec<(u64, Vec<u8>)>);

impl BusDevice for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset).unwrap());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.push((offset, data.to_vec()));
    }
}

fn probe() -> Arc<Mutex<Probe>> {
    Arc::default()
}

fn read(bus: &Bus, address: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0x55; len];
    bus.read(address, &mut data);
    data
}

#[test]
fn accesses_find_their_device() {
    let (bus, low, high) = (Bus::new(), probe(), probe());
    bus.insert(0x10, 0x10, low.clone()).unwrap();
    bus.insert(0x20, 8, high.clone()).unwrap();
    assert_eq!(read(&bus, 0x10, 1), [0]);
    assert_eq!(read(&bus, 0x1f, 1), [0xf]);
    assert_eq!(read(&bus, 0x24, 4), [4; 4]);
    bus.write(0x1e, &[1, 2]);
    bus.write(0x20, &[3]);
    assert_eq!(low.lock().unwrap().0, [(0xe, vec![1, 2])]);
    assert_eq!(high.lock().unwrap().0, [(0, vec![3])]);
}

#[test]
fn nowhere_reads_as_ones_and_swallows_writes() {
    let (bus, device) = (Bus::new(), probe());
    assert_eq!(read(&bus, 0, 8), [0xff; 8]);
    bus.insert(0x10, 0x10, device.clone()).unwrap();
    for (address, len) in
        [(0xf, 1), (0x20, 1), (0x1f, 2), (0xf, 2), (0x8, 0x20), (u64::MAX, 1), (u64::MAX, 8)]
    {
        assert_eq!(read(&bus, address, len), vec![0xff; len], "{address:#x}");
        bus.write(address, &vec![0; len]);
    }
    bus.read(0x10, &mut []);
    bus.write(0x10, &[]);
    assert!(device.lock().unwrap().0.is_empty());
}

#[test]
fn overlaps_are_refused_by_name() {
    let bus = Bus::new();
    bus.insert(0x10, 0x10, probe()).unwrap();
    bus.insert(0x30, 0x10, probe()).unwrap();
    for (first, len) in
        [(0x10, 0x10), (0, 0x11), (0x1f, 1), (0x18, 4), (0, 0x100), (0x20, 0x11), (0, u64::MAX)]
    {
        let error = bus.insert(first, len, probe()).unwrap_err();
        assert!(matches!(error, BusError::Overlap { .. }), "{error}");
    }
    let text = bus.insert(0x1f, 2, probe()).unwrap_err().to_string();
    assert!(text.contains("0x1f-0x20") && text.contains("0x10-0x1f"), "{text}");
    bus.insert(0x20, 0x10, probe()).unwrap();
    bus.insert(0, 0x10, probe()).unwrap();
}

#[test]
fn ranges_must_exist() {
    let bus = Bus::new();
    assert!(matches!(bus.insert(5, 0, probe()), Err(BusError::Range { .. })));
    assert!(matches!(bus.insert(u64::MAX, 2, probe()), Err(BusError::Range { .. })));
    bus.insert(u64::MAX, 1, probe()).unwrap();
    assert_eq!(read(&bus, u64::MAX, 1), [0]);
}

#[test]
fn devices_come_and_go() {
    let bus = Bus::new();
    bus.insert(0x10, 0x10, probe()).unwrap();
    assert!(bus.remove(0x11).is_none());
    assert!(bus.remove(0x10).is_some());
    assert_eq!(read(&bus, 0x10, 1), [0xff]);
    bus.insert(0x18, 0x10, probe()).unwrap();
}

#[test]
fn a_device_may_change_the_bus() {
    struct Leaves(Arc<Bus>);
    impl BusDevice for Leaves {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn write(&mut self, _: u64, _: &[u8]) {
            self.0.remove(0);
        }
    }
    let bus = Arc::new(Bus::new());
    bus.insert(0, 1, Arc::new(Mutex::new(Leaves(bus.clone())))).unwrap();
    assert_eq!(read(&bus, 0, 1), [0]);
    bus.write(0, &[0]);
    assert_eq!(read(&bus, 0, 1), [0xff]);
}

#[test]
fn a_poisoned_device_still_answers() {
    let (bus, device) = (Bus::new(), probe());
    bus.insert(0, 4, device.clone()).unwrap();
    let poisoner = std::thread::spawn(move || {
        let _guard = device.lock().unwrap();
        panic!("poisons the lock, as the test wants");
    });
    assert!(poisoner.join().is_err());
    assert_eq!(read(&bus, 2, 1), [2]);
    bus.write(2, &[0]);
}
