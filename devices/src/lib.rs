//! The devices of a Pinfold microVM: the bus that vCPUs reach them by, the few legacy devices of a PC that a
//! Linux guest needs, and virtio.
//!
//! A device knows neither cgroups nor phases, and opens no KVM file: the `vmm` crate hands it the eventfds that
//! are wired to KVM and runs its event source on the thread that it chooses.

pub mod bus;
pub mod legacy;
pub mod virtio;
