//! A started drive: takes requests from its queues, has their steps carried out, and gives them back.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};

use super::BlockCounters;
use super::disk::{Disk, Step};
use super::drive::{Drive, Verdict, Work};
use super::engine::Engine;
use super::pace::Pace;
use super::polling::{BATCH, Polling};
use super::request::{Request, Status};
use super::task::Tasks;
use crate::rate_limiter::RateLimiter;
use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::iovec::ChainIovecs;
use crate::virtio::virtqueue::{BYTES_PER_EVENT, Chain, QueueError, Virtqueue};

type Guard = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// The most chains that one event serves.
const CHAINS_PER_EVENT: u32 = 256;

/// What a step that gives back or zeroes a range, or flushes, counts for among the bytes of one event.
const COST_OF_NO_TRANSFER: u64 = BYTES_PER_EVENT / 64;

/// The token of a flush, which is not one task's.
const FLUSH: u64 = u64::MAX;

/// How many times in a row a step is tried again when the host says so.
const RETRIES: u8 = 16;

/// What is left of the share of one event.
struct Share {
    bytes: u64,
    turns: u32,
}

impl Share {
    fn whole() -> Self {
        Self { bytes: BYTES_PER_EVENT, turns: CHAINS_PER_EVENT }
    }

    fn take_turn(&mut self) {
        self.turns = self.turns.saturating_sub(1);
    }

    fn take_bytes(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_spent(&self) -> bool {
        self.bytes == 0 || self.turns == 0
    }
}

/// Flushes, of which one is under way at a time: if one fails, the host says so once, and all must hear it. Those
/// that come meanwhile share the next one.
#[derive(Default)]
struct Flushes {
    under_way: Vec<usize>,
    waiting: Vec<usize>,
}

/// A drive between its start and its reset.
pub(super) struct Server {
    /// Dropped before the tasks: then nothing is in flight any more.
    engine: Engine,
    tasks: Tasks,
    /// Tasks whose next step can begin.
    ready: VecDeque<usize>,
    flushes: Flushes,
    memory: Memory,
    queues: Vec<Option<Virtqueue>>,
    /// Which queue is first the next time.
    first: usize,
    iovecs: ChainIovecs,
    polling: Polling,
    /// Chains taken since the last wake-up or wait.
    found: u32,
    counters: Arc<BlockCounters>,
}

impl Server {
    pub(super) fn new(
        engine: Engine,
        memory: Memory,
        queues: Vec<Option<Virtqueue>>,
        counters: Arc<BlockCounters>,
    ) -> Self {
        Self {
            tasks: Tasks::new(engine.depth()),
            engine,
            ready: VecDeque::new(),
            flushes: Flushes::default(),
            memory,
            queues,
            first: 0,
            iovecs: ChainIovecs::new(),
            polling: Polling::default(),
            found: 0,
            counters,
        }
    }

    /// Does what there is to do, as far as the limiter and the share of one event go.
    pub(super) fn serve(&mut self, drive: &mut Drive, limiter: &mut RateLimiter) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let mut share = Share::whole();
        self.polling.woken();
        self.disable_kicks(&memory)?;
        loop {
            self.collect(drive, &memory)?;
            self.go_on(drive, &memory, &mut share)?;
            self.take_new(drive, limiter, &memory, &mut share)?;
            let submitted = self.engine.submit().map_err(|source| DeviceError::Host {
                doing: format!("handing requests of drive {} to io_uring", drive.id),
                source,
            })?;
            // What the host had in its page cache has ended already.
            self.collect(drive, &memory)?;
            self.notify(&memory)?;
            share.take_turn();
            if share.is_spent() || !submitted {
                self.found = 0;
                return self.wake_ourselves();
            }
            // What has just ended may have begun a flush.
            if !self.ready.is_empty() || self.engine.has_prepared() {
                continue;
            }
            self.polling.found(std::mem::take(&mut self.found));
            // The limiter's timer or what is in flight wakes us. Until then the driver need not.
            if limiter.is_blocked() || self.tasks.is_full() {
                return Ok(());
            }
            if self.wait(&memory)? {
                continue;
            }
            if !self.enable_kicks(&memory)? {
                return Ok(());
            }
            self.disable_kicks(&memory)?;
        }
    }

