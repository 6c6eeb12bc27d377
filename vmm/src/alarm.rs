//! A timer of the event loop's.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::event_loop::{EventLoop, register};

/// Ends a turn of the event loop at a given time; whoever set it looks afterwards whether it rang.
pub struct Alarm {
    timer: Rc<RefCell<TimerFd>>,
    rang: Rc<Cell<bool>>,
}

impl Alarm {
    /// An alarm that is not set.
    pub fn new(event_loop: &mut EventLoop) -> io::Result<Self> {
        let alarm = Self { timer: Rc::new(RefCell::new(TimerFd::new()?)), rang: Rc::default() };
        event_loop.add(Bell { timer: Rc::clone(&alarm.timer), rang: Rc::clone(&alarm.rang) });
        Ok(alarm)
    }

    /// Lets it ring once after this time, which is not zero, instead of when it was to ring before.
    pub fn set(&self, after: Duration) {
        if let Err(error) = self.timer.borrow_mut().reset(after, None) {
            log::error!("cannot set a timer: {error}");
        }
    }

    /// Whether it rang since this was last asked.
    pub fn rang(&self) -> bool {
        self.rang.take()
    }
}

struct Bell {
    timer: Rc<RefCell<TimerFd>>,
    rang: Rc<Cell<bool>>,
}

impl MutEventSubscriber for Bell {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::new_raw(self.timer.borrow().as_raw_fd(), EventSet::IN);
        register(ops, events, "a timer");
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // It does not wait, as the timer is readable.
        let _ = self.timer.borrow_mut().wait();
        self.rang.set(true);
    }
}
