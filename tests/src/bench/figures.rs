//! What is measured.

use serde::{Deserialize, Serialize};

/// Figures that are measured together.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// From exec to the guest's first instruction and to its init; the VMM's memory; the price of placement.
    Boot,
    /// TCP, UDP and ping.
    Net,
    /// fio on a disk.
    Blk,
    /// A stream through vsock.
    Vsock,
    /// The latency of API requests.
    Api,
}

impl Group {
    /// All, in the order in which they are measured.
    pub const ALL: [Self; 5] = [Self::Boot, Self::Net, Self::Blk, Self::Vsock, Self::Api];

    /// What it is, as a heading.
    pub fn title(self) -> &'static str {
        match self {
            Self::Boot => "Start and memory",
            Self::Net => "Network",
            Self::Blk => "Disk",
            Self::Vsock => "vsock",
            Self::Api => "API",
        }
    }
}

/// The dimension of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Durations, in 1e6 ns: milliseconds, or millions of instructions.
    Millions,
    /// Short durations, in 1e3 ns: microseconds, or thousands of instructions.
    Thousands,
    /// Gbit per 1e9 ns.
    Gbit,
    /// MiB per 1e9 ns.
    Mib,
    /// Thousands of events per 1e9 ns.
    Kilo,
    /// KiB of memory.
    Kib,
    /// A plain number.
    Count,
}

impl Unit {
    /// Its name, where the clock counts instructions or measures time.
    pub fn name(self, counting: bool) -> &'static str {
        match (self, counting) {
            (Self::Millions, true) => "1e6 instr.",
            (Self::Millions, false) => "ms",
            (Self::Thousands, true) => "1e3 instr.",
            (Self::Thousands, false) => "us",
            (Self::Gbit, true) => "Gbit/1e9 instr.",
            (Self::Gbit, false) => "Gbit/s",
            (Self::Mib, true) => "MiB/1e9 instr.",
            (Self::Mib, false) => "MiB/s",
            (Self::Kilo, true) => "1e3/1e9 instr.",
            (Self::Kilo, false) => "1e3/s",
            (Self::Kib, _) => "KiB",
            (Self::Count, _) => "",
        }
    }
}

/// A figure's identity, and its text.
macro_rules! figures {
    ($($id:ident $group:ident $unit:ident $better:ident $title:literal)+) => {
        /// A figure.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum FigureId { $(#[doc = $title] $id,)+ }

        /// All, in the order in which they are shown.
        pub const FIGURES: &[Figure] = &[$(Figure {
            id: FigureId::$id,
            group: Group::$group,
            title: $title,
            unit: Unit::$unit,
            better: Better::$better,
        },)+];
    };
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Less.
    Less,
    /// More.
    More,
}

/// How a figure is shown.
#[derive(Debug)]
pub struct Figure {
    /// Which it is.
    pub id: FigureId,
    /// Its group.
    pub group: Group,
    /// Its name for people.
    pub title: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
}

figures! {
    FirstInstruction Boot Millions Less "exec to first guest instruction"
    InitBusy         Boot Millions Less "exec to init, busy"
    InitElapsed      Boot Millions Less "exec to init, with idle"
    OverheadRss      Boot Kib      Less "RSS without guest memory"
    OverheadPss      Boot Kib      Less "PSS without guest memory"
    TcpOut           Net  Gbit     More "TCP guest to host"
    TcpIn            Net  Gbit     More "TCP host to guest"
    UdpOut           Net  Kilo     More "UDP packets guest to host"
    UdpIn            Net  Kilo     More "UDP packets host to guest"
    Ping             Net  Thousands Less "ping, median"
    ReadD1           Blk  Kilo     More "4 KiB random read, depth 1"
    WriteD1          Blk  Kilo     More "4 KiB random write, depth 1"
    ReadD32          Blk  Kilo     More "4 KiB random read, depth 32"
    WriteD32         Blk  Kilo     More "4 KiB random write, depth 32"
    ReadB16          Blk  Kilo     More "4 KiB random read, batches of 16"
    WriteB16         Blk  Kilo     More "4 KiB random write, batches of 16"
    ReadSeq          Blk  Mib      More "1 MiB sequential read"
    WriteSeq         Blk  Mib      More "1 MiB sequential write"
    ExitsReadD32     Blk  Count    Less "exits per read, depth 32"
    ExitsWriteD32    Blk  Count    Less "exits per write, depth 32"
    VsockOut         Vsock Gbit    More "vsock guest to host"
    VsockIn          Vsock Gbit    More "vsock host to guest"
    ApiRequest       Api  Thousands Less "API request, median"
}
