//! The I/O event loop on the main thread.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use devices::legacy::{ExitKind, ExitSignal, Serial};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;

use crate::console::Input;
use crate::signals::StopSignals;

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended, in this way.
    Guest(ExitKind),
    /// A signal asked for it.
    Signal(i32),
}

/// Why the loop could not be set up or go on.
#[derive(Debug, thiserror::Error)]
#[error("the event loop: {0:?}")]
pub struct LoopError(event_manager::Error);

/// The loop and what it serves.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    end: Rc<RefCell<Option<End>>>,
}

impl EventLoop {
    /// A loop that ends on `signals` and on the guest's end.
    pub fn new(signals: StopSignals, exit: Arc<ExitSignal>) -> Result<Self, LoopError> {
        let mut manager = EventManager::new().map_err(LoopError)?;
        let end = Rc::new(RefCell::new(None));
        manager.add_subscriber(Box::new(Stop { signals, exit, end: Rc::clone(&end) }) as Box<_>);
        Ok(Self { manager, end })
    }

    /// Serves `subscriber` on this loop.
    pub fn add(&mut self, subscriber: impl MutEventSubscriber + 'static) {
        self.manager.add_subscriber(Box::new(subscriber));
    }

    /// Waits for events and serves them. Returns why the loop is to end when something ends it.
    pub fn turn(&mut self) -> Result<Option<End>, LoopError> {
        self.manager.run().map_err(LoopError)?;
        Ok(self.end.take())
    }
}

/// Registers a descriptor; an error leaves the loop deaf to it, which only the log can say.
pub fn register(ops: &mut EventOps<'_>, events: Events, what: &str) {
    if let Err(error) = ops.add(events) {
        log::error!("cannot wait for {what}: {error:?}");
    }
}

/// Ends the loop.
struct Stop {
    signals: StopSignals,
    exit: Arc<ExitSignal>,
    end: Rc<RefCell<Option<End>>>,
}

impl Stop {
    const SIGNALS: u32 = 0;
    const EXIT: u32 = 1;
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        register(ops, Events::with_data(&self.signals, Self::SIGNALS, EventSet::IN), "signals");
        register(ops, Events::with_data(self.exit.event(), Self::EXIT, EventSet::IN), "the guest's end");
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let end = match events.data() {
            Self::SIGNALS => self.signals.take().map(End::Signal),
            _ => self.exit.take().map(End::Guest),
        };
        // The first reason stands.
        let mut reason = self.end.borrow_mut();
        *reason = reason.take().or(end);
    }
}

/// Feeds standard input to the serial port, as fast as the guest reads it.
pub struct ConsoleInput {
    input: Input,
    serial: Arc<Mutex<Serial>>,
}

impl ConsoleInput {
    const INPUT: u32 = 0;
    const ROOM: u32 = 1;

    /// Input for `serial`.
    pub fn new(input: Input, serial: Arc<Mutex<Serial>>) -> Self {
        Self { input, serial }
    }

    fn serial(&self) -> std::sync::MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self) -> Events {
        Events::with_data(&self.input, Self::INPUT, EventSet::IN)
    }

    /// Moves what fits. Stops listening when the port is full, until the guest has read it empty, and for good
    /// at the end of the input.
    fn pump(&mut self, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 64];
        let room = self.serial().room().min(bytes.len());
        let done = match room {
            0 => true,
            _ => match self.input.read(&mut bytes[..room]) {
                Ok(0) => true,
                Ok(size) => {
                    self.serial().input(&bytes[..size]);
                    false
                }
                Err(error) => {
                    !matches!(error.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock)
                }
            },
        };
        if done && let Err(error) = ops.remove(self.listen()) {
            log::debug!("cannot stop waiting for standard input: {error:?}");
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Files and /dev/null cannot be waited for: such a console has no input.
        if ops.add(self.listen()).is_err() {
            log::debug!("standard input cannot be waited for; the console has no input");
            return;
        }
        let room = self.serial().room_event();
        register(ops, Events::with_data_raw(room, Self::ROOM, EventSet::IN), "room in the serial port");
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            Self::INPUT => self.pump(ops),
            _ => {
                self.serial().drain_room_event();
                // It fails when we listen already.
                let _ = ops.add(self.listen());
            }
        }
    }
}