    /// Waits until nothing is in flight on the disk, and puts another one in its place. What is half done begins
    /// anew on the new one. To be followed by a kick, which [`Self::wake_ourselves`] sends.
    pub(super) fn replace_disk(
        &mut self,
        drive: &mut Drive,
        disk: Box<dyn Disk>,
        sectors: u64,
    ) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        // A flush may begin another one.
        while self.engine.submit().is_ok() && self.engine.wait() {
            self.collect(drive, &memory)?;
        }
        self.collect(drive, &memory)?;
        drive.replace_disk(disk, sectors);
        self.engine.set_disk(&drive.id, &*drive.disk);
        for _ in 0..self.ready.len() {
            let Some(token) = self.ready.pop_front() else { break };
            let Some(task) = self.tasks.get(token) else { continue };
            task.done = 0;
            if task.work.fits(sectors) {
                self.ready.push_back(token);
            } else {
                self.finish(token, Status::IoErr, &memory)?;
            }
        }
        self.notify(&memory)?;
        self.wake_ourselves()
    }

    /// Sends ourselves a kick, so that other devices have their turn before this one goes on.
    pub(super) fn wake_ourselves(&self) -> Result<(), DeviceError> {
        Ok(self.queues.iter().flatten().next().map_or(Ok(()), Virtqueue::kick_again)?)
    }

    /// Takes chains from the queues and begins what they ask for.
    fn take_new(
        &mut self,
        drive: &mut Drive,
        limiter: &mut RateLimiter,
        memory: &Guard,
        share: &mut Share,
    ) -> Result<(), DeviceError> {
        let count = self.queues.len();
        let mut pace = Pace::default();
        for index in (self.first..count).chain(0..self.first) {
            loop {
                if share.is_spent() || self.tasks.is_full() {
                    // The next queue's turn, so that none waits for ever.
                    self.first = (index + 1) % count;
                    return Ok(());
                }
                let Some(queue) = &mut self.queues[index] else { break };
                let Some(chain) = queue.pop(memory)? else { break };
                share.take_turn();
                if !self.admit(index, chain, drive, limiter, memory)? {
                    if let Some(queue) = &mut self.queues[index] {
                        queue.undo_pop();
                    }
                    // What waited for the limiter is tried again first.
                    self.first = index;
                    return Ok(());
                }
                self.go_on(drive, memory, share)?;
                if let Engine::Blocking = self.engine
                    && pace.is_time_to_tell(Instant::now)
                {
                    self.notify(memory)?;
                }
            }
        }
        Ok(())
    }

    /// Begins a task for a chain of queue `index`, or answers it at once; `false` if the limiter holds it back.
    fn admit(
        &mut self,
        index: usize,
        chain: Chain<'_>,
        drive: &Drive,
        limiter: &mut RateLimiter,
        memory: &Guard,
    ) -> Result<bool, QueueError> {
        let head = chain.head_index();
        let parsed = self.iovecs.fill(chain, memory).map(|buffers| (Request::parse(&buffers), buffers));
        let len = match &parsed {
            Ok((Ok(request), _)) => request.data_len().into(),
            _ => 0,
        };
        if !limiter.consume(1, len) {
            self.counters.rate_limiter_throttled_events.inc();
            return Ok(false);
        }
        let written = match parsed {
            Ok((request, buffers)) => {
                let verdict = match request {
                    Ok(request) if buffers.writable_len() > 0 => drive.judge(request, &buffers),
                    Ok(_) => Verdict::Answer(Status::IoErr, 0),
                    Err(error) => {
                        self.counters.invalid_reqs_count.inc();
                        log::debug!("drive {}: {error}", drive.id);
                        Verdict::Answer(Status::IoErr, 0)
                    }
                };
                match verdict {
                    Verdict::Work(work) => match self.tasks.begin((index, head), work, &buffers, memory) {
                        Some(token) => {
                            self.ready.push_back(token);
                            return Ok(true);
                        }
                        None => 0,
                    },
                    Verdict::Answer(status, data) => {
                        // Without room for a status there is room for nothing.
                        if status.tell(&buffers) { data + 1 } else { 0 }
                    }
                }
            }
            Err(error) => {
                self.counters.invalid_reqs_count.inc();
                log::debug!("drive {}: {error}", drive.id);
                0
            }
        };
        self.push_used(index, head, written, memory)?;
        Ok(true)
    }

    /// Begins the next step of each task that is ready.
    fn go_on(&mut self, drive: &mut Drive, memory: &Guard, share: &mut Share) -> Result<(), QueueError> {
        while !share.is_spent()
            && let Some(token) = self.ready.pop_front()
        {
            let Some(task) = self.tasks.get(token) else { continue };
            if task.is_done() {
                self.transferred(token, drive, memory)?;
                continue;
            }
            let step = task.next_step();
            share.take_bytes(match &step {
                Step::Read { pieces, .. } | Step::Write { pieces, .. } => pieces.bytes(),
                _ => COST_OF_NO_TRANSFER,
            });
            // SAFETY: the step is of pieces of the task, which stays as it is until `ended` is told.
            let result = unsafe { self.engine.begin(&mut *drive.disk, to_u64(token), &step) };
            if let Some(result) = result {
                self.ended(token, result, drive, memory)?;
            }
        }
        Ok(())
    }

    /// Takes the steps that have ended.
    fn collect(&mut self, drive: &mut Drive, memory: &Guard) -> Result<(), QueueError> {
        while let Some((token, result)) = self.engine.next_ended() {
            match usize::try_from(token) {
                _ if token == FLUSH => self.flushed(result.map(drop), drive, memory)?,
                Ok(token) => self.ended(token, result, drive, memory)?,
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// A step of a task has ended.
    fn ended(
        &mut self,
        token: usize,
        result: io::Result<u64>,
        drive: &mut Drive,
        memory: &Guard,
    ) -> Result<(), QueueError> {
        let Some(task) = self.tasks.get(token) else { return Ok(()) };
        let error = match result {
            Ok(0) if !matches!(task.work, Work::Discard { .. } | Work::Zero { .. }) => {
                io::ErrorKind::UnexpectedEof.into()
            }
            Ok(count) => {
                task.retries = 0;
                task.progress(count);
                if task.is_done() {
                    return self.transferred(token, drive, memory);
                }
                self.ready.push_back(token);
                return Ok(());
            }
            Err(error) if is_temporary(&error) && task.retries < RETRIES => {
                task.retries += 1;
                self.ready.push_back(token);
                return Ok(());
            }
            Err(error) => error,
        };
        let status = drive.status(task.work, &Err(error));
        self.finish(token, status, memory)
    }

    /// All bytes of a task are where they belong, as far as the page cache.
    fn transferred(&mut self, token: usize, drive: &mut Drive, memory: &Guard) -> Result<(), QueueError> {
        let Some(task) = self.tasks.get(token) else { return Ok(()) };
        if task.work == Work::Flush || drive.flush_each_write && task.work.writes() {
            self.flushes.waiting.push(token);
            return self.begin_flush(drive, memory);
        }
        self.finish(token, Status::Ok, memory)
    }

    /// Begins a flush for all tasks that wait for one, unless one is under way.
    ///
    /// Those that wait were taken after it began. It covers every write that the driver has seen complete by then,
    /// without any order between what is in flight: a driver that needs one waits for the write.
    fn begin_flush(&mut self, drive: &mut Drive, memory: &Guard) -> Result<(), QueueError> {
        if !self.flushes.under_way.is_empty() || self.flushes.waiting.is_empty() {
            return Ok(());
        }
        std::mem::swap(&mut self.flushes.under_way, &mut self.flushes.waiting);
        // SAFETY: a flush names nothing.
        match unsafe { self.engine.begin(&mut *drive.disk, FLUSH, &Step::Flush) } {
            Some(result) => self.flushed(result.map(drop), drive, memory),
            None => Ok(()),
        }
    }

    /// The flush that was under way has ended.
    fn flushed(
        &mut self,
        result: io::Result<()>,
        drive: &mut Drive,
        memory: &Guard,
    ) -> Result<(), QueueError> {
        if let Err(error) = &result
            && is_temporary(error)
            // SAFETY: a flush names nothing.
            && unsafe { self.engine.begin(&mut *drive.disk, FLUSH, &Step::Flush) }.is_none()
        {
            return Ok(());
        }
        let result = drive.flushed(result);
        while let Some(token) = self.flushes.under_way.pop() {
            let Some(task) = self.tasks.get(token) else { continue };
            let status = drive.status(task.work, &result);
            self.finish(token, status, memory)?;
        }
        self.begin_flush(drive, memory)
    }

    /// Gives a task's chain back to the driver.
    fn finish(&mut self, token: usize, status: Status, memory: &Guard) -> Result<(), QueueError> {
        let Some(task) = self.tasks.get(token) else { return Ok(()) };
        let (queue, head, written) = (task.queue, task.head, task.conclude(status));
        self.counters.count(task.work, status);
        self.tasks.end(token);
        self.push_used(queue, head, written, memory)
    }

    fn push_used(&mut self, queue: usize, head: u16, written: u32, memory: &Guard) -> Result<(), QueueError> {
        match self.queues.get_mut(queue) {
            Some(Some(queue)) => queue.push_used(memory, head, written),
            _ => Ok(()),
        }
    }

    fn notify(&mut self, memory: &Guard) -> Result<(), QueueError> {
        self.queues.iter_mut().flatten().try_for_each(|queue| queue.notify(memory))
    }

    fn disable_kicks(&mut self, memory: &Guard) -> Result<(), QueueError> {
        self.queues.iter_mut().flatten().try_for_each(|queue| queue.disable_kicks(memory))
    }

    /// Waits for several requests, if that is expected to pay; `true` if some are there. With something in flight
    /// the disk is waited for too, which is the event loop's affair.
    fn wait(&mut self, memory: &Guard) -> Result<bool, QueueError> {
        if !self.polling.pays() || !self.tasks.is_empty() {
            return Ok(false);
        }
        let mut whole = false;
        for queue in self.queues.iter_mut().flatten() {
            // The event loop reads none. What this one was for is found in the ring.
            let _ = queue.kick().read();
            match queue.enable_kick_after(memory, BATCH)? {
                Some(there) => whole |= there,
                // This driver kicks for each, or for none.
                None => return Ok(false),
            }
        }
        whole = whole || Polling::wait(self.queues.iter().flatten().map(Virtqueue::kick));
        self.polling.waited(whole);
        Ok(self.queues.iter().flatten().any(|queue| queue.has_available(memory)))
    }

    /// Asks for kicks of all queues; `true` if something arrived meanwhile.
    fn enable_kicks(&mut self, memory: &Guard) -> Result<bool, QueueError> {
        let mut more = false;
        for queue in self.queues.iter_mut().flatten() {
            more |= queue.enable_kicks(memory)?;
        }
        Ok(more)
    }
}

impl BlockCounters {
    /// `work` ended with `status`.
    fn count(&self, work: Work, status: Status) {
        if status != Status::Ok {
            return self.execute_fails.inc();
        }
        match work {
            Work::Read { len, .. } => {
                self.read_count.inc();
                self.read_bytes.add(len.into());
            }
            Work::Write { len, .. } => {
                self.write_count.inc();
                self.write_bytes.add(len.into());
            }
            Work::Zero { .. } => self.write_count.inc(),
            Work::Flush => self.flush_count.inc(),
            Work::Discard { .. } => self.discard_count.inc(),
        }
    }
}

/// Whether the host asks to try again.
fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Lossless: usize has at most 64 bits.
fn to_u64(token: usize) -> u64 {
    u64::try_from(token).unwrap_or(FLUSH - 1)
}
