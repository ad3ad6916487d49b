//! A kernel's text where it lies in guest RAM, and what RAM tells of how far the kernel is.
//!
//! All of it is read from RAM and CPU state as they are at a moment, so that whoever begins at a
//! checkpoint knows as much as whoever was there all the time.

use std::ops::Range;

use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::{KernelText, Unpacking};
use reprise_trace::cpu_state::{CpuState, SS};

use crate::candidates::{Candidate, candidates_of};
use crate::guest_code::linear_of;
use reprise_machine::paging::{Paging, is_ram};

pub(crate) const PAGE_BYTES: u64 = 0x1000;
/// A 64-bit kernel that chooses its place takes one with this alignment, or a larger one.
const ALIGNMENT: u64 = 2 << 20;
/// Linear addresses from here on are the kernel's.
const UPPER_HALF: u64 = 1 << 63;
/// A kernel is there if no more than one in so many of its sites is otherwise.
const OTHERWISE: usize = 4;

/// A range of text.
#[derive(Debug)]
pub(crate) struct PlacedText {
    /// Guest-physical addresses.
    pub(crate) range: Range<u64>,
    /// What it held at first, if the kernel gives it up.
    initial: Option<Vec<u8>>,
}

impl PlacedText {
    /// Whether the kernel gives it up.
    pub(crate) fn is_initial(&self) -> bool {
        self.initial.is_some()
    }
}

/// A kernel's text in guest RAM.
#[derive(Debug)]
pub(crate) struct PlacedKernel {
    /// Bytes from where it is linked to.
    pub(crate) displacement: u64,
    /// In the order of their addresses.
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) text: Vec<PlacedText>,
    /// No-operations that are replaced once all alternatives of candidates are applied, in order.
    replaced_behind: Vec<(u64, Vec<u8>)>,
    /// There are alternatives of candidates.
    waits: bool,
}

impl PlacedKernel {
    /// The kernel, so many bytes behind the place where it is linked to.
    pub(crate) fn displaced(kernel: &KernelText, displacement: u64) -> Self {
        let physical_of = |linear| {
            let text = kernel.text.iter().find(|text| text.linear.contains(&linear))?;
            let offset = linear - text.linear.start;
            Some(offset.wrapping_add(text.physical).wrapping_add(displacement))
        };
        let text = kernel.text.iter().map(|text| {
            let start = text.physical.wrapping_add(displacement);
            let bytes = text.linear.end - text.linear.start;
            PlacedText { range: start..start.wrapping_add(bytes), initial: text.initial.clone() }
        });
        let replaced_behind = kernel.replaced_behind.iter();
        let mut replaced_behind: Vec<_> = replaced_behind
            .filter_map(|replaced| Some((physical_of(replaced.address)?, replaced.bytes.clone())))
            .collect();
        replaced_behind.sort();
        Self {
            displacement,
            candidates: candidates_of(kernel, physical_of),
            text: text.collect(),
            replaced_behind,
            waits: !kernel.patched.is_empty(),
        }
    }

    /// Whether all of its text is in RAM: a kernel's file may say anything.
    fn is_in_ram(&self, ram: &GuestRam) -> bool {
        self.text.iter().all(|PlacedText { range, .. }| {
            let bytes = range.end.checked_sub(range.start).and_then(|it| usize::try_from(it).ok());
            bytes.is_some_and(|bytes| bytes == 0 || is_ram(ram, range.start, bytes))
        })
    }

    /// The text at a guest-physical address.
    pub(crate) fn text_at(&self, physical: u64) -> Option<&PlacedText> {
        self.text.iter().find(|text| text.range.contains(&physical))
    }

    /// Whether the kernel, so many bytes farther on, is there: nearly all of its sites in text that stays are.
    fn has_its_sites(&self, ram: &GuestRam, displacement: u64) -> bool {
        let stays = |candidate: &&Candidate| {
            !candidate.read
                && self.text_at(candidate.physical).is_some_and(|text| !text.is_initial())
        };
        let sites: Vec<&Candidate> = self.candidates.iter().filter(stays).collect();
        let otherwise = sites.iter().filter(|candidate| {
            let physical = candidate.physical.wrapping_add(displacement);
            !Candidate { physical, ..***candidate }.is_in(ram)
        });
        let most = sites.len() / OTHERWISE;
        !sites.is_empty() && otherwise.take(most + 1).count() <= most
    }

