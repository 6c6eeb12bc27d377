//! A guest's disk under fio.

use super::clock::{Moment, ns};
use super::figures::FigureId;
use super::guest::Guest;
use super::inside::Sink;
use super::start::exits;
use super::vmm::Vmm;
use crate::case::Failure;
use std::fs;
use std::path::Path;

/// The disk, all of it in the host's page cache (tmpfs).
const DISK_MIB: u64 = 128;

/// Makes the disk's file, full of data that is not zero.
pub fn make(path: &Path) -> Result<(), Failure> {
    Ok(fs::write(path, vec![0x5a; usize::try_from(DISK_MIB << 20)?])?)
}

struct Job {
    figure: FigureId,
    /// Where exits per I/O go.
    exits: Option<FigureId>,
    read: bool,
    sequential: bool,
    /// How much is moved, in MiB.
    mib: u64,
    depth: &'static str,
}

const DEPTH_1: &str = "--iodepth=1";
const DEPTH_32: &str = "--iodepth=32";
const BATCHES: &str = "--iodepth=32 --iodepth_batch=16 --iodepth_batch_complete_min=16";

const JOBS: [Job; 8] = [
    Job { figure: FigureId::ReadD1, exits: None, read: true, sequential: false, mib: 32, depth: DEPTH_1 },
    Job { figure: FigureId::WriteD1, exits: None, read: false, sequential: false, mib: 32, depth: DEPTH_1 },
    Job {
        figure: FigureId::ReadD32,
        exits: Some(FigureId::ExitsReadD32),
        read: true,
        sequential: false,
        mib: 64,
        depth: DEPTH_32,
    },
    Job {
        figure: FigureId::WriteD32,
        exits: Some(FigureId::ExitsWriteD32),
        read: false,
        sequential: false,
        mib: 64,
        depth: DEPTH_32,
    },
    Job { figure: FigureId::ReadB16, exits: None, read: true, sequential: false, mib: 128, depth: BATCHES },
    Job { figure: FigureId::WriteB16, exits: None, read: false, sequential: false, mib: 128, depth: BATCHES },
    Job { figure: FigureId::ReadSeq, exits: None, read: true, sequential: true, mib: 1024, depth: DEPTH_1 },
    Job { figure: FigureId::WriteSeq, exits: None, read: false, sequential: true, mib: 1024, depth: DEPTH_1 },
];

/// Runs all jobs on the guest's only disk.
pub fn measure(vmm: &Vmm, guest: &mut Guest, sink: &Sink) -> Result<(), Failure> {
    for job in &JOBS {
        let before = (Moment::now()?, exits());
        let said = guest.ask(&job.order())?;
        let after = (Moment::now()?, exits());
        let (kib, millis) = parse(&said).ok_or_else(|| Failure(format!("fio said `{said}`")))?;
        let per_second = ns(kib) / ns(millis) * 1000.0;
        let value = if job.sequential { per_second / 1024.0 } else { per_second / 4.0 / 1000.0 };
        let idle = after.0.since(&before.0).idle();
        sink.sample(vmm, job.figure, value, sink.counting.then_some(idle));
        if let (Some(figure), Ok(before), Ok(after)) = (job.exits, before.1, after.1) {
            sink.sample(vmm, figure, ns(after.saturating_sub(before)) / (ns(kib) / 4.0), None);
        }
    }
    Ok(())
}

impl Job {
    /// fio's command line. Its terse output is cut to KiB moved and ms taken (fio(1), "Terse output", version 3).
    fn order(&self) -> String {
        let rw = match (self.read, self.sequential) {
            (true, false) => "randread",
            (false, false) => "randwrite",
            (true, true) => "read",
            (false, true) => "write",
        };
        let bs = if self.sequential { "1m" } else { "4k" };
        let fields = if self.read { "6,9" } else { "47,50" };
        format!(
            "fio --name=bench --filename=/dev/vda --direct=1 --ioengine=libaio --thread --rw={rw} --bs={bs} {} \
             --size={DISK_MIB}m --io_size={}m --norandommap --randrepeat=1 --output-format=terse \
             --terse-version=3 >/tmp/fio 2>&1; tail -n 1 /tmp/fio | cut -d';' -f {fields}",
            self.depth, self.mib
        )
    }
}

fn parse(said: &str) -> Option<(u64, u64)> {
    let (kib, millis) = said.split_once(';')?;
    Some((kib.parse().ok()?, millis.parse().ok().filter(|millis| *millis > 0)?))
}
