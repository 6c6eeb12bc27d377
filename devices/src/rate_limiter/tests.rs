use super::*;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

fn bucket(size: u64, refill_time_ms: u64) -> Option<Bucket> {
    Some(Bucket { size, refill_time_ms, one_time_burst: 0 })
}

fn bytes(bandwidth: Option<Bucket>) -> LimiterConfig {
    LimiterConfig { bandwidth, ops: None }
}

struct Bench {
    clock: Arc<AtomicU64>,
    limiter: RateLimiter,
}

impl Bench {
    fn new(config: LimiterConfig) -> Self {
        let clock = Arc::new(AtomicU64::new(5));
        let limiter = RateLimiter::manual(config, &clock);
        Self { clock, limiter }
    }

    fn set(&self, now: u64) {
        self.clock.store(now, Ordering::Relaxed);
    }

    fn pass(&self, ns: u64) {
        self.clock.fetch_add(ns, Ordering::Relaxed);
    }

    /// When the request that waits is due.
    fn due(&self) -> u64 {
        let Wait::Blocked(due) = self.limiter.wait else { panic!("{:?}", self.limiter.wait) };
        due
    }

    /// How long the request that waits has to, in nanoseconds.
    fn left(&self) -> u64 {
        self.due() - self.clock.load(Ordering::Relaxed)
    }
}

