use super::*;
use vm_memory::GuestAddress;

fn text(line: &Cmdline) -> String {
    line.as_cstring().unwrap().into_string().unwrap()
}

const DEVICES: [MmioDevice; 2] = [
    MmioDevice { base: GuestAddress(0xC000_0000), size: 0x1000, gsi: 5 },
    MmioDevice { base: GuestAddress(0xC000_1000), size: 0x1000, gsi: 6 },
];
const ROOT: RootDrive<'_> = RootDrive { partuuid: None, read_only: false };

#[test]
fn default_arguments() {
    let line = build(None, None, Some(&DEVICES)).unwrap();
    assert_eq!(
        text(&line),
        "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd \
         swiotlb=noforce pci=off"
    );
}

#[test]
fn root_drives() {
    assert_eq!(text(&build(Some("quiet"), Some(ROOT), Some(&[])).unwrap()), "quiet pci=off root=/dev/vda rw");
    let root = RootDrive { partuuid: Some("0eaa91a0-01"), read_only: true };
    assert_eq!(
        text(&build(Some("quiet"), Some(root), Some(&[])).unwrap()),
        "quiet pci=off root=PARTUUID=0eaa91a0-01 ro"
    );
    let root = RootDrive { partuuid: Some("a\nb"), read_only: true };
    assert!(matches!(
        build(Some(""), Some(root), Some(&[])),
        Err(CmdlineError::NotAscii { found: '\n', .. })
    ));
}

#[test]
fn devices_only_without_acpi() {
    let line = build(Some("console=ttyS0 acpi=off pci=off"), Some(ROOT), Some(&DEVICES)).unwrap();
    assert_eq!(
        text(&line),
        "console=ttyS0 acpi=off pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0000000:5 \
         virtio_mmio.device=4K@0xc0001000:6"
    );
    for args in ["acpi=offish", "xacpi=off", "pci=off -- acpi=off", ""] {
        assert!(!text(&build(Some(args), None, Some(&DEVICES)).unwrap()).contains("virtio_mmio"), "{args}");
    }
}

#[test]
fn pci_stays_as_the_user_says() {
    assert_eq!(text(&build(Some("pci=conf1"), None, Some(&[])).unwrap()), "pci=conf1");
    assert_eq!(text(&build(Some(""), None, Some(&[])).unwrap()), "pci=off");
}

#[test]
fn with_pci_nothing_is_said_of_it() {
    assert_eq!(
        text(&build(Some("quiet acpi=off"), Some(ROOT), None).unwrap()),
        "quiet acpi=off root=/dev/vda rw"
    );
    assert_eq!(text(&build(Some(""), None, None).unwrap()), "");
}

#[test]
fn arguments_of_init_stay_last() {
    let line = build(Some("quiet -- --flag acpi=off"), Some(ROOT), Some(&[])).unwrap();
    assert_eq!(text(&line), "quiet pci=off root=/dev/vda rw -- --flag acpi=off");
}

#[test]
fn too_long() {
    let fits = format!("pci=off {}", "x".repeat(MAX_SIZE - 9));
    assert_eq!(text(&build(Some(&fits), None, Some(&[])).unwrap()).len(), MAX_SIZE - 1);
    let error = build(Some(&fits), Some(ROOT), Some(&[])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel command line is too long: with the arguments added for the root drive it has more \
         than 2047 characters"
    );
    let error = build(Some(&"x".repeat(MAX_SIZE)), None, Some(&[])).unwrap_err();
    assert!(matches!(error, CmdlineError::ArgumentsTooLong { len: MAX_SIZE }), "{error:?}");
    let args = format!("acpi=off pci=off {}", "x".repeat(MAX_SIZE - 60));
    let error = build(Some(&args), None, Some(&DEVICES)).unwrap_err();
    assert!(matches!(error, CmdlineError::TooLong { adding: "virtio-mmio devices" }), "{error:?}");
}

#[test]
fn wrong_characters() {
    assert_eq!(
        build(Some("a\0b"), None, Some(&[])).unwrap_err().to_string(),
        "the kernel arguments hold a NUL at byte 1: remove it"
    );
    for (args, c) in [("ab\u{e9}", '\u{e9}'), ("ab\tc", '\t'), ("ab\n", '\n')] {
        let error = build(Some(args), None, Some(&[])).unwrap_err();
        assert!(matches!(error, CmdlineError::NotAscii { found, at: 2 } if found == c), "{error:?}");
    }
}
