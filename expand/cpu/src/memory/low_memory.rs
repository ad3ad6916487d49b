//! Host memory in the first 2 GiB, whose addresses generated code names by a 32-bit displacement.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};

/// An array of `T` in the host's first 2 GiB of address space, all zeros at first.
#[derive(Debug)]
pub(crate) struct LowMemory<T> {
    start: *mut T,
    length: usize,
}

/// Types that any bytes fill, zeros among them.
///
/// # Safety
/// Every bit pattern is a value of the type, which needs no drop.
pub(crate) unsafe trait AnyBytes: Copy {}

// SAFETY: the mapping belongs to this value alone, as a Vec's buffer does.
unsafe impl<T: Send> Send for LowMemory<T> {}

impl<T: AnyBytes> LowMemory<T> {
    /// # Errors
    /// If the host has no such address space left.
    pub(crate) fn new(length: usize) -> io::Result<Self> {
        // SAFETY: a new private mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        assert!(start as usize + length * size_of::<T>() <= 1 << 31, "MAP_32BIT is heeded");
        // SAFETY: the mapping just made. Large pages are a matter of speed alone.
        unsafe { libc::madvise(start, length * size_of::<T>(), libc::MADV_HUGEPAGE) };
        Ok(Self { start: start.cast(), length })
    }

    /// Where the array begins: less than 2^31.
    pub(crate) fn address(&self) -> i32 {
        self.start as usize as i32
    }
}

impl<T> Deref for LowMemory<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `length` values, which any bytes are; generated code touches it
        // only while the CPU that owns this is borrowed to run.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl<T> DerefMut for LowMemory<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl<T> Drop for LowMemory<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this size.
        unsafe { libc::munmap(self.start.cast(), self.length * size_of::<T>()) };
    }
}