fn readable(limiter: &RateLimiter, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd { fd: limiter.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the first argument is an array of one pollfd.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}

#[test]
fn nothing_is_limited_without_a_size_and_a_time() {
    for config in [
        LimiterConfig::default(),
        bytes(bucket(0, 100)),
        bytes(bucket(100, 0)),
        LimiterConfig { bandwidth: None, ops: Some(Bucket { one_time_burst: 7, ..Bucket::default() }) },
    ] {
        assert!(config.is_unlimited());
        let mut limiter = RateLimiter::new(config).unwrap();
        for _ in 0..3 {
            assert!(limiter.consume(u64::MAX, u64::MAX));
        }
        assert!(!limiter.is_blocked());
    }
    assert!(!bytes(bucket(1, 1)).is_unlimited());
}

#[test]
fn a_full_bucket_passes_and_the_next_request_waits_for_its_own_cost() {
    let mut bench = Bench::new(bytes(bucket(1000, 100)));
    assert!(bench.limiter.consume(1, 600));
    assert!(bench.limiter.consume(1, 400));
    assert!(!bench.limiter.consume(1, 250));
    assert_eq!(bench.left(), 25 * MS);
    // Nothing passes a request that waits, not even one that costs nothing.
    assert!(!bench.limiter.consume(1, 0));
    bench.pass(25 * MS - 1);
    bench.limiter.event();
    assert!(bench.limiter.is_blocked(), "one nanosecond early");
    bench.pass(1);
    bench.limiter.event();
    assert!(!bench.limiter.is_blocked());
    assert!(bench.limiter.consume(1, 250));
    assert!(!bench.limiter.consume(1, 1));
    assert_eq!(bench.left(), MS / 10);
}

#[test]
fn operations_and_bytes_are_both_needed_and_taken_together() {
    let mut bench = Bench::new(LimiterConfig { bandwidth: bucket(1000, 100), ops: bucket(2, 1000) });
    assert!(bench.limiter.consume(1, 1000));
    assert!(!bench.limiter.consume(1, 1000));
    assert_eq!(bench.left(), 100 * MS);
    bench.pass(100 * MS);
    bench.limiter.event();
    assert!(bench.limiter.consume(1, 1000));
    // 0.2 operations have come back.
    assert!(!bench.limiter.consume(1, 1));
    assert_eq!(bench.left(), 400 * MS);
    bench.pass(400 * MS);
    bench.limiter.event();
    // What waited for an operation took no bytes meanwhile.
    assert!(bench.limiter.consume(1, 1000));
}

#[test]
fn a_request_larger_than_the_bucket_waits_for_a_full_one_and_is_paid_off() {
    let mut bench = Bench::new(bytes(bucket(1000, 100)));
    assert!(bench.limiter.consume(1, 3500));
    assert!(!bench.limiter.consume(1, 3500));
    assert_eq!(bench.left(), 350 * MS);
    // What costs nothing in a bucket does not wait for it.
    bench.limiter.release();
    assert!(bench.limiter.consume(1, 0));
    assert!(!bench.limiter.consume(1, 1));
    assert_eq!(bench.left(), 250 * MS + MS / 10);
}

#[test]
fn a_burst_is_used_first_and_once() {
    let limit = Bucket { size: 100, refill_time_ms: 100, one_time_burst: 1000 };
    let mut bench = Bench::new(bytes(Some(limit)));
    assert!(bench.limiter.consume(1, 1050));
    assert!(!bench.limiter.consume(1, 51));
    assert_eq!(bench.left(), MS);
    bench.pass(SECOND);
    bench.limiter.event();
    assert!(bench.limiter.consume(1, 51));
    assert!(bench.limiter.consume(1, 100), "the bucket was full again");
    assert!(!bench.limiter.consume(1, 1));

    // A request that is refused leaves the burst alone.
    let mut bench = Bench::new(LimiterConfig { bandwidth: Some(limit), ops: bucket(1, 1000) });
    assert!(bench.limiter.consume(1, 500));
    assert!(!bench.limiter.consume(1, 500));
    bench.pass(SECOND);
    bench.limiter.event();
    assert!(bench.limiter.consume(1, 500));
    assert!(bench.limiter.consume(0, 100));
    assert!(!bench.limiter.consume(0, 1));
}

#[test]
fn an_idle_bucket_gets_no_fuller_than_full() {
    let mut bench = Bench::new(bytes(bucket(1000, 100)));
    bench.pass(SECOND);
    assert!(bench.limiter.consume(1, 1000));
    bench.pass(SECOND + MS / 2);
    assert!(bench.limiter.consume(1, 1000));
    assert!(!bench.limiter.consume(1, 1));
    assert_eq!(bench.left(), MS / 10, "a full bucket keeps no fraction of a token");
}

/// Ten seconds of requests of one cost, made as soon as they may be, while timers are late by up to `late` ns. The
/// rate is that of the bucket to a single request's precision, whatever was rounded on the way.
#[test]
fn the_rate_is_exact_over_ten_seconds() {
    for (size, refill_time_ms, cost, late) in [
        (1_000_000, 100, 4096, 200_000),
        (1_000_003, 97, 1514, 300_000),
        (77_777_777, 1013, 65_550, 1_000_000),
        (10_485_760, 1000, 131_072, 90_000_000),
        (3, 7, 1, 900_000),
        (1, 1, 1, 700_000),
        (4099, 3, 65_536, 500_000),
        (1 << 40, 1000, 1 << 30, 100_000),
    ] {
        let mut bench = Bench::new(bytes(bucket(size, refill_time_ms)));
        while bench.limiter.consume(1, cost) {}
        let first = bench.due();
        let mut random = 12_345u64;
        let (mut used, mut until) = (0u64, first);
        while until < first + 10 * SECOND {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bench.set(until + (random >> 33) % late);
            bench.limiter.event();
            // The request that was due at `first` belongs to the time before.
            while bench.limiter.consume(1, cost) {
                used += cost;
            }
            until = bench.due();
        }
        let took = u128::from(until - first);
        let expected = u128::from(size) * took / (u128::from(refill_time_ms) * u128::from(MS));
        let error = expected.abs_diff(u128::from(used));
        // Over these ten seconds there are at least a thousand requests in every case.
        assert!(error * 1000 < expected, "{size} in {refill_time_ms} ms: {used} instead of {expected}");
        // `used` counts the request at `first` and not the one at `until`: one token of rounding is left.
        assert!(error <= 1, "{size} in {refill_time_ms} ms: {used} instead of {expected}");
    }
}

#[test]
fn no_size_and_no_time_overflows() {
    let huge = [1, 2, 1000, u64::MAX - 1, u64::MAX];
    for size in huge {
        for refill_time_ms in huge {
            for cost in huge {
                let limit = Some(Bucket { size, refill_time_ms, one_time_burst: size });
                let mut bench = Bench::new(LimiterConfig { bandwidth: limit, ops: limit });
                for now in [6, SECOND, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
                    bench.set(now);
                    for _ in 0..3 {
                        bench.limiter.event();
                        bench.limiter.consume(cost, cost);
                    }
                }
            }
        }
    }
}

#[test]
fn a_change_replaces_what_it_names_and_wakes_what_waits() {
    let mut bench = Bench::new(LimiterConfig { bandwidth: bucket(10, 1000), ops: bucket(1, 1000) });
    assert!(bench.limiter.consume(1, 10));
    assert!(!bench.limiter.consume(1, 10));

    // An absent bucket stays as it is.
    bench.limiter.update(LimiterUpdate { bandwidth: bucket(1000, 1000), ops: None });
    assert!(readable(&bench.limiter, 10_000));
    bench.limiter.event();
    assert!(!bench.limiter.is_blocked());
    assert!(!bench.limiter.consume(1, 10));
    assert_eq!(bench.left(), SECOND);

    // A zero one is removed.
    bench.limiter.update(LimiterUpdate { bandwidth: None, ops: Some(Bucket::default()) });
    bench.limiter.event();
    assert!(bench.limiter.consume(1, 1000));
    assert!(bench.limiter.consume(1, 0));
    assert!(!bench.limiter.consume(1, 1));

    bench.limiter.update(LimiterUpdate { bandwidth: bucket(0, 7), ops: None });
    bench.limiter.event();
    assert!(bench.limiter.consume(u64::MAX, u64::MAX));
    assert!(!LimiterUpdate { bandwidth: bucket(0, 7), ops: None }.sets_a_limit());
    assert!(LimiterUpdate { bandwidth: None, ops: bucket(1, 1) }.sets_a_limit());
}

#[test]
fn a_reset_forgets_the_request_but_not_what_was_used() {
    let mut bench = Bench::new(bytes(bucket(1000, 100)));
    assert!(bench.limiter.consume(1, 1000));
    assert!(!bench.limiter.consume(1, 1000));
    bench.limiter.release();
    assert!(!bench.limiter.is_blocked());
    assert!(!bench.limiter.consume(1, 10));
    assert_eq!(bench.left(), MS);
}

#[test]
fn the_timer_fires_when_the_request_is_covered_and_then_is_quiet() {
    let mut limiter = RateLimiter::new(bytes(bucket(1000, 100))).unwrap();
    assert!(!readable(&limiter, 0));
    assert!(limiter.consume(1, 1000));
    let start = Instant::now();
    assert!(!limiter.consume(1, 200));
    assert!(readable(&limiter, 10_000));
    // Less what the bucket regained between the two requests and the start.
    assert!(start.elapsed() > Duration::from_millis(10), "{:?}", start.elapsed());
    limiter.event();
    assert!(!limiter.is_blocked() && !readable(&limiter, 0));
    assert!(limiter.consume(1, 200));
}
