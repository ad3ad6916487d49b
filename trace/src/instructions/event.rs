//! What a trace holds beside runs of blocks, and how each event is stored.

use super::page_walk::PageWalk;
use super::register;
use crate::varint::{TakeError, Taker, put};

/// Why control went to a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// A fault or trap of an instruction.
    Exception,
    /// An external interrupt.
    Interrupt,
    /// A non-maskable interrupt.
    NonMaskable,
    /// INT, INT3, INTO: the instruction has retired.
    Software,
}

const DELIVERIES: [Delivery; 4] =
    [Delivery::Exception, Delivery::Interrupt, Delivery::NonMaskable, Delivery::Software];

/// What the CPU accesses by itself, outside any instruction's operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SystemAccessKind {
    /// A page walk reads an entry.
    WalkRead,
    /// A page walk sets an accessed or dirty bit.
    WalkWrite,
    /// An entry of the IDT, GDT, LDT, or a part of the TSS, is read.
    DescriptorRead,
    /// A descriptor's accessed or busy bit is set.
    DescriptorWrite,
    /// The frame of an exception or interrupt is pushed.
    FrameWrite,
    /// An instruction writes what its block does not list: one that then did not retire, or whose stores
    /// go elsewhere, as a far call's that changes stacks.
    OtherWrite,
}

const SYSTEM_ACCESSES: [SystemAccessKind; 6] = [
    SystemAccessKind::WalkRead,
    SystemAccessKind::WalkWrite,
    SystemAccessKind::DescriptorRead,
    SystemAccessKind::DescriptorWrite,
    SystemAccessKind::FrameWrite,
    SystemAccessKind::OtherWrite,
];

/// Which way data goes, seen from the guest's CPU or, for DMA, from its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Into the CPU or memory.
    In,
    /// Out of it.
    Out,
}

/// What the trace's clocks say at a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Marker {
    /// Ticks of the recording since the machine started.
    pub tick: u64,
    /// The guest's virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
}

/// Something that happened between runs, or within the run before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Control goes to the handler of `vector`.
    Delivery {
        /// Why.
        kind: Delivery,
        /// The vector.
        vector: u8,
        /// The error code that the CPU pushed.
        error_code: Option<u32>,
        /// Linear address that the handler would return to: the faulting instruction's, or that of
        /// the next one to run.
        address: u64,
        /// CR2 of a page fault.
        fault_address: Option<u64>,
    },
    /// An IRET has retired, and execution goes on at `address`.
    Return {
        /// The linear address.
        address: u64,
    },
    /// CR3 has this value from here on.
    AddressSpace {
        /// CR3, all bits.
        cr3: u64,
    },
    /// An access to an I/O port.
    Port {
        /// IN or OUT.
        direction: Direction,
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        size_bytes: u8,
        /// What was read or written.
        value: u32,
    },
    /// An access that a device answered. It stands among the run's accesses too.
    Mmio {
        /// Read or write.
        direction: Direction,
        /// Guest-physical address.
        physical: u64,
        /// 1 to 64.
        size_bytes: u8,
        /// What was read or written; the first eight bytes.
        value: u64,
    },
    /// A device reads or writes guest memory.
    Dma {
        /// In: the device writes memory.
        direction: Direction,
        /// Guest-physical address.
        physical: u64,
        /// How much.
        bytes: u64,
    },
    /// The CPU accesses memory by itself.
    SystemAccess {
        /// What for.
        kind: SystemAccessKind,
        /// Linear address; a page walk has none.
        linear: Option<u64>,
        /// Guest-physical address.
        physical: u64,
        /// Bytes.
        size_bytes: u8,
    },
    /// The CPU writes memory by itself: in traces with values of accesses.
    MemoryWrite {
        /// What for: one of the kinds that write.
        kind: SystemAccessKind,
        /// Linear address; a page walk has none.
        linear: Option<u64>,
        /// Guest-physical address.
        physical: u64,
        /// 1 to 8; a larger write is several of them.
        size_bytes: u8,
        /// What is written.
        value: u64,
        /// How many accesses of the run before come after it.
        accesses_behind: u32,
    },
    /// An access of the run before reaches into a second page: in traces with values of accesses.
    SecondPage {
        /// The guest-physical page.
        physical: u64,
        /// How many accesses of the run come behind the one that is meant.
        accesses_behind: u32,
    },
    /// A register has this value from here on, other than by what its instruction's block lists: in traces
    /// with register writes. Numbers are those of [`super::register`].
    Register {
        /// The register.
        register: u8,
        /// Its value; the second word is zero where it has one only.
        value: [u64; 2],
    },
    /// The CPU translates an address by the page tables. What an access caused stands behind the run
    /// that made it; what a fetch caused stands before the run of what was fetched.
    PageWalk(PageWalk),
    /// What the clocks say here.
    Marker(Marker),
    /// Something was left out here, by a filter or because a share of the trace is missing.
    Skipped {
        /// Instructions left out.
        instructions: u64,
        /// Linear address of the first of them, where it is known.
        address: Option<u64>,
    },
}

