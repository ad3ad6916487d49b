//! Native sequences: guest instructions that the host CPU itself executes.

pub(crate) mod code_buffer;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod direct;
#[cfg(test)]
pub(crate) mod forms;
pub(crate) mod host_fpu;
mod lower;
mod operand;
pub(crate) mod trapping;

use std::collections::HashMap;

use iced_x86::{Instruction, InstructionInfoFactory};

use code_buffer::{CodeBuffer, Region};
pub(crate) use lower::{MEMORY, conditional, directions, is_high_byte, normalise, resized};
pub(crate) use operand::{
    Form, form, load, needs_alignment, read, run_on, run_register, run_selected, select, write,
};

/// Sequences are shared, so even Linux with its userland fills a few MiB.
const CODE_BYTES: usize = 256 << 20;

/// The sequences made so far. Two guest instructions that differ only in their memory operand's
/// address share one.
pub(crate) struct Native {
    code: CodeBuffer,
    sequences: HashMap<Instruction, Sequence>,
    info: InstructionInfoFactory,
}

impl std::fmt::Debug for Native {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Native").field("sequences", &self.sequences.len()).finish_non_exhaustive()
    }
}

/// One native sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// Where it starts in executable memory.
    pub(crate) entry: *const u8,
    /// Whether it takes a memory operand.
    pub(crate) memory: Option<MemoryUse>,
}

/// How a sequence uses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryUse {
    /// Operand bytes.
    pub(crate) size_bytes: u16,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

impl Native {
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            code: CodeBuffer::new(CODE_BYTES, 0, 0)?,
            sequences: HashMap::new(),
            info: InstructionInfoFactory::new(),
        })
    }

    /// The sequence that executes `instruction`; `None` if none can.
    pub(crate) fn sequence(&mut self, instruction: &Instruction) -> Option<Sequence> {
        let (normal, memory) = lower::normalise(instruction, &mut self.info)?;
        if let Some(&sequence) = self.sequences.get(&normal) {
            return Some(sequence);
        }
        let bytes = lower::emit(&normal, &mut self.info)?;
        let sequence = Sequence {
            entry: self
                .code
                .append(Region::Hot, &bytes)
                .expect("instruction forms are fewer than the buffer holds"),
            memory,
        };
        self.sequences.insert(normal, sequence);
        Some(sequence)
    }
}
