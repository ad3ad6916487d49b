//! Executable memory, never writable and executable through one mapping: a memfd mapped twice.
#![allow(unsafe_code)]

use std::io;

/// Address space set aside. Sequences are shared, so even Linux with its userland fills a few MiB.
const CAPACITY_BYTES: usize = 256 << 20;
/// Sequences start on this boundary.
const ALIGN_BYTES: usize = 16;

/// A growing arena of machine code.
#[derive(Debug)]
pub(crate) struct CodeBuffer {
    writable: *mut u8,
    executable: *const u8,
    used_bytes: usize,
}

// SAFETY: both mappings belong to this value alone and are process-wide.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain system calls on a new file descriptor; each result is checked, and the
        // mappings are unmapped only in `drop`.
        unsafe {
            let file = libc::memfd_create(c"reprise-code".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 {
                return Err(io::Error::last_os_error());
            }
            let result = Self::map(file);
            libc::close(file);
            result
        }
    }

    /// # Safety
    /// `file` is an open memfd.
    unsafe fn map(file: i32) -> io::Result<Self> {
        let map = |protection| {
            // SAFETY: a new shared mapping at an address of the kernel's choice.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    CAPACITY_BYTES,
                    protection,
                    libc::MAP_SHARED,
                    file,
                    0,
                )
            };
            if address == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(address.cast::<u8>())
            }
        };
        // SAFETY: `file` is a memfd of ours; a failure is reported.
        if unsafe { libc::ftruncate(file, CAPACITY_BYTES as i64) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Self { writable, executable, used_bytes: 0 })
    }

    /// Appends machine code; where it can be executed.
    ///
    /// # Panics
    /// If the buffer is full: sequences are bounded by the instruction forms that exist, immediates
    /// apart, and `Native` starts afresh before that.
    pub(crate) fn append(&mut self, code: &[u8]) -> *const u8 {
        let start = self.used_bytes.next_multiple_of(ALIGN_BYTES);
        let end = start + code.len();
        assert!(end <= CAPACITY_BYTES, "the code buffer is full");
        // SAFETY: `start..end` lies in the writable mapping and nothing executes those bytes yet.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(start), code.len());
        }
        self.used_bytes = end;
        self.executable.wrapping_add(start)
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: the two mappings were made in `map` with this size, and whoever could call into
        // them is dropped with their owner.
        unsafe {
            libc::munmap(self.writable.cast(), CAPACITY_BYTES);
            libc::munmap(self.executable.cast_mut().cast(), CAPACITY_BYTES);
        }
    }
}
