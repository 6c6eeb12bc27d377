//! A drive that is served by blocking calls.

use std::fs::File;

use devices::rate_limiter::LimiterUpdate;
use devices::virtio::block::{Block, BlockConfig, CacheType, IoEngine};

use crate::guest::Guest;
use crate::host::{memfd, path_of};
use crate::input::Input;
use crate::targets::limiter;

/// A drive of 64 KiB that says where its data are from.
fn disk() -> File {
    let contents: Vec<u8> = (0..128_u8).flat_map(|sector| [sector; 512]).collect();
    memfd(&contents).expect("the host has memory")
}

/// A drive and its driver; the host changes the file and the limits.
pub(super) fn drive(bytes: &[u8], engine: IoEngine) {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    let file = disk();
    let config = BlockConfig {
        id: "root".to_owned(),
        path: path_of(&file),
        read_only: choice & 1 != 0,
        cache: if choice & 2 == 0 { CacheType::Writeback } else { CacheType::Unsafe },
        engine,
        queues: if choice & 4 == 0 { 1 } else { 3 },
        limiter: limiter(choice & 8 != 0, &mut input),
    };
    let block = Block::new(config).expect("the file is there");
    let mut guest = Guest::new(Box::new(block), false, &mut input).expect("the host has memory");
    guest.live(&mut input, |guest, input| {
        guest.slot().update(|block: &mut Block| match input.u8() & 3 {
            0 => {
                let other = disk();
                other.set_len(u64::from(input.u16())).expect("the host has memory");
                block.reopen(&path_of(&other)).expect("the file is there");
            }
            1 => file.set_len(u64::from(input.u16())).expect("the host has memory"),
            _ => {
                let limits = limiter(input.flag(), input);
                block.set_limiter(LimiterUpdate { bandwidth: limits.bandwidth, ops: limits.ops });
            }
        });
    });
}

/// With `io_engine` `Sync`.
pub fn run(bytes: &[u8]) {
    drive(bytes, IoEngine::Sync);
}
