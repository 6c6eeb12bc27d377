//! The bench: Pinfold and other VMMs at the same work, measured in one run (`cargo bench -p tests`).
//!
//! | module | job | where it runs |
//! | --- | --- | --- |
//! | [`options`] | what is asked for, and what travels between the two sides | both |
//! | [`figures`] | what is measured: names, units, which way is better | both |
//! | [`outside`] | chooses and boots the host, follows it, shows progress | this machine |
//! | [`inside`] | who runs when, interleaved | the measuring host |
//! | [`vmm`] | the VMMs and their command lines | the measuring host |
//! | [`guest`], [`clock`], [`footprint`] | a launched VM; instructions or time; its memory | the measuring host |
//! | [`start`], [`net`], [`disk`], [`service`] | the measurements | the measuring host |
//! | [`report`], [`plot`] | tables, Markdown, JSON and SVG under `target/bench` | this machine |
//!
//! The measuring host is this machine if its KVM runs Linux: then time is measured. Else it is an emulated host whose
//! clock counts instructions ([`crate::host::Cpu::Counting`]).

mod clock;
mod disk;
pub mod figures;
mod footprint;
mod guest;
pub mod inside;
mod net;
pub mod options;
pub mod outside;
mod plot;
mod report;
mod service;
mod start;
mod vmm;
