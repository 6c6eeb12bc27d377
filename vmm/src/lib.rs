//! The Pinfold micro-VMM: puts the microVM together, keeps each of its threads in the cgroup that it belongs
//! to, and runs it.
//!
//! The life of a launch: [`launch`] reads what was asked for, has the cgroups made, joins them and executes itself
//! anew, so that no page of memory stays with the caller. `session` then serves the API and runs the event loop
//! until the guest or a signal ends it; `controller` does what is asked of the microVM; [`machine`] opens KVM, builds
//! the guest's platform and starts the vCPU threads.

mod alarm;
mod api;
mod args;
mod base;
mod cgroup_live;
mod console;
mod controller;
mod cpu_template;
mod descriptors;
mod devices;
mod event_loop;
mod exit;
mod exit_report;
mod files;
mod footprint;
mod fork;
mod guard;
mod io_thread;
mod irq;
mod jail;
pub mod launch;
mod logger;
mod lookup;
pub mod machine;
mod memfd;
mod memory;
mod metrics;
mod observability;
mod placement;
mod prometheus;
mod reaper;
mod seccomp;
mod session;
mod signals;
mod sink;
mod source;
mod threads;
mod vcpu;
mod version;
mod virtiofsd;
mod vm;
mod windows;
