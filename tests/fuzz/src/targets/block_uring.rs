//! A drive that is served by io_uring, where the host has it.

use devices::virtio::block::IoEngine;

/// With `io_engine` `Async`.
pub fn run(bytes: &[u8]) {
    super::block::drive(bytes, IoEngine::Async);
}
