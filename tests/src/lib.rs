//! Integration tests, the emulated test host, guest images and the demo.
//!
//! A test is a [`case::Case`]: a function with a name and a list of what it needs of the machine. The
//! harness (`tests/suite.rs`) asks [`route`] where each can run. What this machine cannot do runs in
//! a Debian system of our own under QEMU's TCG with nested SVM, built and booted by [`host`]; there
//! [`agent`] takes the orders. [`lab`] is what cases are written with.

pub mod agent;
pub mod artifacts;
pub mod bench;
pub mod case;
pub mod cases;
pub mod host;
#[cfg(test)]
mod inventory;
pub mod lab;
pub mod registry;
pub mod route;
pub mod schedule;
#[cfg(test)]
mod threats;
pub mod times;
pub mod vsock;
