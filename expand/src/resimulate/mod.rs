//! Re-simulation: a machine's RAM and CPU carried forward by nothing but the writes of a trace with values,
//! registers and physical addresses. No instruction is executed. What comes out must be what a replay of
//! the recording has there: that proves that the trace lacks nothing.
//!
//! [`Resimulator`] is an observer; [`check_against`] drives one over a trace file, and compares it with
//! each checkpoint that it passes and with a replay where the trace ends.

mod against;
mod pending;

use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{RamDigest, page_digest};
use reprise_trace::cpu_state::{CS, CpuState};
use reprise_trace::instructions::{
    CodeWidth, Event, Observer, Position, Run, TraceError, register,
};
use vm_memory::{Bytes, GuestAddress};

pub use against::{Against, check_against};
use pending::{Act, Pending, Place};

/// Where a trace is not what the machine did, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The number of the instruction.
    pub instruction: u64,
    /// The linear address there.
    pub address: u64,
    /// What is wrong, in words.
    pub what: String,
}

/// What was compared and carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions that retired.
    pub instructions: u64,
    /// Loads whose values were compared with RAM.
    pub loads: u64,
    /// Writes to RAM, those of page walks and deliveries among them.
    pub writes: u64,
    /// Values written to registers.
    pub registers: u64,
}

/// RAM and CPU as a trace says that they become.
#[derive(Debug)]
pub struct Resimulator {
    ram: GuestRam,
    cpu: CpuState,
    position: Position,
    /// The last run, until all events behind it are known.
    pending: Pending,
    counts: Counts,
    mismatch: Option<Mismatch>,
    mismatches: u64,
}

impl Resimulator {
    /// Begins with this RAM and CPU: those of the machine where the trace begins.
    pub fn new(ram: GuestRam, cpu: CpuState) -> Self {
        Self {
            ram,
            cpu,
            position: Position::default(),
            pending: Pending::default(),
            counts: Counts::default(),
            mismatch: None,
            mismatches: 0,
        }
    }

    /// The CPU, as far as the trace has come; all that was seen is carried out first.
    pub fn cpu(&mut self) -> &CpuState {
        self.catch_up();
        &self.cpu
    }

    /// RAM, as far as the trace has come.
    pub fn ram(&mut self) -> &GuestRam {
        self.catch_up();
        &self.ram
    }

