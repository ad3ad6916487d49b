//! Accessed bits that are set early: a CPU that speculates uses translations which the program does not
//! come to, and marks them.
//!
//! Only the accessed bit is ever early; the dirty bit is set by a write that retires (Intel SDM volume
//! 3A, 4.8).

use reprise_machine::paging::{ACCESSED, ADDRESS, LARGE, PRESENT};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{CR0_PG, EFER_LMA};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const ENTRIES: u64 = 512;
const LEVELS: u32 = 4;
/// Entries that are looked at, to find one that is present.
const LOOKS: u64 = 64;

/// Finds a translation that is there, if it does, and sets the accessed bits along it, unless they are to be
/// spared; gives the entry of its page, if that one's was clear. Only four-level paging has any set early.
pub(crate) fn access_early(
    ram: &GuestRam,
    state: &CpuState,
    random: &mut Random,
    spares: bool,
) -> Option<u64> {
    if state.cr0 & CR0_PG == 0 || state.efer & EFER_LMA == 0 {
        return None;
    }
    let mut table = state.cr3 & ADDRESS;
    for level in (0..LEVELS).rev() {
        let start = random.below(ENTRIES);
        let looked_at = (0..LOOKS).map(|look| table + 8 * ((start + look) % ENTRIES));
        let (address, entry) = looked_at
            .filter_map(|address| entry_at(ram, address).map(|entry| (address, entry)))
            .find(|(_, entry)| entry & PRESENT != 0)?;
        let is_clear = entry & ACCESSED == 0;
        if is_clear && !spares {
            ram.memory()
                .write_obj(entry | ACCESSED, GuestAddress(address))
                .expect("the entry was read there");
        }
        if level == 0 || entry & LARGE != 0 {
            return is_clear.then_some(address);
        }
        table = entry & ADDRESS;
    }
    unreachable!("the last level has a page")
}

fn entry_at(ram: &GuestRam, address: u64) -> Option<u64> {
    let there = ram.memory().check_range(GuestAddress(address), 8);
    there.then(|| ram.memory().read_obj(GuestAddress(address)).expect("it lies in RAM"))
}
