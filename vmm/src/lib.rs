//! The Pinfold micro-VMM: puts the microVM together, keeps each of its threads in the cgroup that it belongs
//! to, and runs it.
//!
//! The life of a launch, in the order of the modules: [`launch`] reads what was asked for, has the cgroups made,
//! joins them and executes itself anew, so that no page of memory stays with the caller; [`machine`] then opens
//! KVM, builds the guest's platform, starts the vCPU threads and runs the event loop until the guest or a
//! signal ends it.

mod args;
mod console;
mod descriptors;
mod devices;
mod event_loop;
mod exit;
mod irq;
pub mod launch;
mod logger;
pub mod machine;
mod memory;
mod placement;
mod reaper;
mod signals;
mod vcpu;
mod vm;