/// The byte that each event starts with. Zero is a cut, see `encode.rs`.
mod tag {
    pub(super) const DELIVERY: u8 = 1;
    pub(super) const RETURN: u8 = 2;
    pub(super) const ADDRESS_SPACE: u8 = 3;
    pub(super) const PORT: u8 = 4;
    pub(super) const MMIO: u8 = 5;
    pub(super) const DMA: u8 = 6;
    pub(super) const SYSTEM_ACCESS: u8 = 7;
    pub(super) const MARKER: u8 = 8;
    pub(super) const SKIPPED: u8 = 9;
    pub(super) const MEMORY_WRITE: u8 = 10;
    pub(super) const SECOND_PAGE: u8 = 11;
    pub(super) const REGISTER: u8 = 12;
    pub(super) const PAGE_WALK: u8 = 13;
}

fn put_option(out: &mut Vec<u8>, value: Option<u64>) {
    match value {
        None => out.push(0),
        Some(value) => {
            out.push(1);
            put(out, value);
        }
    }
}

fn put_all(out: &mut Vec<u8>, tag: u8, direction: Direction, values: &[u64]) {
    out.extend([tag, direction as u8]);
    values.iter().for_each(|value| put(out, *value));
}

impl Event {
    /// Whether it is part of what the run before it did.
    pub(super) fn is_of_run(&self) -> bool {
        match self {
            Self::Port { .. }
            | Self::Mmio { .. }
            | Self::SystemAccess { .. }
            | Self::MemoryWrite { .. }
            | Self::SecondPage { .. }
            | Self::Register { .. }
            | Self::PageWalk(_) => true,
            Self::Delivery { .. }
            | Self::Return { .. }
            | Self::AddressSpace { .. }
            | Self::Dma { .. }
            | Self::Marker(_)
            | Self::Skipped { .. } => false,
        }
    }

