//! Runs each target over its corpus and over inputs made of it.
//!
//! `PINFOLD_FUZZ_SECONDS` makes new inputs for so long for each target, instead of a fixed number of the same ones;
//! `PINFOLD_FUZZ_SEED` chooses them. An input that fails is kept, and its path printed.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuzz::mutate::{Random, mutate};
use fuzz::{TARGETS, Target};
use libtest_mimic::{Arguments, Failed, Trial};

/// An input that takes longer hangs: they take milliseconds, and a second under emulation.
const HANG: Duration = Duration::from_secs(60);

/// What is being run, for who looks after hangs.
type Current = Arc<Mutex<Option<(Instant, &'static str, Vec<u8>)>>>;

/// For how long to make inputs, when that is said.
fn seconds() -> Option<u64> {
    let text = std::env::var("PINFOLD_FUZZ_SECONDS").ok()?;
    Some(text.parse().expect("PINFOLD_FUZZ_SECONDS is a number of seconds"))
}

fn seed() -> u64 {
    let text = std::env::var("PINFOLD_FUZZ_SEED").unwrap_or_else(|_| "1".to_owned());
    text.parse().expect("PINFOLD_FUZZ_SEED is a number")
}

fn corpus(name: &str) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut files = fs::read_dir(folder)?
        .map(|entry| {
            let path = entry?.path();
            let bytes = fs::read(&path)?;
            Ok((path, bytes))
        })
        .collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// Keeps an input that failed.
fn keep(name: &str, bytes: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz-findings");
    let sum = bytes
        .iter()
        .fold(0xCBF2_9CE4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3));
    let path = folder.join(format!("{name}-{sum:016x}"));
    fs::create_dir_all(&folder).and_then(|()| fs::write(&path, bytes)).expect("the target folder has room");
    path
}

/// Ends the process when an input hangs; the input is kept.
fn watch(current: &Current) {
    let current = Arc::clone(current);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let current = current.lock().expect("it is only stored to");
            if let Some((since, name, bytes)) = &*current
                && since.elapsed() > HANG
            {
                eprintln!("{name} hangs, with the input {}", keep(name, bytes).display());
                std::process::abort();
            }
        }
    });
}

fn run_one(target: &Target, bytes: &[u8], from: &str, current: &Current) -> Result<(), Failed> {
    *current.lock().expect("it is only stored to") = Some((Instant::now(), target.name, bytes.to_vec()));
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    *current.lock().expect("it is only stored to") = None;
    result.map_err(|_| {
        let kept = keep(target.name, bytes);
        Failed::from(format!(
            "panicked (see above) on {from}, kept as {}: once it is mended, put it into tests/fuzz/corpus/{}",
            kept.display(),
            target.name
        ))
    })
}

fn run(target: &Target, current: &Current) -> Result<(), Failed> {
    let corpus = corpus(target.name)?;
    if corpus.is_empty() {
        return Err(Failed::from("has no corpus"));
    }
    fuzz::guest::take_reached();
    for (path, bytes) in &corpus {
        run_one(target, bytes, &path.display().to_string(), current)?;
    }
    let reached = fuzz::guest::take_reached();
    if let Some(missed) = target.reaches.iter().find(|name| !reached.contains(*name)) {
        return Err(Failed::from(format!("the corpus never has {missed} counted, only {reached:?}")));
    }
    let corpus: Vec<Vec<u8>> = corpus.into_iter().map(|(_, bytes)| bytes).collect();
    let mut random = Random::new(seed().wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let end = seconds().map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut count = 0;
    while end.map_or(count < u64::from(target.mutations), |end| Instant::now() < end) {
        run_one(target, &mutate(&corpus, &mut random), "a mutation", current)?;
        count += 1;
    }
    if end.is_some() {
        eprintln!("{}: {} inputs of the corpus, {count} made of them", target.name, corpus.len());
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One after another: who hangs is known, and times are comparable.
    arguments.test_threads = Some(1);
    let current = Current::default();
    watch(&current);
    let trials = TARGETS.iter().map(|target| {
        let current = Arc::clone(&current);
        Trial::test(target.name, move || run(target, &current))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    fuzz::host::clean_up();
    conclusion.exit_code()
}
