//! The few devices of a PC that a Linux guest cannot do without, and the signal that the guest is at its end.

mod exit;
mod i8042;
mod power;
mod serial;

pub use exit::{ExitKind, ExitSignal};
pub use i8042::I8042;
pub use power::Power;
pub use serial::Serial;
