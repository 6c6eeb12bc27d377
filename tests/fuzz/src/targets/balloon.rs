//! The balloon.

use devices::virtio::balloon::{Balloon, BalloonConfig};

use crate::guest::Guest;
use crate::input::Input;

/// A device and its driver; the host changes its size and looks at statistics.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    let config = BalloonConfig {
        amount_mib: u32::from(choice >> 4),
        deflate_on_oom: choice & 1 != 0,
        stats_polling_interval_s: u16::from(choice & 2 != 0),
        free_page_reporting: choice & 4 != 0,
    };
    let balloon = Balloon::new(config).expect("the configuration is right");
    let mut guest = Guest::new(Box::new(balloon), false, &mut input).expect("the host has memory");
    guest.live(&mut input, |guest, input| {
        guest.slot().update(|balloon: &mut Balloon| match input.u8() & 3 {
            0 => drop(balloon.set_amount_mib(input.u32())),
            1 => drop(balloon.set_stats_polling_interval_s(input.u16())),
            _ => drop((balloon.stats(), balloon.actual_mib(), balloon.amount_mib())),
        });
    });
}
