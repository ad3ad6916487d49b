//! Huge pages for guest RAM: a guest touches its RAM all over, and each page that the host has to
//! find for it costs a fault; a large one costs hardly more than a small one.
#![allow(unsafe_code)]

use reprise_machine::ram::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Asks the host's kernel to back guest RAM by transparent huge pages. It may do so or not: nothing
/// but speed depends on it.
pub fn advise_huge_pages(ram: &GuestRam) {
    for region in ram.memory().iter() {
        // SAFETY: the range is a mapping that `ram` owns and lends for the call's time; the advice
        // changes neither its contents nor how they are accessed.
        unsafe {
            libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advised_ram_is_zero_and_keeps_what_is_written() {
        let ram = GuestRam::new(8).expect("8 MiB");
        advise_huge_pages(&ram);
        let mut bytes = [0xaa; 2];
        ram.read(0x40_0000, &mut bytes);
        assert_eq!(bytes, [0, 0]);
    }
}
