//! Whether a trace can be what a CPU did: each instruction is one, control goes where the
//! instruction before it leads, and clocks only go forward.

use reprise_trace::instructions::{Event, Observer, Position, Run, TraceError};

use crate::instruction::{Branch, Decoded, DecodedBlocks};

/// Something that no CPU does, where it was found first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The number of the instruction at which it was found.
    pub instruction: u64,
    /// The linear address there.
    pub address: u64,
    /// What it is.
    pub what: &'static str,
    /// How often it was found.
    pub count: u64,
}

/// Where control may be next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Anywhere,
    /// At one of these.
    Either(u64, u64),
}

/// Checks a trace.
#[derive(Debug)]
pub struct Check {
    decoded: DecodedBlocks,
    position: Position,
    expected: Expected,
    /// One of each kind.
    findings: Vec<Finding>,
    instructions: u64,
}

impl Default for Check {
    fn default() -> Self {
        Self {
            decoded: DecodedBlocks::default(),
            position: Position::default(),
            expected: Expected::Anywhere,
            findings: Vec::new(),
            instructions: 0,
        }
    }
}

impl Check {
    /// The first finding of each kind.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many there are.
    pub fn finding_count(&self) -> u64 {
        self.findings.iter().map(|found| found.count).sum()
    }

    /// Instructions that were looked at.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    fn find(&mut self, address: u64, what: &'static str) {
        match self.findings.iter_mut().find(|found| found.what == what) {
            Some(found) => found.count += 1,
            None => {
                let instruction = self.position.instruction;
                self.findings.push(Finding { instruction, address, what, count: 1 });
            }
        }
    }

    fn arrive(&mut self, address: u64, what: &'static str) {
        if let Expected::Either(one, other) = self.expected
            && address != one
            && address != other
        {
            self.find(address, what);
        }
    }
}

/// Where control may be behind an instruction.
fn expected(decoded: &Decoded, next: u64) -> Expected {
    match (decoded.branch, decoded.target) {
        (Branch::None, _) => Expected::Either(next, next),
        (Branch::Conditional, Some(target)) => Expected::Either(next, target),
        (Branch::DirectJump | Branch::DirectCall, Some(target)) => Expected::Either(target, target),
        _ => Expected::Anywhere,
    }
}

impl Observer for Check {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn new_blocks(&mut self) {
        self.decoded.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let decoded = self.decoded.get(run.id(), run.block());
        let retired = &decoded[run.first()..run.first() + run.retired()];
        for (step, decoded) in run.steps().zip(retired) {
            let linear = step.instruction.linear();
            self.arrive(linear, "control does not come from the instruction before");
            if !decoded.is_valid {
                self.find(linear, "the bytes are no instruction of this length");
            }
            self.expected = expected(decoded, step.instruction.next_linear());
            self.position.instruction += 1;
            self.instructions += 1;
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            Event::Delivery { address, .. } => {
                self.arrive(address, "an interrupt or exception came where control was not");
                self.expected = Expected::Anywhere;
            }
            Event::Return { address } => self.expected = Expected::Either(address, address),
            Event::Skipped { address, .. } => {
                if let Some(address) = address {
                    self.arrive(address, "something was left out where control was not");
                }
                self.expected = Expected::Anywhere;
            }
            Event::Marker(marker) => {
                let before = self.position.marker;
                if marker.tick < before.tick || marker.virtual_ns < before.virtual_ns {
                    self.find(0, "a clock goes backwards");
                }
            }
            _ => {}
        }
        self.position.pass_event(event);
        Ok(())
    }
}