    /// Whether the kernel has applied the alternatives of all candidates, and behind them others.
    pub(crate) fn has_applied_alternatives(&self, ram: &GuestRam) -> bool {
        !self.waits || self.replaced_behind.iter().any(|replaced| is_replaced(ram, replaced))
    }

    /// Whether a write to this range was the first to show that.
    pub(crate) fn applies_alternatives(&self, ram: &GuestRam, written: &Range<u64>) -> bool {
        let from = written.start.saturating_sub(u64::from(u8::MAX));
        let first = self.replaced_behind.partition_point(|(address, _)| *address < from);
        let near = self.replaced_behind[first..].iter();
        near.take_while(|(address, _)| *address < written.end)
            .any(|replaced| is_replaced(ram, replaced))
    }

    /// The parts of a text that the kernel has not given up.
    pub(crate) fn kept_parts(&self, ram: &GuestRam, text: &PlacedText) -> Vec<Range<u64>> {
        let Range { start, end } = text.range;
        let mut parts: Vec<Range<u64>> = Vec::new();
        for page in (start & !(PAGE_BYTES - 1)..end).step_by(PAGE_BYTES as usize) {
            let part = page.max(start)..(page + PAGE_BYTES).min(end);
            match parts.last_mut() {
                _ if self.is_given_up(ram, part.start) => {}
                Some(last) if last.end == part.start => last.end = part.end,
                _ => parts.push(part),
            }
        }
        parts
    }

    /// Whether the page of an address was text that the kernel has given up: something else is in it.
    pub(crate) fn is_given_up(&self, ram: &GuestRam, physical: u64) -> bool {
        let page = physical & !(PAGE_BYTES - 1);
        let Some(text) = self.text_at(physical) else { return false };
        let Some(initial) = &text.initial else { return false };
        let (start, end) = (page.max(text.range.start), (page + PAGE_BYTES).min(text.range.end));
        let mut now = vec![0; (end - start) as usize];
        if !is_ram(ram, start, now.len()) {
            return true;
        }
        ram.read(start, &mut now);
        let before = initial.get((start - text.range.start) as usize..).unwrap_or_default();
        let same = now.iter().zip(before).filter(|(now, before)| now == before).count();
        same < now.len() / 2
    }
}

fn is_replaced(ram: &GuestRam, (address, before): &(u64, Vec<u8>)) -> bool {
    let mut now = vec![0; before.len()];
    if !is_ram(ram, *address, now.len()) {
        return false;
    }
    ram.read(*address, &mut now);
    now != *before
}

/// Whether the first instructions of the unpacked kernel are there.
fn has_its_entry(kernel: &KernelText, ram: &GuestRam, displacement: u64) -> bool {
    let (entry, expected) = (kernel.entry.wrapping_add(displacement), &kernel.entry_bytes);
    let mut found = vec![0; expected.len()];
    if expected.is_empty() || !is_ram(ram, entry, expected.len()) {
        return false;
    }
    ram.read(entry, &mut found);
    found == *expected
}

/// The kernel, if it lies there.
pub(crate) fn kernel_at(
    kernel: &KernelText,
    ram: &GuestRam,
    displacement: u64,
) -> Option<PlacedKernel> {
    let placed = PlacedKernel::displaced(kernel, displacement);
    let there = has_its_entry(kernel, ram, displacement) || placed.has_its_sites(ram, 0);
    (there && placed.is_in_ram(ram)).then_some(placed)
}

/// The kernel that the guest is in: `None` while the boot stub unpacks it.
pub(crate) fn kernel_of(
    kernel: &KernelText,
    ram: &GuestRam,
    state: &CpuState,
) -> Option<PlacedKernel> {
    if kernel.unpacking == Unpacking::None {
        return kernel_at(kernel, ram, 0);
    }
    let linked = PlacedKernel::displaced(kernel, 0);
    let start = linked.text.first()?.range.start & !(ALIGNMENT - 1);
    let places = (0..ram.ram_bytes()).step_by(ALIGNMENT as usize);
    let mut displacements = places.map(|place| place.wrapping_sub(start));
    let displacement = displacements.find(|displacement| {
        has_its_entry(kernel, ram, *displacement) || linked.has_its_sites(ram, *displacement)
    })?;
    let placed = PlacedKernel::displaced(kernel, displacement);
    (placed.is_in_ram(ram) && is_in(&placed, ram, state)).then_some(placed)
}

