use super::*;

const LOW: u64 = 0xC010_0000;
const HIGH: u64 = 1 << 40;
const LEN: u64 = 0x1000;
const PORTS: u64 = 0x2000;
const PORTS_LEN: u64 = 0x100;

/// Answers with the offset, and remembers what was written where.
struct Function {
    config: ConfigSpace,
    written: Vec<u64>,
    behind_ports: Arc<Mutex<HostBridge>>,
}

impl PciFunction for Function {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn decoded(&self, space: Space) -> Option<(u64, u64)> {
        self.config.decoded(space)
    }

    fn ports(&self) -> Option<Arc<Mutex<dyn BusDevice>>> {
        Some(Arc::clone(&self.behind_ports) as _)
    }
}

impl BusDevice for Function {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&offset.to_le_bytes()[..data.len()]);
    }

    fn write(&mut self, offset: u64, _: &[u8]) {
        self.written.push(offset);
    }
}

/// Where doorbells are.
#[derive(Default)]
struct Known {
    at: Mutex<Vec<(Space, u64)>>,
    refuse: std::sync::atomic::AtomicBool,
}

impl Doorbells for Arc<Known> {
    fn attach(&self, space: Space, base: u64) -> io::Result<()> {
        if self.refuse.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::ErrorKind::Other.into());
        }
        self.at.lock().unwrap().push((space, base));
        Ok(())
    }

    fn detach(&self, space: Space, base: u64) {
        let mut at = self.at.lock().unwrap();
        let index = at.iter().position(|known| *known == (space, base)).expect("attached before");
        at.remove(index);
    }
}

struct Fixture {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    pci: PciBus,
    known: Vec<Arc<Known>>,
}

