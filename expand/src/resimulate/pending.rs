//! A run as what is to be done, until the events behind it are known: they say what happened between its
//! accesses.

use std::ops::Range;

use reprise_trace::instructions::{CodeWidth, Run, register};

/// Guest pages, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Where bytes lie: they may reach into a second page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) physical: u64,
    pub(super) second_page: Option<u64>,
    pub(super) size: usize,
}

/// A thing to be done.
#[derive(Clone, Debug)]
pub(super) enum Act {
    /// An instruction begins.
    Instruction { linear: u64, width: CodeWidth, bytes: Range<usize>, place: Place },
    /// An access, with its words of values.
    Access { place: Place, reads: bool, writes: bool, value: Range<usize> },
    /// A register gets a value.
    Register { number: u8, value: [u64; 2] },
    /// The instruction has retired. Unless it has set RIP, that goes on by its length, cut to a width.
    Retired { next: Option<u64>, mask: u64 },
}

/// A write by the CPU itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    pub(super) physical: u64,
    pub(super) size: usize,
    pub(super) value: u64,
    /// Accesses of the run that come behind it.
    pub(super) behind: usize,
}

/// The run, and the events behind it.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) acts: Vec<Act>,
    pub(super) retired: u64,
    pub(super) accesses: usize,
    pub(super) values: Vec<u64>,
    pub(super) bytes: Vec<u8>,
    pub(super) writes: Vec<Write>,
    /// For an access, by how many come behind it, the second page.
    pub(super) second_pages: Vec<(usize, u64)>,
    pub(super) registers: Vec<(u8, [u64; 2])>,
}

impl Place {
    /// The parts of the bytes that lie in one page each, with where they begin; none if nobody knows.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (Range<usize>, u64)> + use<> {
        let in_first = (PAGE_BYTES - self.physical % PAGE_BYTES) as usize;
        let Self { physical, second_page, size } = *self;
        let parts = match second_page {
            _ if size <= in_first => [Some((0..size, physical)), None],
            Some(page) => [Some((0..in_first, physical)), Some((in_first..size, page))],
            None => [None, None],
        };
        parts.into_iter().flatten()
    }
}

impl Pending {
    pub(super) fn clear(&mut self) {
        self.acts.clear();
        (self.retired, self.accesses) = (0, 0);
        self.values.clear();
        self.bytes.clear();
        self.writes.clear();
        self.second_pages.clear();
        self.registers.clear();
    }

    /// The place of the access behind which so many come.
    pub(super) fn place_of(&self, place: &Place, behind: usize) -> Place {
        let second = self.second_pages.iter().find(|(other, _)| *other == behind);
        Place { second_page: second.map(|(_, page)| *page), ..*place }
    }

    pub(super) fn push_write(&mut self, physical: u64, size_bytes: u8, value: u64, behind: u32) {
        let behind = (behind as usize).min(self.accesses);
        let size = usize::from(size_bytes.min(8));
        self.writes.push(Write { physical, size, value, behind });
    }

    /// Takes a run; what was before it is done.
    pub(super) fn take_run(&mut self, run: &Run<'_>) {
        let (block, mode) = (run.block(), run.block().mode());
        let mask = match mode.width {
            CodeWidth::Bits64 => u64::MAX,
            CodeWidth::Bits32 => 0xffff_ffff,
            CodeWidth::Bits16 => 0xffff,
        };
        for step in run.steps() {
            let instruction = step.instruction;
            let first = self.bytes.len();
            self.bytes.extend_from_slice(instruction.bytes());
            let place = Place {
                physical: block.physical_at(instruction.offset()),
                second_page: block.next_page(),
                size: instruction.bytes().len(),
            };
            let (linear, bytes) = (instruction.linear(), first..self.bytes.len());
            self.acts.push(Act::Instruction { linear, width: mode.width, bytes, place });
            for access in step.accesses() {
                let first = self.values.len();
                self.values.extend_from_slice(access.values);
                let place = Place {
                    physical: access.physical.unwrap_or(u64::MAX),
                    second_page: None,
                    size: usize::from(access.size_bytes),
                };
                let (reads, writes) = (access.kind.reads(), access.kind.writes());
                let value = first..self.values.len();
                self.acts.push(Act::Access { place, reads, writes, value });
                self.accesses += 1;
            }
            if !step.retired {
                continue;
            }
            let mut words = step.registers;
            let mut sets_rip = false;
            for write in instruction.register_writes() {
                let Some((value, rest)) = words.split_at_checked(usize::from(write.words)) else {
                    break;
                };
                words = rest;
                let word = |index: usize| value.get(index).copied().unwrap_or(0);
                let value = [word(0), word(1)];
                sets_rip |= write.register == register::RIP;
                self.acts.push(Act::Register { number: write.register, value });
            }
            self.retired += 1;
            let length = instruction.bytes().len() as u64;
            self.acts.push(Act::Retired { next: (!sets_rip).then_some(length), mask });
        }
    }
}