    /// Appends the event's bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Delivery { kind, vector, error_code, address, fault_address } => {
                out.extend([tag::DELIVERY, kind as u8, vector]);
                put_option(out, error_code.map(u64::from));
                put(out, address);
                put_option(out, fault_address);
            }
            Self::Return { address } => {
                out.push(tag::RETURN);
                put(out, address);
            }
            Self::AddressSpace { cr3 } => {
                out.push(tag::ADDRESS_SPACE);
                put(out, cr3);
            }
            Self::Port { direction, port, size_bytes, value } => {
                let values = [u64::from(port), u64::from(size_bytes), u64::from(value)];
                put_all(out, tag::PORT, direction, &values);
            }
            Self::Mmio { direction, physical, size_bytes, value } => {
                put_all(out, tag::MMIO, direction, &[physical, u64::from(size_bytes), value]);
            }
            Self::Dma { direction, physical, bytes } => {
                put_all(out, tag::DMA, direction, &[physical, bytes]);
            }
            Self::SystemAccess { kind, linear, physical, size_bytes } => {
                out.extend([tag::SYSTEM_ACCESS, kind as u8, size_bytes]);
                put_option(out, linear);
                put(out, physical);
            }
            Self::MemoryWrite { kind, linear, physical, size_bytes, value, accesses_behind } => {
                out.extend([tag::MEMORY_WRITE, kind as u8, size_bytes]);
                put_option(out, linear);
                for number in [physical, value, u64::from(accesses_behind)] {
                    put(out, number);
                }
            }
            Self::SecondPage { physical, accesses_behind } => {
                out.push(tag::SECOND_PAGE);
                put(out, physical);
                put(out, u64::from(accesses_behind));
            }
            Self::Register { register, value } => {
                out.extend([tag::REGISTER, register]);
                let words = usize::from(register::words(register));
                value[..words].iter().for_each(|word| put(out, *word));
            }
            Self::PageWalk(walk) => {
                out.push(tag::PAGE_WALK);
                walk.encode(out);
            }
            Self::Marker(Marker { tick, virtual_ns }) => {
                out.push(tag::MARKER);
                put(out, tick);
                put(out, virtual_ns);
            }
            Self::Skipped { instructions, address } => {
                out.push(tag::SKIPPED);
                put(out, instructions);
                put_option(out, address);
            }
        }
    }

    /// Takes an event whose first byte was `tag`; `None` if the bytes are no event.
    pub(crate) fn take(tag: u8, taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        Ok(Some(match tag {
            tag::DELIVERY => {
                let (kind, vector) = (pick(&DELIVERIES, taker)?, taker.byte()?);
                let error_code = take_option(taker)?;
                let address = taker.varint()?;
                let fault_address = take_option(taker)?;
                let (Some(kind), Some(error_code), Some(fault_address)) =
                    (kind, error_code, fault_address)
                else {
                    return Ok(None);
                };
                let Ok(error_code) = error_code.map(u32::try_from).transpose() else {
                    return Ok(None);
                };
                Self::Delivery { kind, vector, error_code, address, fault_address }
            }
            tag::RETURN => Self::Return { address: taker.varint()? },
            tag::ADDRESS_SPACE => Self::AddressSpace { cr3: taker.varint()? },
            tag::PORT | tag::MMIO | tag::DMA => return Self::take_transfer(tag, taker),
            tag::SYSTEM_ACCESS => {
                let (kind, size_bytes) = (pick(&SYSTEM_ACCESSES, taker)?, taker.byte()?);
                let (linear, physical) = (take_option(taker)?, taker.varint()?);
                let (Some(kind), Some(linear)) = (kind, linear) else {
                    return Ok(None);
                };
                Self::SystemAccess { kind, linear, physical, size_bytes }
            }
            tag::MEMORY_WRITE => return Self::take_write(taker),
            tag::SECOND_PAGE => {
                let (physical, behind) = (taker.varint()?, taker.varint()?);
                let Ok(accesses_behind) = u32::try_from(behind) else { return Ok(None) };
                Self::SecondPage { physical, accesses_behind }
            }
            tag::REGISTER => {
                let register = taker.byte()?;
                if register::name(register).is_none() {
                    return Ok(None);
                }
                let first = taker.varint()?;
                let second = if register::words(register) == 2 { taker.varint()? } else { 0 };
                Self::Register { register, value: [first, second] }
            }
            tag::PAGE_WALK => return Ok(PageWalk::take(taker)?.map(Self::PageWalk)),
            tag::MARKER => {
                Self::Marker(Marker { tick: taker.varint()?, virtual_ns: taker.varint()? })
            }
            tag::SKIPPED => {
                let (instructions, address) = (taker.varint()?, take_option(taker)?);
                let Some(address) = address else { return Ok(None) };
                Self::Skipped { instructions, address }
            }
            _ => return Ok(None),
        }))
    }

    fn take_write(taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        let (kind, size_bytes) = (pick(&SYSTEM_ACCESSES, taker)?, taker.byte()?);
        let (linear, physical) = (take_option(taker)?, taker.varint()?);
        let (value, behind) = (taker.varint()?, u32::try_from(taker.varint()?));
        let (Some(kind), Some(linear), Ok(accesses_behind)) = (kind, linear, behind) else {
            return Ok(None);
        };
        let write =
            Self::MemoryWrite { kind, linear, physical, size_bytes, value, accesses_behind };
        Ok((1..=8).contains(&size_bytes).then_some(write))
    }

    /// The events that have a direction.
    fn take_transfer(tag: u8, taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        let Some(direction) = pick(&[Direction::In, Direction::Out], taker)? else {
            return Ok(None);
        };
        let (first, second) = (taker.varint()?, taker.varint()?);
        if tag == tag::DMA {
            return Ok(Some(Self::Dma { direction, physical: first, bytes: second }));
        }
        let (value, size) = (taker.varint()?, u8::try_from(second));
        let Ok(size_bytes) = size else { return Ok(None) };
        if tag == tag::MMIO {
            return Ok(Some(Self::Mmio { direction, physical: first, size_bytes, value }));
        }
        let (Ok(port), Ok(value)) = (u16::try_from(first), u32::try_from(value)) else {
            return Ok(None);
        };
        Ok(Some(Self::Port { direction, port, size_bytes, value }))
    }
}

