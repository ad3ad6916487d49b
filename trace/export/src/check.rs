//! Whether a trace can be what a CPU did: each instruction is one, control goes where the
//! instruction before it leads, and clocks only go forward.

use reprise_trace::instructions::{BlockRef, Event, Observer, Position, Run, TraceError};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expected {
    #[default]
    Anywhere,
    /// At one of these.
    Either(u64, u64),
}

impl Expected {
    fn includes(self, address: u64) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Either(one, other) => address == one || address == other,
        }
    }
}

/// What is known of a block's instructions.
#[derive(Debug)]
struct KnownBlock {
    /// Where control may be behind each.
    behind: Vec<Expected>,
    /// Those that are none.
    invalid: Vec<usize>,
    /// All are instructions, and each but the last may lead to the next.
    is_sound: bool,
}

const FROM_ELSEWHERE: &str = "control does not come from the instruction before";

/// Checks a trace.
#[derive(Debug, Default)]
pub struct Check {
    decoded: DecodedBlocks,
    /// By number.
    blocks: Vec<Option<KnownBlock>>,
    position: Position,
    expected: Expected,
    /// One of each kind.
    findings: Vec<Finding>,
    instructions: u64,
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
        if !self.expected.includes(address) {
            self.find(address, what);
        }
    }

    /// Meets a block of a number that has no meaning yet.
    fn meet(&mut self, id: u32, block: BlockRef<'_>) {
        let decoded = self.decoded.get(id, block);
        let pairs = || block.instructions().zip(decoded.iter());
        let behind: Vec<Expected> =
            pairs().map(|(one, decoded)| expected(decoded, one.next_linear())).collect();
        let invalid: Vec<usize> =
            (0..).zip(decoded.iter()).filter(|(_, one)| !one.is_valid).map(|(at, _)| at).collect();
        let goes_on = behind.iter().zip(block.instructions().skip(1));
        let is_sound =
            invalid.is_empty() && goes_on.into_iter().all(|(to, next)| to.includes(next.linear()));
        let index = id as usize;
        if index >= self.blocks.len() {
            self.blocks.resize_with(index + 1, || None);
        }
        self.blocks[index] = Some(KnownBlock { behind, invalid, is_sound });
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
        self.blocks.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let (index, retired) = (run.id() as usize, run.retired());
        if !matches!(self.blocks.get(index), Some(Some(_))) {
            self.meet(run.id(), run.block());
        }
        let Some(known) = self.blocks[index].take() else { return Ok(()) };
        if known.is_sound && retired > 0 {
            // Within it control goes where it must: only its ends are to be looked at.
            self.arrive(run.linear(), FROM_ELSEWHERE);
            self.expected = known.behind[run.first() + retired - 1];
        } else {
            for step in run.steps().filter(|step| step.retired) {
                let linear = step.instruction.linear();
                self.arrive(linear, FROM_ELSEWHERE);
                if known.invalid.contains(&step.index) {
                    self.find(linear, "the bytes are no instruction of this length");
                }
                self.expected = known.behind[step.index];
                self.position.instruction += 1;
            }
            self.position.instruction -= retired as u64;
        }
        self.blocks[index] = Some(known);
        self.instructions += retired as u64;
        self.position.pass_run(run);
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