/// Whether the CPU executes the kernel or what runs on it. A boot stub is neither: it runs outside of the
/// kernel's text, in the lower half, where it lies.
fn is_in(placed: &PlacedKernel, ram: &GuestRam, state: &CpuState) -> bool {
    const USER: u16 = 3;
    let here = linear_of(state, state.rip);
    let in_text = || {
        let mapping = Paging::from(state).walk(ram, here);
        mapping.is_some_and(|mapping| placed.text_at(mapping.physical).is_some())
    };
    here >= UPPER_HALF || state.segments[SS].selector & USER != 0 || in_text()
}

#[cfg(test)]
mod tests {
    use reprise_machine::paging::write_ram;
    use reprise_time_stamp_sites::{Evidence, Instruction, LastJump, Replaced, Site, Text};
    use reprise_trace::cpu_state::Segment;

    use super::*;

    const LINKED: u64 = 0xffff_ffff_8100_0000;
    const PHYSICAL: u64 = 0x100_0000;
    const INITIAL: u64 = 0x2000;
    /// Of the kernel, from where it is linked to.
    const DISPLACEMENT: u64 = 0xc0_0000;
    const SITES: [u64; 5] = [0x10, 0x100, 0x200, 0x1000, INITIAL + 0x10];

    /// Two pages of text, and one that is given up; one RDTSC of the first is patched in.
    fn kernel() -> KernelText {
        let instruction = Instruction::ReadTimeStamp;
        let site = |offset| Site {
            address: LINKED + offset,
            instruction,
            bytes: 2,
            evidence: Evidence::UnwindTable,
        };
        let text = |range: Range<u64>, initial| Text {
            name: ".text".to_owned(),
            linear: LINKED + range.start..LINKED + range.end,
            physical: PHYSICAL + range.start,
            initial,
        };
        let mut initial = vec![0x90; 0x1000];
        initial[0x10..0x12].copy_from_slice(&[0x0f, 0x31]);
        KernelText {
            entry: PHYSICAL,
            entry_bytes: vec![1, 2, 3, 4],
            sites: SITES.map(site).to_vec(),
            patched: vec![site(0x300)],
            replaced_behind: vec![Replaced { address: LINKED + 0x400, bytes: vec![0x90; 3] }],
            text: vec![text(0..INITIAL, None), text(INITIAL..INITIAL + 0x1000, Some(initial))],
            unpacking: Unpacking::By(LastJump { code: vec![0; 26], offset: 16 }),
            ..KernelText::default()
        }
    }

    fn ram() -> GuestRam {
        let ram = GuestRam::new(64).expect("64 MiB");
        let start = PHYSICAL + DISPLACEMENT;
        write_ram(&ram, start, &[0x90; 0x3000]);
        for site in SITES {
            write_ram(&ram, start + site, &[0x0f, 0x31]);
        }
        ram
    }

    /// At a linear address that is a physical one, of the kernel or not.
    fn at(rip: u64, selector: u16) -> CpuState {
        let mut state = CpuState { rip, efer: 1 << 10, ..CpuState::default() };
        for segment in &mut state.segments {
            *segment = Segment { selector, attributes: 0xa09b, limit: u32::MAX, base: 0 };
        }
        state
    }

    #[test]
    fn the_kernel_is_found_where_its_sites_are_or_its_entry() {
        let (kernel, ram) = (kernel(), ram());
        let place = |state: &CpuState| kernel_of(&kernel, &ram, state).map(|it| it.displacement);
        assert_eq!(place(&at(u64::MAX - 0x1000, 0x10)), Some(DISPLACEMENT));
        let start = PHYSICAL + DISPLACEMENT;
        write_ram(&ram, start + SITES[0], &[0x90; 2]);
        assert_eq!(place(&at(start, 0x10)), Some(DISPLACEMENT), "one is otherwise");
        write_ram(&ram, start + SITES[1], &[0x90; 2]);
        assert_eq!(place(&at(start, 0x10)), None, "two are");
        write_ram(&ram, start, &kernel.entry_bytes);
        assert_eq!(place(&at(start, 0x10)), Some(DISPLACEMENT), "its entry is there");
        assert!(kernel_at(&kernel, &ram, 0).is_none());
    }

