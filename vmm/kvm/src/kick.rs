//! Stopping a vCPU from another thread.
//!
//! KVM_RUN comes back for a signal that arrives while the guest runs, but a signal that arrives just
//! before it is lost. So a kick does both: it sets `immediate_exit`, which KVM_RUN looks at when it
//! starts, and sends a signal, which ends a KVM_RUN that has already looked.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_int, c_void, pthread_t, siginfo_t};
use reprise_machine::engine::Kick;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::error::KvmError;

/// The signal's offset from SIGRTMIN: any one that nobody else in the process handles.
const SIGNAL_OFFSET: c_int = 2;

/// The signal that ends KVM_RUN.
pub(crate) fn signal() -> c_int {
    SIGRTMIN() + SIGNAL_OFFSET
}

/// The thread that runs the vCPU, and where its `immediate_exit` lies.
struct Target {
    thread: pthread_t,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is used for atomic stores only, and only while the target is registered, which
// is while its mapping lives.
unsafe impl Send for Target {}

/// The engine's [`Kick`]. `kick` takes a lock and must not be called from a signal handler.
#[derive(Default)]
pub(crate) struct VcpuKick {
    requested: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl Kick for VcpuKick {
    fn kick(&self) {
        self.requested.store(true, Ordering::SeqCst);
        if let Some(target) = self.target().as_ref() {
            target.immediate_exit().store(1, Ordering::SeqCst);
            // SAFETY: a registered thread is inside `KvmEngine::run`, and leaves it only after it
            // has unregistered itself, for which it needs the lock that is held here.
            unsafe { libc::pthread_kill(target.thread, signal()) };
        }
    }
}

impl Target {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the vCPU's mapping, which outlives the registration, and every
        // access to it from Rust is atomic or made by the registered thread itself.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }
}

impl VcpuKick {
    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        // The lock guards no invariant that a panic could break.
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a request that nobody has taken.
    pub(crate) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Takes the request, if there is one.
    pub(crate) fn take(&self) -> bool {
        self.requested.load(Ordering::SeqCst) && self.requested.swap(false, Ordering::SeqCst)
    }

    /// Makes kicks reach this thread until the guard is dropped.
    ///
    /// # Safety
    /// `immediate_exit` points at the field of a mapped `kvm_run` that outlives the guard.
    pub(crate) unsafe fn register(&self, immediate_exit: *mut u8) -> Registered<'_> {
        unblock_on_this_thread();
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.target() = Some(Target { thread, immediate_exit });
        Registered { kick: self }
    }
}

/// A thread that kicks reach.
pub(crate) struct Registered<'a> {
    kick: &'a VcpuKick,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        if let Some(target) = self.kick.target().take() {
            target.immediate_exit().store(0, Ordering::SeqCst);
        }
    }
}

/// Installs the handler that does nothing (a signal without one would end the process), once.
pub(crate) fn install_handler() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    INSTALLED
        .get_or_init(|| register_signal_handler(signal(), ignore))
        .map_err(|errno| KvmError::refused("a signal handler for the vCPU's thread", errno))
}

/// A thread inherits its parent's mask; a blocked signal would not end KVM_RUN.
fn unblock_on_this_thread() {
    thread_local! {
        static UNBLOCKED: Cell<bool> = const { Cell::new(false) };
    }
    UNBLOCKED.with(|unblocked| {
        if !unblocked.replace(true) {
            // The number is valid, so this cannot fail.
            let _ = unblock_signal(signal());
        }
    });
}