    /// The digest of RAM, as checkpoints have it.
    pub fn ram_digest(&mut self) -> [u8; 32] {
        const PAGE_BYTES: usize = 4096;
        let mut digest = RamDigest::default();
        self.ram().visit(&mut |start, bytes| {
            for (address, page) in (start..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES)) {
                if let Some(one) = page_digest(page) {
                    digest.page(address, &one);
                }
            }
        });
        digest.finish()
    }

    /// The number of the next instruction, as far as the trace was carried out.
    pub fn instruction(&self) -> u64 {
        self.position.instruction
    }

    /// The number of the instruction behind all that was seen.
    fn instruction_behind(&self) -> u64 {
        self.position.instruction + self.pending.retired
    }

    /// What was compared and carried out so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The first thing that is wrong, and how many are.
    pub fn mismatch(&self) -> Option<(&Mismatch, u64)> {
        self.mismatch.as_ref().map(|first| (first, self.mismatches))
    }

    /// Notes that something is wrong, at the instruction that the CPU stands at.
    fn find(&mut self, what: impl FnOnce() -> String) {
        self.mismatches += 1;
        if self.mismatch.is_none() {
            let address = self.cpu.segments[CS].base.wrapping_add(self.cpu.rip);
            self.mismatch =
                Some(Mismatch { instruction: self.position.instruction, address, what: what() });
        }
    }

    /// Reads RAM; false where there is none.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        self.ram.memory().read_slice(bytes, GuestAddress(address)).is_ok()
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        // A write to a device changes no RAM.
        if self.ram.memory().write_slice(bytes, GuestAddress(address)).is_ok() {
            self.counts.writes += 1;
        }
    }

    fn set_register(&mut self, number: u8, value: [u64; 2]) {
        self.counts.registers += 1;
        if register::replace(&mut self.cpu, number, value).is_none() {
            self.find(|| format!("there is no register {number}"));
        }
    }

    /// Carries out the last run with the events behind it.
    fn catch_up(&mut self) {
        let mut pending = std::mem::take(&mut self.pending);
        let total = pending.accesses;
        let mut writes = pending.writes.iter().peekable();
        let mut made = 0;
        for act in &pending.acts {
            match act {
                Act::Instruction { linear, width, bytes, place } => {
                    self.arrive(*linear, *width, &pending.bytes[bytes.clone()], place);
                }
                Act::Access { place, reads, value, writes: stores } => {
                    while let Some(write) = writes.next_if(|write| total - write.behind <= made) {
                        self.write(write.physical, &write.value.to_le_bytes()[..write.size]);
                    }
                    let place = pending.place_of(place, total - made - 1);
                    let size = place.size;
                    let value = &pending.values[value.clone()];
                    let (read, written) = value.split_at(if *stores { value.len() / 2 } else { 0 });
                    match (*reads, *stores) {
                        (true, true) => {
                            self.compare(&place, &bytes_of(read, size));
                            self.store(&place, &bytes_of(written, size));
                        }
                        (true, false) => self.compare(&place, &bytes_of(value, size)),
                        (false, true) => self.store(&place, &bytes_of(value, size)),
                        // It only names an address.
                        (false, false) => {}
                    }
                    made += 1;
                }
                Act::Register { number, value } => self.set_register(*number, *value),
                Act::Retired { next, mask } => {
                    self.counts.instructions += 1;
                    self.position.instruction += 1;
                    if let Some(length) = next {
                        self.cpu.rip = self.cpu.rip.wrapping_add(*length) & mask;
                    }
                }
            }
        }
        for write in writes {
            self.write(write.physical, &write.value.to_le_bytes()[..write.size]);
        }
        for (number, value) in &pending.registers {
            self.set_register(*number, *value);
        }
        pending.clear();
        self.pending = pending;
    }

    /// The instruction at `linear` begins: the CPU must stand there, and RAM hold it.
    fn arrive(&mut self, linear: u64, width: CodeWidth, bytes: &[u8], place: &Place) {
        let here = match width {
            CodeWidth::Bits64 => self.cpu.rip,
            _ => self.cpu.segments[CS].base.wrapping_add(self.cpu.rip) & 0xffff_ffff,
        };
        if here != linear {
            let rip = self.cpu.rip;
            self.find(|| format!("the instruction is at {linear:#x}, and RIP is {rip:#x}"));
            self.cpu.rip = self.cpu.rip.wrapping_add(linear.wrapping_sub(here));
        }
        self.compare_with(place, bytes, "the instruction is");
    }

    fn compare(&mut self, place: &Place, traced: &[u8]) {
        self.counts.loads += 1;
        self.compare_with(place, traced, "the load gives");
    }

    fn compare_with(&mut self, place: &Place, traced: &[u8], what: &str) {
        let mut buffer = [0; 512];
        for (range, physical) in place.pieces() {
            for (start, traced) in (0..).step_by(buffer.len()).zip(traced[range].chunks(512)) {
                let found = &mut buffer[..traced.len()];
                if self.read(physical + start, found) && *found != *traced {
                    let found = found.to_vec();
                    self.find(|| {
                        format!("{what} {traced:02x?}, and RAM @{physical:#x} has {found:02x?}")
                    });
                }
            }
        }
    }

    fn store(&mut self, place: &Place, bytes: &[u8]) {
        if place.pieces().count() == 0 {
            self.find(|| "the trace does not say where an access's second page lies".to_owned());
        }
        for (range, physical) in place.pieces() {
            self.write(physical, &bytes[range]);
        }
    }
}

/// The bytes of a value in words.
fn bytes_of(words: &[u64], size: usize) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).take(size).collect()
}

impl Observer for Resimulator {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.catch_up();
        self.pending.take_run(run);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            Event::MemoryWrite { physical, size_bytes, value, accesses_behind, .. } => {
                self.pending.push_write(physical, size_bytes, value, accesses_behind);
            }
            Event::SecondPage { physical, accesses_behind } => {
                self.pending.second_pages.push((accesses_behind as usize, physical));
            }
            Event::Register { register, value } => self.pending.registers.push((register, value)),
            Event::Skipped { instructions, .. } => {
                self.catch_up();
                self.find(|| format!("{instructions} instructions are left out"));
                self.position.pass_event(event);
            }
            Event::Dma { .. } => self.find(|| "a device writes RAM without values".to_owned()),
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.catch_up();
        Ok(())
    }
}
