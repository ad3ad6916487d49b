//! Guest RAM as KVM's memory slots, some of them read-only.
//!
//! RAM is one mapping, and slots are views of it. A page whose writes are watched lies in a read-only slot:
//! the guest reads it and executes it at full speed, and a write comes back as if nothing were there. KVM
//! makes no slot read-only that exists (it answers EINVAL), so a view is taken away and made anew, which costs
//! the guest what it had of translations. The vCPU does not run meanwhile, and never misses a view.

use std::collections::BTreeMap;
use std::ops::Range;

use kvm_bindings::{KVM_CAP_READONLY_MEM, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use reprise_machine::ram::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::error::KvmError;

const PAGE_BYTES: u64 = 0x1000;

/// A piece of guest RAM that is contiguous on the host.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    end: u64,
    /// The host's address of its first byte.
    host: u64,
}

/// A view of guest RAM: its end, and whether the guest only reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct View {
    end: u64,
    read_only: bool,
}

/// A virtual machine's memory. Addresses outside RAM are without a slot, so that an access there exits as
/// MMIO.
pub(crate) struct Memory {
    vm: VmFd,
    regions: Vec<Region>,
    /// By guest-physical start, each with its slot's number.
    mapped: BTreeMap<u64, (View, u32)>,
    /// Numbers of slots that are no more.
    unused_slots: Vec<u32>,
    /// The first number that no slot ever had.
    next_slot: u32,
    watched: PageRanges,
}

impl Memory {
    /// Gives all of `ram` to the virtual machine.
    ///
    /// # Safety
    /// `ram` must outlive what this gives and every vCPU of the virtual machine.
    pub(crate) unsafe fn map(vm: VmFd, ram: &GuestRam) -> Result<Self, KvmError> {
        let mut regions = Vec::new();
        for region in ram.memory().iter() {
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| {
                KvmError::Unusable { path: "guest RAM".into(), reason: error.to_string() }
            })?;
            let start = region.start_addr().0;
            regions.push(Region { start, end: start + region.len(), host: host as u64 });
        }
        let mut memory = Self {
            vm,
            regions,
            mapped: BTreeMap::new(),
            unused_slots: Vec::new(),
            next_slot: 0,
            watched: PageRanges::default(),
        };
        memory.bring_up_to_date()?;
        Ok(memory)
    }

    /// The virtual machine.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Has writes to the pages of RAM that `range` touches come back, or no longer.
    pub(crate) fn watch(&mut self, range: Range<u64>, watch: bool) -> Result<(), KvmError> {
        if watch && self.vm.check_extension_raw(u64::from(KVM_CAP_READONLY_MEM)) <= 0 {
            return Err(KvmError::Lacks("KVM_CAP_READONLY_MEM"));
        }
        // Regions are of whole pages.
        for region in &self.regions {
            let start = (range.start & !(PAGE_BYTES - 1)).max(region.start);
            let end = range.end.min(region.end).next_multiple_of(PAGE_BYTES);
            match watch {
                _ if start >= end => {}
                true => self.watched.insert(start..end),
                false => self.watched.remove(start..end),
            }
        }
        self.bring_up_to_date()
    }

    /// Whether a write of RAM here comes back.
    pub(crate) fn is_watched(&self, address: u64) -> bool {
        self.watched.contains(address)
    }

    /// The views that RAM should have, in the order of their addresses. Each lies in one region: what is
    /// watched may reach from one into the next.
    fn wanted(&self) -> Vec<(u64, View)> {
        let mut wanted = Vec::new();
        for region in &self.regions {
            let mut at = region.start;
            for range in self.watched.overlapping(region.start..region.end) {
                let Range { start, end } = range.start.max(region.start)..range.end.min(region.end);
                if start > at {
                    wanted.push((at, View { end: start, read_only: false }));
                }
                wanted.push((start, View { end, read_only: true }));
                at = end;
            }
            if region.end > at {
                wanted.push((at, View { end: region.end, read_only: false }));
            }
        }
        wanted
    }

    /// Takes away the views that are not wanted any more, and makes those that are missing. All others
    /// stay as they are.
    fn bring_up_to_date(&mut self) -> Result<(), KvmError> {
        let wanted: BTreeMap<u64, View> = self.wanted().into_iter().collect();
        let stale = |(start, (view, slot)): (&u64, &(View, u32))| {
            (wanted.get(start) != Some(view)).then_some((*start, *slot))
        };
        let stale: Vec<(u64, u32)> = self.mapped.iter().filter_map(stale).collect();
        for (start, slot) in stale {
            self.set(kvm_userspace_memory_region { slot, ..Default::default() })?;
            self.mapped.remove(&start);
            self.unused_slots.push(slot);
        }
        for (start, view) in wanted {
            if self.mapped.contains_key(&start) {
                continue;
            }
            let slot = self.unused_slots.last().copied().unwrap_or(self.next_slot);
            let userspace_addr = self.host_address(start);
            self.set(kvm_userspace_memory_region {
                slot,
                flags: if view.read_only { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: start,
                memory_size: view.end - start,
                userspace_addr,
            })?;
            // KVM has taken it: only now is the number used.
            if self.unused_slots.pop().is_none() {
                self.next_slot += 1;
            }
            self.mapped.insert(start, (view, slot));
        }
        Ok(())
    }

    fn host_address(&self, address: u64) -> u64 {
        let inside = |region: &&Region| (region.start..region.end).contains(&address);
        let region = self.regions.iter().find(inside).expect("every view lies in a region");
        region.host + (address - region.start)
    }

    fn set(&self, region: kvm_userspace_memory_region) -> Result<(), KvmError> {
        // SAFETY: the range is nothing, or part of the mapping of guest RAM, which outlives the virtual
        // machine as `map` demands: `wanted` cuts every view to one region. Views do not overlap, since
        // regions and ranges of pages do not.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|errno| KvmError::refused(format!("memory slot {}", region.slot), errno))
    }
}

