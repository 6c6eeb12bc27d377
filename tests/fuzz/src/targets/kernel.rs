//! The kernel's file, ELF or bzImage, and the initrd behind it.

use arch::initrd;
use arch::kernel::{self, ImagePlacement};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::host::memfd;
use crate::input::Input;

/// What is loaded is where it says.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (choice, padding) = (input.u8(), u64::from(input.u8()) * 0x1000);
    let how = if choice & 1 == 0 { ImagePlacement::Copy } else { ImagePlacement::MapPrivate };
    let ram = if choice & 2 == 0 { 64 << 20 } else { 2 << 20 };
    let image = input.rest();
    let file = memfd(image).expect("the host has memory");
    file.set_len(u64::try_from(image.len()).unwrap_or_default() + padding).expect("the host has memory");
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), ram)]).expect("the host has memory");
    let Ok(loaded) = kernel::load(&memory, &file, how) else { return };
    let ram = u64::try_from(ram).unwrap_or_default();
    assert!(loaded.entry.0 < ram && loaded.end.0 <= ram, "{loaded:?}");
    if let Ok(initrd) = initrd::load(&memory, &file, &loaded, how) {
        assert!(initrd.address.0 >= loaded.end.0, "{initrd:?} {loaded:?}");
        assert!(initrd.address.0 + u64::from(initrd.size) <= ram, "{initrd:?}");
    }
}
