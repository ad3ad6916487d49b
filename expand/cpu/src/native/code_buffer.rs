//! Executable memory, never writable and executable through one mapping: a memfd mapped twice.
#![allow(unsafe_code)]

use std::io;
use std::ptr::null;

/// Sequences start on this boundary.
const ALIGN_BYTES: usize = 16;
const PAGE_BYTES: usize = 4096;

/// A growing arena of machine code, and behind it, where code reaches it, memory for its data.
#[derive(Debug)]
pub(crate) struct CodeBuffer {
    writable: *mut u8,
    /// Null while it is being made.
    executable: *const u8,
    code_bytes: usize,
    data_bytes: usize,
    /// Where each region's next code goes, and where the region ends.
    regions: [(usize, usize); 2],
}

/// Code that is executed often lies together, apart from code that seldom is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Region {
    /// The first part of the buffer.
    Hot,
    /// The rest.
    Cold,
}

// SAFETY: the mappings belong to this value alone and are process-wide.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    /// A buffer for `hot_bytes` and `cold_bytes` of code and `data_bytes` of data.
    ///
    /// # Errors
    /// If the host refuses the memory.
    ///
    /// # Panics
    /// If the sizes are not multiples of a page's.
    pub(crate) fn new(hot_bytes: usize, cold_bytes: usize, data_bytes: usize) -> io::Result<Self> {
        assert!((hot_bytes | cold_bytes | data_bytes).is_multiple_of(PAGE_BYTES));
        // SAFETY: plain system calls on a new file descriptor; each result is checked, and the
        // mappings are unmapped only in `drop`.
        unsafe {
            let file = libc::memfd_create(c"reprise-code".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 {
                return Err(io::Error::last_os_error());
            }
            let result = Self::map(file, hot_bytes, hot_bytes + cold_bytes, data_bytes);
            libc::close(file);
            result
        }
    }

    /// # Safety
    /// `file` is an open memfd.
    unsafe fn map(
        file: i32,
        hot_bytes: usize,
        code_bytes: usize,
        data_bytes: usize,
    ) -> io::Result<Self> {
        let map = |at: *mut libc::c_void, bytes, protection, flags, file| {
            // SAFETY: a new mapping, at an address of the kernel's choice or over one of ours.
            let address = unsafe { libc::mmap(at, bytes, protection, flags, file, 0) };
            if address == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(address.cast::<u8>())
            }
        };
        // SAFETY: `file` is a memfd of ours; a failure is reported.
        if unsafe { libc::ftruncate(file, code_bytes as i64) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        let anywhere = std::ptr::null_mut();
        let writable = map(anywhere, code_bytes, read_write, libc::MAP_SHARED, file)?;
        let regions = [(0, hot_bytes), (hot_bytes, code_bytes)];
        // From here on it unmaps what there is, should the rest fail.
        let mut buffer = Self { writable, executable: null(), code_bytes, data_bytes, regions };
        // Code and data lie side by side: first room for both, then the code over its part.
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let both = map(anywhere, code_bytes + data_bytes, read_write, anonymous, -1)?;
        buffer.executable = both;
        let read_execute = libc::PROT_READ | libc::PROT_EXEC;
        let over = libc::MAP_SHARED | libc::MAP_FIXED;
        map(both.cast(), code_bytes, read_execute, over, file)?;
        Ok(buffer)
    }

    /// Where a region's next code will be executed.
    pub(crate) fn next_address(&self, region: Region) -> u64 {
        self.executable as u64 + self.regions[region as usize].0 as u64
    }

    /// Bytes of code that still fit a region.
    pub(crate) fn free_bytes(&self, region: Region) -> usize {
        let (next, end) = self.regions[region as usize];
        end - next
    }

    /// A region's end, for [`CodeBuffer::truncate`].
    pub(crate) fn mark(&self, region: Region) -> usize {
        self.regions[region as usize].0
    }

    /// Forgets a region's code behind a mark; nothing will execute it again.
    pub(crate) fn truncate(&mut self, region: Region, mark: usize) {
        let next = &mut self.regions[region as usize].0;
        assert!(mark <= *next, "the mark was taken before");
        *next = mark;
    }

    /// The data behind the code.
    pub(crate) fn data(&self) -> (*mut u8, usize) {
        (self.executable.wrapping_add(self.code_bytes).cast_mut(), self.data_bytes)
    }

    /// Appends machine code made for [`CodeBuffer::next_address`]; where it can be executed. `None` if
    /// the region is full.
    pub(crate) fn append(&mut self, region: Region, code: &[u8]) -> Option<*const u8> {
        let (start, limit) = self.regions[region as usize];
        let end = start + code.len();
        if end > limit {
            return None;
        }
        // SAFETY: `start..end` lies in the writable mapping and nothing executes those bytes yet.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(start), code.len());
        }
        self.regions[region as usize].0 = end.next_multiple_of(ALIGN_BYTES).min(limit);
        Some(self.executable.wrapping_add(start))
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: the mappings were made in `map` with these sizes, and whoever could call into
        // them is dropped with their owner.
        unsafe {
            libc::munmap(self.writable.cast(), self.code_bytes);
            if !self.executable.is_null() {
                let both = self.code_bytes + self.data_bytes;
                libc::munmap(self.executable.cast_mut().cast(), both);
            }
        }
    }
}
