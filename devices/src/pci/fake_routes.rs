//! Routes that lead nowhere, for the tests of what is routed.

use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::msix::{Message, MsixRoutes};

/// Remembers what was asked of it.
pub struct FakeRoutes {
    irqfds: Vec<EventFd>,
    calls: Mutex<Vec<Vec<Option<Message>>>>,
}

impl FakeRoutes {
    pub fn new(vectors: usize) -> Self {
        let irqfds = (0..vectors).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        Self { irqfds, calls: Mutex::default() }
    }

    /// What was routed since the last call.
    pub fn take(&self) -> Vec<Vec<Option<Message>>> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    /// How often a vector was signalled since the last call, as KVM or the next one to route it would find it.
    pub fn signals(&self, vector: usize) -> u64 {
        self.irqfds[vector].read().unwrap_or(0)
    }
}

impl MsixRoutes for FakeRoutes {
    fn irqfds(&self) -> &[EventFd] {
        &self.irqfds
    }

    fn route(&self, messages: &[Option<Message>]) {
        self.calls.lock().unwrap().push(messages.to_vec());
    }
}
