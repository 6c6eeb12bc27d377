//! The few devices of a PC that a Linux guest cannot do without, one that times its boot, and the signal that the
//! guest is at its end.

mod boot_timer;
mod exit;
mod i8042;
mod power;
mod serial;

pub use boot_timer::{BootTimer, Timestamp};
pub use exit::{ExitKind, ExitSignal};
pub use i8042::{I8042, I8042Error};
pub use power::Power;
pub use serial::Serial;