impl Fixture {
    /// Two functions behind the host bridge.
    fn new() -> Self {
        let (memory, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = [LOW..=LOW + 0xF_FFFF, HIGH..=HIGH + 0xF_FFFF];
        let mut pci = PciBus::new(&memory, windows, &ports, PORTS..=PORTS + 0xFFF);
        let mut known = Vec::new();
        for number in 1..=2 {
            assert_eq!(pci.free(), Some(number));
            let mut config =
                ConfigSpace::new(Identity { vendor: 7, device: 8, subsystem: 9, revision: 0, class: [0; 3] });
            config.set_bar(Space::Memory, LOW + number as u64 * LEN, LEN);
            config.set_bar(Space::Ports, PORTS + number as u64 * PORTS_LEN, PORTS_LEN);
            let doorbells = Arc::new(Known::default());
            let behind_ports = Arc::new(Mutex::new(HostBridge::new()));
            let function = Function { config, written: Vec::new(), behind_ports };
            pci.insert(number, Arc::new(Mutex::new(function)), Box::new(Arc::clone(&doorbells)));
            known.push(doorbells);
        }
        Self { memory, ports, pci, known }
    }

    fn read(&mut self, device: u64, register: u64) -> u32 {
        let mut data = [0x55; 4];
        self.pci.read(device << 15 | register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, device: u64, register: u64, value: u32) {
        self.pci.write(device << 15 | register, &value.to_le_bytes());
    }

    /// As an operating system does it.
    fn move_to(&mut self, device: u64, base: u64) {
        self.write(device, 4, 0);
        for (register, shift) in [(0x10, 0), (0x14, 32)] {
            self.write(device, register, u32::try_from(base >> shift & 0xFFFF_FFFF).unwrap());
        }
        self.write(device, 4, 2);
    }

    fn answers(&self, address: u64) -> bool {
        let mut data = [0x55; 4];
        self.memory.read(address, &mut data);
        data != [0xFF; 4]
    }

    fn known_in(&self, device: usize) -> Vec<(Space, u64)> {
        self.known[device - 1].at.lock().unwrap().clone()
    }

    /// Where in memory the doorbells are.
    fn known(&self, device: usize) -> Vec<u64> {
        let memory = |(space, base)| (space == Space::Memory).then_some(base);
        self.known_in(device).into_iter().filter_map(memory).collect()
    }
}

#[test]
fn functions_are_found_where_they_are() {
    let mut fixture = Fixture::new();
    assert_eq!((fixture.read(0, 0), fixture.read(0, 8) >> 16), (0x0008_1B36, 0x0600));
    assert_eq!((fixture.read(1, 0), fixture.read(2, 0)), (0x0008_0007, 0x0008_0007));
    for nobody in [3 << 15, 31 << 15, 1 << 15 | 1 << 12, 7 << 12, PciBus::ECAM_LEN, u64::MAX] {
        let mut data = [0x55; 4];
        fixture.pci.read(nobody, &mut data);
        assert_eq!(data, [0xFF; 4], "{nobody:#x}");
        fixture.pci.write(nobody, &[0; 4]);
    }
    assert_eq!(fixture.read(1, 0x100), 0);
    for number in 3..32 {
        assert_eq!(fixture.pci.free(), Some(number));
        fixture.pci.insert(number, Arc::new(Mutex::new(HostBridge::new())), Box::new(NoDoorbells));
    }
    assert_eq!(fixture.pci.free(), None);
}

#[test]
fn a_bar_is_there_while_it_is_decoded() {
    let mut fixture = Fixture::new();
    assert!(!fixture.answers(LOW + LEN));
    fixture.write(1, 4, 2);
    assert!(fixture.answers(LOW + LEN) && fixture.answers(LOW + 2 * LEN - 4));
    assert!(!fixture.answers(LOW + 2 * LEN));
    assert_eq!(fixture.known(1), [LOW + LEN]);
    fixture.write(1, 4, 6);
    fixture.write(1, 0x3C, 1);
    assert_eq!(fixture.known(1), [LOW + LEN], "once");
    fixture.write(1, 4, 4);
    assert!(!fixture.answers(LOW + LEN));
    assert_eq!(fixture.known(1), [] as [u64; 0]);
}

#[test]
fn a_bar_moves() {
    let mut fixture = Fixture::new();
    for base in [LOW, HIGH, HIGH + 0xF_F000, LOW + 0xF_F000] {
        fixture.move_to(1, base);
        assert!(fixture.answers(base), "{base:#x}");
        assert_eq!(fixture.known(1), [base]);
    }
    // Without switching decoding off: it is wherever the register says.
    fixture.write(1, 0x10, 0xC010_5000);
    assert_eq!(fixture.known(1), [LOW + 0x5000]);
    assert!(!fixture.answers(LOW + 0xF_F000) && fixture.answers(LOW + 0x5000));
}

#[test]
fn a_bar_elsewhere_is_nowhere() {
    let mut fixture = Fixture::new();
    for base in [0, LOW - LEN, LOW + 0x10_0000, 0xFEE0_0000, HIGH + 0x10_0000, !0xFFF, 1 << 63] {
        fixture.move_to(1, base);
        assert!(!fixture.answers(base), "{base:#x}");
        assert_eq!(fixture.known(1), [] as [u64; 0]);
    }
    fixture.move_to(1, LOW);
    assert!(fixture.answers(LOW));
}

#[test]
fn a_bar_takes_nothing_from_others() {
    let mut fixture = Fixture::new();
    fixture.move_to(1, LOW);
    fixture.move_to(2, LOW);
    assert_eq!((fixture.known(1), fixture.known(2)), (vec![LOW], vec![]));
    // Not the second's, which is not there.
    fixture.write(2, 4, 0);
    assert!(fixture.answers(LOW));
    fixture.move_to(1, HIGH);
    fixture.move_to(2, LOW);
    assert_eq!((fixture.known(1), fixture.known(2)), (vec![HIGH], vec![LOW]));
}

#[test]
fn doorbells_that_cannot_be_are_not_removed() {
    let mut fixture = Fixture::new();
    fixture.known[0].refuse.store(true, std::sync::atomic::Ordering::Relaxed);
    fixture.move_to(1, LOW);
    assert!(fixture.answers(LOW), "the long way works");
    fixture.move_to(1, HIGH);
    assert!(!fixture.answers(LOW) && fixture.answers(HIGH));
}

#[test]
fn doorbells_are_where_ports_are_if_there_are_any() {
    let mut fixture = Fixture::new();
    let ports = PORTS + PORTS_LEN;
    let is_there = |fixture: &Fixture, port| {
        // Nobody answers there either: what counts is that nobody else can come.
        fixture
            .ports
            .insert(port, 1, Arc::new(Mutex::new(HostBridge::new())))
            .inspect(|()| drop(fixture.ports.remove(port)))
            .is_err()
    };
    fixture.write(1, 4, 2);
    assert_eq!(fixture.known_in(1), [(Space::Memory, LOW + LEN)]);
    assert!(!is_there(&fixture, ports));
    fixture.write(1, 4, 3);
    assert_eq!(fixture.known_in(1), [(Space::Ports, ports)]);
    assert!(is_there(&fixture, ports) && is_there(&fixture, ports + 0xFF) && fixture.answers(LOW + LEN));
    // Memory may move meanwhile.
    fixture.write(1, 0x10, 0xC010_5000);
    assert_eq!(fixture.known_in(1), [(Space::Ports, ports)]);
    fixture.write(1, 0x18, 0x2800);
    assert_eq!(fixture.known_in(1), [(Space::Ports, 0x2800)]);
    assert!(!is_there(&fixture, ports) && is_there(&fixture, 0x2800));
    // Elsewhere, or where another one is: back to memory.
    for elsewhere in [0x3000, 0x1F00, 0xCF8, u32::MAX] {
        fixture.write(1, 0x18, elsewhere);
        assert_eq!(fixture.known_in(1), [(Space::Memory, LOW + 0x5000)], "{elsewhere:#x}");
    }
    fixture.write(2, 4, 1);
    fixture.write(1, 0x18, 0x2200);
    assert_eq!(fixture.known_in(1), [(Space::Memory, LOW + 0x5000)]);
    assert_eq!(fixture.known_in(2), [(Space::Ports, 0x2200)]);
    fixture.write(1, 4, 0);
    assert_eq!(fixture.known_in(1), []);
}

#[test]
fn the_bus_may_go_first() {
    let mut fixture = Fixture::new();
    fixture.memory = Arc::new(Bus::new());
    fixture.move_to(1, LOW);
    assert_eq!((fixture.read(1, 4), fixture.known(1)), (2, vec![]));
}
