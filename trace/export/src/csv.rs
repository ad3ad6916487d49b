//! Comma-separated values: a row for each instruction, access and event, for spreadsheets and scripts.

use std::io::Write;

use reprise_trace::instructions::{
    Access, AccessKind, Event, Observer, PageWalk, Position, Run, TraceError, register,
};

/// The columns. Numbers are decimal, addresses hexadecimal with `0x`; what a row does not have is
/// empty. The bytes of an access are its value, where the trace has values. `instruction` counts retired
/// instructions since the machine started.
pub const HEADING: &str = "instruction,what,cpl,cr3,address,size,physical,bytes";

/// Writes comma-separated values.
#[derive(Debug)]
pub struct Csv<W> {
    out: W,
    position: Position,
    begun: bool,
}

impl<W: Write> Csv<W> {
    /// Writes to `out`, line by line: a buffer around it helps.
    pub fn new(out: W) -> Self {
        Self { out, position: Position::default(), begun: false }
    }

    /// Where it was written.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn put_heading(&mut self) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.begun, true) {
            return Ok(());
        }
        writeln!(self.out, "{HEADING}").map_err(TraceError::Write)
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What an access does, a row for each.
fn names(kind: AccessKind) -> &'static [&'static str] {
    match kind {
        AccessKind::Read => &["read"],
        AccessKind::Write => &["write"],
        AccessKind::ReadWrite => &["read", "write"],
        AccessKind::Prefetch => &["prefetch"],
        AccessKind::Invalidate => &["invalidate"],
    }
}

/// What an access read or wrote, or what it did second of both; nothing if the trace does not tell.
fn value_bytes(access: &Access<'_>, side: usize) -> String {
    let size = usize::from(access.size_bytes);
    let words = access.values.chunks(size.div_ceil(8)).nth(side).unwrap_or_default();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take(size).collect();
    hexadecimal(&bytes)
}

/// An event's name.
fn name(event: &Event) -> &'static str {
    match event {
        Event::Delivery { .. } => "delivery",
        Event::Return { .. } => "return",
        Event::AddressSpace { .. } => "address-space",
        Event::Port { .. } => "port",
        Event::Mmio { .. } => "mmio",
        Event::Dma { .. } => "dma",
        Event::SystemAccess { .. } => "system-access",
        Event::MemoryWrite { .. } => "memory-write",
        Event::SecondPage { .. } => "second-page",
        Event::Register { .. } => "register",
        Event::PageWalk(_) => "page-walk",
        Event::Marker(_) => "marker",
        Event::Skipped { .. } => "skipped",
    }
}

impl<W: Write> Observer for Csv<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        self.put_heading()
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.put_heading()?;
        let (cpl, cr3) = (run.block().mode().cpl, self.position.cr3);
        let mut number = self.position.instruction;
        for step in run.steps() {
            let linear = step.instruction.linear();
            let bytes = step.instruction.bytes();
            if step.retired {
                let (size, bytes) = (bytes.len(), hexadecimal(bytes));
                writeln!(self.out, "{number},fetch,{cpl},{cr3:#x},{linear:#x},{size},,{bytes}")
                    .map_err(TraceError::Write)?;
            }
            for access in step.accesses() {
                let (address, size) = (access.address, access.size_bytes);
                let physical = access.physical.map_or(String::new(), |one| format!("{one:#x}"));
                for (side, what) in names(access.kind).iter().enumerate() {
                    let bytes = value_bytes(&access, side);
                    writeln!(
                        self.out,
                        "{number},{what},{cpl},{cr3:#x},{address:#x},{size},{physical},{bytes}"
                    )
                    .map_err(TraceError::Write)?;
                }
            }
            number += u64::from(step.retired);
        }
        self.position.pass_run(run);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.put_heading()?;
        self.position.pass_event(event);
        let address = match *event {
            Event::Delivery { address, .. } | Event::Return { address } => Some(address),
            Event::PageWalk(walk) => Some(walk.linear),
            Event::Skipped { address, .. } => address,
            Event::MemoryWrite { linear, .. } => linear,
            _ => None,
        };
        let physical = match *event {
            Event::Mmio { physical, .. }
            | Event::Dma { physical, .. }
            | Event::SystemAccess { physical, .. }
            | Event::MemoryWrite { physical, .. }
            | Event::SecondPage { physical, .. } => format!("{physical:#x}"),
            Event::PageWalk(PageWalk { page: Some(page), .. }) => format!("{page:#x}"),
            _ => String::new(),
        };
        let (size, bytes) = match *event {
            Event::MemoryWrite { size_bytes, value, .. } => {
                let bytes = &value.to_le_bytes()[..usize::from(size_bytes.min(8))];
                (size_bytes.to_string(), hexadecimal(bytes))
            }
            Event::Register { register, value } => {
                let bytes: Vec<u8> = value.iter().flat_map(|word| word.to_le_bytes()).collect();
                let bytes = &bytes[..usize::from(register::words(register)) * 8];
                let name = register::name(register).unwrap_or("unknown");
                (String::new(), format!("{name}={}", hexadecimal(bytes)))
            }
            _ => (String::new(), String::new()),
        };
        let address = address.map_or(String::new(), |one| format!("{one:#x}"));
        let Position { instruction, cr3, .. } = self.position;
        let what = name(event);
        writeln!(self.out, "{instruction},{what},,{cr3:#x},{address},{size},{physical},{bytes}")
            .map_err(TraceError::Write)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.put_heading()?;
        self.out.flush().map_err(TraceError::Write)
    }
}