    /// A file may say that text is where there is no RAM, and that there is any amount of it.
    #[test]
    fn a_kernel_whose_text_is_not_all_in_ram_is_not_found() {
        let ram = ram();
        let state = at(u64::MAX - 0x1000, 0x10);
        let found = |text| {
            let mut kernel = kernel();
            kernel.text.push(text);
            let there = kernel_at(&kernel, &ram, DISPLACEMENT).is_some();
            assert_eq!(kernel_of(&kernel, &ram, &state).is_some(), there);
            there
        };
        let end = ram.ram_bytes() - DISPLACEMENT;
        let text = |physical: u64, bytes: u64, initial: Option<Vec<u8>>| Text {
            name: ".text.more".to_owned(),
            linear: LINKED + 0x80_0000..LINKED.saturating_add(0x80_0000 + bytes),
            physical,
            initial,
        };
        let video = 0xa_0000_u64.wrapping_sub(DISPLACEMENT);
        assert!(found(text(end - 0x1000, 0x1000, None)));
        for (physical, bytes) in
            [(end - 0x1000, 0x2000), (end, 0x1000), (video, 1), (end - 0x1000, u64::MAX)]
        {
            assert!(!found(text(physical, bytes, None)), "{physical:#x}, {bytes:#x}");
            assert!(!found(text(physical, bytes, Some(vec![]))), "{physical:#x}, {bytes:#x}");
        }
        // Initial text of which the file has nothing: given up, and no panic.
        let mut kernel = kernel();
        kernel.text.push(text(end - 0x2000, 0x2000, Some(vec![])));
        let placed = kernel_at(&kernel, &ram, DISPLACEMENT).expect("it is there");
        assert!(placed.kept_parts(&ram, &placed.text[2]).is_empty());
    }

    #[test]
    fn the_boot_stub_is_not_the_kernel() {
        let (kernel, ram) = (kernel(), ram());
        let is_in = |state: &CpuState| kernel_of(&kernel, &ram, state).is_some();
        let start = PHYSICAL + DISPLACEMENT;
        assert!(!is_in(&at(0x10_0200, 0x10)), "in the stub");
        assert!(!is_in(&at(start + 0x3000, 0x10)), "in the stub where it moved to");
        assert!(is_in(&at(start + 0x2fff, 0x10)), "in the kernel");
        assert!(is_in(&at(0x40_0000, 0x33)), "in user code");
    }

    #[test]
    fn ram_tells_how_far_the_kernel_is() {
        let (kernel, ram) = (kernel(), ram());
        let start = PHYSICAL + DISPLACEMENT;
        let placed = kernel_at(&kernel, &ram, DISPLACEMENT).expect("it is there");
        assert!(!placed.has_applied_alternatives(&ram));
        // One of those that are waited for tells nothing: it may be read again.
        write_ram(&ram, start + 0x300, &[0x0f, 0x31]);
        let written = |at: u64| placed.applies_alternatives(&ram, &(start + at..start + at + 2));
        assert!(!placed.has_applied_alternatives(&ram) && !written(0x300));
        write_ram(&ram, start + 0x401, &[0x0f, 0x1f]);
        assert!(placed.has_applied_alternatives(&ram) && written(0x401) && !written(0x300));

        let (whole, initial) = (&placed.text[0], &placed.text[1]);
        let parts = |text| -> Vec<(u64, u64)> {
            let parts = placed.kept_parts(&ram, text).into_iter();
            parts.map(|part| (part.start - start, part.end - start)).collect()
        };
        assert_eq!(parts(whole), [(0, INITIAL)]);
        assert_eq!(parts(initial), [(INITIAL, 0x3000)]);
        write_ram(&ram, start + INITIAL, &[0xcc; 0x700]);
        assert!(!placed.is_given_up(&ram, start + INITIAL), "patched in many places");
        write_ram(&ram, start + INITIAL, &[0xcc; 0x900]);
        assert!(placed.is_given_up(&ram, start + INITIAL) && parts(initial).is_empty());
        write_ram(&ram, start, &[0xcc; 0x1000]);
        assert_eq!(parts(whole), [(0, INITIAL)], "this text is never given up");
    }
}
