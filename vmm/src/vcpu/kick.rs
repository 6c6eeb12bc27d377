//! Getting a vCPU thread out of KVM_RUN.
//!
//! A signal alone would be lost if it came between the thread's look at its commands and KVM_RUN. So the
//! handler sets `immediate_exit` in the thread's own `kvm_run`: the next KVM_RUN then returns at once with EINTR
//! (Linux, Documentation/virt/kvm/api.rst, section 5).

use std::cell::Cell;
use std::io;
use std::mem;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs. Constant initialisation and no destructor: reading
    /// it in a signal handler touches nothing but the thread's own storage.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that is ours to use.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(_: i32) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` clears the pointer before the vCPU's mapping can go away.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Makes the signal harmless to a thread that does not run a vCPU. To be called before any thread is kicked.
pub fn install() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: an all-zero sigaction is valid (no flags: KVM_RUN must not be restarted); the handler is
        // async-signal-safe, and the signal number is a real-time signal's. It cannot fail.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            libc::sigaction(signal(), &raw const action, ptr::null_mut());
        }
    });
}

/// While it lives, the calling thread can be kicked out of KVM_RUN of the vCPU.
pub struct Kickable(());

impl Kickable {
    /// Makes the calling thread the one that runs `vcpu`. The caller drops the result before `vcpu`.
    pub fn new(vcpu: &mut VcpuFd) -> io::Result<Self> {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Ok(Self(()))
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Makes `thread` return from KVM_RUN, or from a write that waits, and look at its commands.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle has not been joined, so the thread id is valid; the handler is in
    // place since before there was any thread.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
}