/// Ranges of guest-physical pages that neither overlap nor touch: end by start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct PageRanges(BTreeMap<u64, u64>);

impl PageRanges {
    fn insert(&mut self, range: Range<u64>) {
        let mut whole = range;
        // What overlaps or touches becomes part of it.
        let near: Vec<Range<u64>> =
            self.overlapping(whole.start.saturating_sub(1)..whole.end + 1).collect();
        for range in near {
            self.0.remove(&range.start);
            whole = whole.start.min(range.start)..whole.end.max(range.end);
        }
        if !whole.is_empty() {
            self.0.insert(whole.start, whole.end);
        }
    }

    fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for found in self.overlapping(range.clone()).collect::<Vec<_>>() {
            self.0.remove(&found.start);
            for rest in [found.start..range.start, range.end..found.end] {
                if !rest.is_empty() {
                    self.0.insert(rest.start, rest.end);
                }
            }
        }
    }

    fn contains(&self, address: u64) -> bool {
        self.0.range(..=address).next_back().is_some_and(|(_, end)| address < *end)
    }

    /// Those that overlap, whole, in the order of their addresses.
    fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.0.range(..range.start).next_back();
        let all = before.into_iter().chain(self.0.range(range.clone()));
        let all = all.map(|(start, end)| *start..*end);
        all.filter(move |found| found.end > range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::require_kvm;
    use crate::vcpu::{DEVICE, open};
    use reprise_machine::ram::{HOLE_END, HOLE_START};
    use reprise_random::Random;

    #[test]
    fn ranges_of_pages_are_what_single_pages_are() {
        const PAGES: u64 = 40;
        for seed in 0..50 {
            let mut random = Random::new(seed);
            let (mut ranges, mut single) = (PageRanges::default(), [false; PAGES as usize]);
            for _ in 0..60 {
                let start = random.below(PAGES);
                let end = (start + random.below(9)).min(PAGES);
                let insert = random.below(2) == 0;
                let range = start * PAGE_BYTES..end * PAGE_BYTES;
                if insert {
                    ranges.insert(range);
                } else {
                    ranges.remove(range);
                }
                single[start as usize..end as usize].fill(insert);
                for (page, expected) in (0..).zip(single) {
                    let last = page * PAGE_BYTES + PAGE_BYTES - 1;
                    assert_eq!(ranges.contains(last), expected, "seed {seed}, page {page}");
                }
                let apart = ranges.0.iter().zip(ranges.0.iter().skip(1));
                assert!(apart.clone().all(|((_, end), (start, _))| end < start), "seed {seed}");
            }
        }
    }

    /// KVM takes every view, RAM is covered once, and nothing else is.
    #[test]
    fn views_follow_what_is_watched() {
        require_kvm!();
        let ram = GuestRam::new(4).expect("4 MiB");
        let vm = open(DEVICE).expect("KVM").create_vm().expect("a virtual machine");
        // SAFETY: `memory` is dropped before `ram`.
        let mut memory = unsafe { Memory::map(vm, &ram) }.expect("KVM takes it");
        let views = |memory: &Memory| -> Vec<(u64, u64, bool)> {
            let views = memory.mapped.iter();
            views.map(|(start, (view, _))| (*start, view.end, view.read_only)).collect()
        };
        let end = ram.ram_bytes();
        let whole = vec![(0, HOLE_START, false), (HOLE_END, end, false)];
        assert_eq!(views(&memory), whole);
        memory.watch(0x10_0ff0..0x10_1010, true).expect("KVM takes it");
        let split = [(0x10_0000, 0x10_2000, true), (0x10_2000, end, false)];
        assert_eq!(views(&memory)[1..], [&[(HOLE_END, 0x10_0000, false)][..], &split].concat());
        memory.watch(0x10_1000..0x10_1001, false).expect("KVM takes it");
        assert!(memory.is_watched(0x10_0fff) && !memory.is_watched(0x10_1000));
        assert_eq!(views(&memory)[3], (0x10_1000, end, false));
        // From the first byte of RAM to its end.
        memory.watch(0..1, true).expect("KVM takes it");
        memory.watch(end - 1..end, true).expect("KVM takes it");
        assert_eq!(views(&memory).last(), Some(&(end - PAGE_BYTES, end, true)));
        memory.watch(0..end, false).expect("KVM takes it");
        assert_eq!(views(&memory), whole);
    }

    /// A guest's file says where its text is, and may say anything.
    #[test]
    fn no_view_reaches_past_ram() {
        require_kvm!();
        let ram = GuestRam::new(4).expect("4 MiB");
        let end = ram.ram_bytes();
        for range in [
            end - PAGE_BYTES..end + PAGE_BYTES,
            end - 1..u64::MAX,
            end + PAGE_BYTES..end + 2 * PAGE_BYTES,
            HOLE_START - 1..HOLE_END + 1,
            HOLE_START + PAGE_BYTES..HOLE_END + 1,
            HOLE_START..HOLE_END,
            0..u64::MAX,
            u64::MAX - 1..u64::MAX,
        ] {
            let vm = open(DEVICE).expect("KVM").create_vm().expect("a virtual machine");
            // SAFETY: `memory` is dropped before `ram`.
            let mut memory = unsafe { Memory::map(vm, &ram) }.expect("KVM takes it");
            memory.watch(range.clone(), true).expect("KVM takes it");
            let mut at = 0;
            for (start, (view, _)) in &memory.mapped {
                at = if at == HOLE_START { HOLE_END } else { at };
                assert_eq!(*start, at, "{range:x?}");
                let overlaps = range.start < view.end && *start < range.end;
                assert_eq!(view.read_only, overlaps, "{range:x?}, {start:#x}");
                at = view.end;
            }
            assert_eq!(at, end, "{range:x?}");
            assert!(!memory.is_watched(HOLE_START) && !memory.is_watched(end), "{range:x?}");
        }
    }

    /// A number is free again once its slot is gone, and never while it is there.
    #[test]
    fn what_kvm_refuses_costs_no_slot() {
        require_kvm!();
        let ram = GuestRam::new(4).expect("4 MiB");
        let vm = open(DEVICE).expect("KVM").create_vm().expect("a virtual machine");
        // SAFETY: `memory` is dropped before `ram`.
        let mut memory = unsafe { Memory::map(vm, &ram) }.expect("KVM takes it");
        let host = memory.regions[1].host;
        // No mapping of this process lies at an odd address.
        memory.regions[1].host += 1;
        assert!(memory.watch(HOLE_END..HOLE_END + 1, true).is_err());
        memory.regions[1].host = host;
        memory.bring_up_to_date().expect("KVM takes it");
        let mut slots: Vec<u32> = memory.mapped.values().map(|(_, slot)| *slot).collect();
        slots.extend(&memory.unused_slots);
        slots.sort_unstable();
        assert_eq!(slots, Vec::from_iter(0..memory.next_slot));
        assert_eq!(memory.mapped.len(), 3);
    }
}
