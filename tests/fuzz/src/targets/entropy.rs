//! The entropy device.

use devices::virtio::rng::Rng;

use crate::guest::Guest;
use crate::input::Input;
use crate::targets::limiter;

/// A device and its driver.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.flag();
    let rng = Rng::new(limiter(choice, &mut input)).expect("the host has random bytes");
    let mut guest = Guest::new(Box::new(rng), false, &mut input).expect("the host has memory");
    guest.live(&mut input, |_, _| {});
}
