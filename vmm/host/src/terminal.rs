//! The terminal in raw mode, and the signals that must not leave it so.
//!
//! Raw mode is the process's, not a value's: a panic on any thread and a signal handler restore it
//! too. Hence the few statics here, and the only `unsafe` of this crate.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

use crate::HostError;

/// Signals that ask the process to end.
const STOP_SIGNALS: [c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// How many of them it takes to end at once, recording closed or not: someone means it.
const SIGNALS_TO_DIE: u32 = 3;

/// The terminal as it was found.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is in raw mode.
static RAW: AtomicBool = AtomicBool::new(false);
/// The eventfd that a signal writes to; negative while there is none.
static STOP_FD: AtomicI32 = AtomicI32::new(-1);
/// Whether a thread has panicked.
static PANICKED: AtomicBool = AtomicBool::new(false);
/// Signals seen.
static SIGNALS_SEEN: AtomicU32 = AtomicU32::new(0);

/// Standard input is a terminal, and this process is the one that it talks to: putting a terminal
/// into raw mode from the background would stop the process.
pub fn terminal_can_be_used() -> bool {
    if !io::stdin().is_terminal() {
        return false;
    }
    // SAFETY: both calls take no pointers and have no preconditions.
    unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

/// The terminal in raw mode while this value lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts standard input into raw mode: every key goes to the guest, Ctrl-C included. Output stays
    /// as it is, since guests differ in how they end lines.
    pub(crate) fn enter() -> Result<Self, HostError> {
        let mut found = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is valid for writes of a termios.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, found.as_mut_ptr()) } != 0 {
            return Err(HostError::system("the terminal's settings")(io::Error::last_os_error()));
        }
        // SAFETY: tcgetattr succeeded, so it has filled the value.
        let found = unsafe { found.assume_init() };
        let mut raw = *ORIGINAL.get_or_init(|| found);
        raw.c_iflag &= !(libc::BRKINT | libc::ICRNL | libc::INLCR | libc::ISTRIP | libc::IXON);
        raw.c_lflag &= !(libc::ECHO | libc::ICANON | libc::IEXTEN | libc::ISIG);
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        RAW.store(true, Ordering::SeqCst);
        // SAFETY: the pointer is to a termios that lives across the call.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw) } != 0 {
            let error = io::Error::last_os_error();
            restore();
            return Err(HostError::system("raw mode for the terminal")(error));
        }
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was found. May be called from a signal handler.
fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(original) = ORIGINAL.get()
    {
        // SAFETY: the pointer is to a termios that lives for ever; tcsetattr is async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, original) };
    }
}

/// Makes a panic on any thread end the process with `status`: the terminal is restored, and `report`
/// tells of the first panic.
pub fn end_on_panic(
    status: u8,
    report: impl Fn(&std::panic::PanicHookInfo<'_>) + Send + Sync + 'static,
) {
    std::panic::set_hook(Box::new(move |info| {
        // One report is enough: whoever comes later waits for the end.
        while PANICKED.swap(true, Ordering::SeqCst) {
            std::thread::park();
        }
        restore();
        report(info);
        // SAFETY: _exit has no preconditions and does not return. It runs nothing of this process,
        // in which other threads may hold any lock.
        unsafe { libc::_exit(c_int::from(status)) }
    }));
}

/// Signals that ask the process to end go to an eventfd while this value lives.
#[derive(Debug)]
pub(crate) struct StopSignals(());

impl StopSignals {
    /// Routes the signals to `stop`, which must outlive the value.
    pub(crate) fn route_to(stop: &EventFd) -> Result<Self, HostError> {
        SIGNALS_SEEN.store(0, Ordering::SeqCst);
        STOP_FD.store(stop.as_raw_fd(), Ordering::SeqCst);
        let this = Self(());
        for signal in STOP_SIGNALS {
            register_signal_handler(signal, on_signal)
                .map_err(|errno| HostError::system("a signal handler")(errno.into()))?;
        }
        // A write past the limit on file sizes is then an error like that of a full disk.
        // SAFETY: SIG_IGN is a valid disposition for this signal.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        Ok(this)
    }
}

impl Drop for StopSignals {
    fn drop(&mut self) {
        for signal in STOP_SIGNALS {
            // SAFETY: SIG_DFL is a valid disposition for each of these signals.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        STOP_FD.store(-1, Ordering::SeqCst);
    }
}

/// Asks for a stop; when asked again and again, restores the terminal and ends the process.
extern "C" fn on_signal(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    if SIGNALS_SEEN.fetch_add(1, Ordering::SeqCst) + 1 >= SIGNALS_TO_DIE {
        restore();
        // SAFETY: _exit is async-signal-safe and does not return.
        unsafe { libc::_exit(128 + signal) };
    }
    let one = 1_u64;
    // SAFETY: write is async-signal-safe, and the pointer is valid for eight bytes; a descriptor
    // that is no more gives an error, which nobody can act on here. errno is the thread's own.
    unsafe {
        libc::write(STOP_FD.load(Ordering::SeqCst), (&raw const one).cast(), 8);
        *libc::__errno_location() = errno;
    }
}