fn pick<T: Copy>(all: &[T], taker: &mut Taker<'_>) -> Result<Option<T>, TakeError> {
    Ok(all.get(usize::from(taker.byte()?)).copied())
}

/// An optional number; the outer `None` if the bytes are neither.
fn take_option(taker: &mut Taker<'_>) -> Result<Option<Option<u64>>, TakeError> {
    Ok(match taker.byte()? {
        0 => Some(None),
        1 => Some(Some(taker.varint()?)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::page_walk::WalkCause;
    use super::*;

    pub(crate) fn examples() -> Vec<Event> {
        let mut events = vec![
            Event::Return { address: u64::MAX },
            Event::AddressSpace { cr3: 0x8000_0000_1234_5001 },
            Event::Port { direction: Direction::Out, port: 0x3f8, size_bytes: 1, value: 0x41 },
            Event::Mmio {
                direction: Direction::In,
                physical: 0xfee0_0020,
                size_bytes: 4,
                value: 9,
            },
            Event::Dma { direction: Direction::In, physical: 0x1000, bytes: 4096 },
            Event::Marker(Marker { tick: 1 << 40, virtual_ns: 3 }),
            Event::Skipped { instructions: 12, address: None },
            Event::Skipped { instructions: 12, address: Some(7) },
            Event::SecondPage { physical: 0x5000, accesses_behind: 3 },
            Event::Register { register: 0, value: [u64::MAX, 0] },
            Event::Register { register: 95, value: [1, u64::MAX] },
        ];
        for kind in DELIVERIES {
            let (error_code, fault_address) = match kind {
                Delivery::Exception => (Some(u32::MAX), Some(u64::MAX)),
                _ => (None, None),
            };
            let (vector, address) = (14, 0xffff_8000_0000_0000);
            events.push(Event::Delivery { kind, vector, error_code, address, fault_address });
        }
        for (root_level, page) in [(4, None), (2, Some(0x5000)), (3, Some(0))] {
            let entries = [0x1000, 0x2008, 0, 0];
            events.push(Event::PageWalk(PageWalk {
                cause: WalkCause::Fetch,
                linear: 0xffff_8000_0000_1234,
                root_level,
                entry_count: 2,
                entries,
                marked: 2,
                page,
            }));
        }
        for kind in SYSTEM_ACCESSES {
            for linear in [None, Some(0)] {
                events.push(Event::SystemAccess { kind, linear, physical: 0x2000, size_bytes: 8 });
                events.push(Event::MemoryWrite {
                    kind,
                    linear,
                    physical: 0x2000,
                    size_bytes: 8,
                    value: 1 << 63,
                    accesses_behind: 2,
                });
            }
        }
        events
    }

    #[test]
    fn every_event_comes_back_and_none_from_fewer_bytes() {
        for event in examples() {
            let mut bytes = Vec::new();
            event.encode(&mut bytes);
            for length in 1..=bytes.len() {
                let mut taker = Taker::new(&bytes[..length]);
                let tag = taker.byte().expect("a tag");
                let taken = Event::take(tag, &mut taker);
                let whole = length == bytes.len();
                assert_eq!(taken.ok().flatten(), whole.then_some(event), "{event:?}");
                assert!(!whole || taker.remaining() == 0, "{event:?}");
            }
        }
    }

    #[test]
    fn numbers_that_name_nothing_are_no_event() {
        let cases: [&[u8]; 15] = [
            &[1, 4, 0, 0, 0, 0],
            &[1, 0, 0, 2, 0, 0],
            &[4, 2, 1, 1, 1],
            &[4, 0, 0x80, 0x80, 0x04, 1, 1],
            &[7, 6, 1, 0, 0],
            &[9, 1, 2],
            &[10, 1, 9, 0, 0, 0, 0],
            &[10, 1, 0, 0, 0, 0, 0],
            &[11, 0, 0x80, 0x80, 0x80, 0x80, 0x10],
            &[12, 70, 0, 0],
            &[13, 3, 0, 0],
            &[13, 3 << 2, 0, 0],
            &[13, 3 << 4, 0, 0, 0, 0, 0],
            &[13, 1 << 4, 2, 0, 0],
            &[14],
        ];
        for bytes in cases {
            let mut taker = Taker::new(bytes);
            let tag = taker.byte().expect("a tag");
            assert_eq!(Event::take(tag, &mut taker), Ok(None), "{bytes:x?}");
        }
    }
}
