//! Exits for port I/O and MMIO as the machine's accesses.

use reprise_machine::engine::Access;

use crate::vcpu::{RawExit, Vcpu};

/// A port or MMIO exit that is being answered, element by element: KVM may hand over several
/// elements of a string instruction at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingExit {
    exit: RawExit,
    next: u32,
}

impl PendingExit {
    /// None if the exit is no access.
    pub(crate) fn new(exit: RawExit) -> Option<Self> {
        match exit {
            RawExit::Port { count: 1.., .. } | RawExit::Mmio { .. } | RawExit::TimeStamp => {
                Some(Self { exit, next: 0 })
            }
            _ => None,
        }
    }

    /// The element that waits for its answer.
    pub(crate) fn access(&self, vcpu: &mut Vcpu) -> Access {
        match self.exit {
            RawExit::Port { port, size, is_write: false, .. } => Access::PortRead { port, size },
            RawExit::Port { port, size, .. } => {
                let value = little_endian(vcpu.port_data(size, self.next)) as u32;
                Access::PortWrite { port, size, value }
            }
            RawExit::Mmio { address, size, is_write: false } => Access::MmioRead { address, size },
            RawExit::Mmio { address, size, .. } => {
                let value = little_endian(&vcpu.mmio_data()[..usize::from(size)]);
                Access::MmioWrite { address, size, value }
            }
            RawExit::TimeStamp => Access::TimeStamp,
            _ => unreachable!("only accesses are constructed"),
        }
    }

    /// Whether nothing in KVM waits for the answer.
    pub(crate) fn is_time_stamp(&self) -> bool {
        self.exit == RawExit::TimeStamp
    }

    /// Answers one element; true if another one waits.
    pub(crate) fn finish(&mut self, vcpu: &mut Vcpu, value: u128) -> bool {
        let value = value.to_le_bytes();
        match self.exit {
            RawExit::Port { size, is_write: false, .. } => {
                vcpu.port_data(size, self.next).copy_from_slice(&value[..usize::from(size)]);
            }
            RawExit::Mmio { size, is_write: false, .. } => {
                let size = usize::from(size);
                vcpu.mmio_data()[..size].copy_from_slice(&value[..size]);
            }
            _ => {}
        }
        self.next += 1;
        matches!(self.exit, RawExit::Port { count, .. } if self.next < count)
    }
}

fn little_endian(bytes: &[u8]) -> u128 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte))
}
