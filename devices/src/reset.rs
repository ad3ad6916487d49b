//! The two reset ports besides the keyboard controller's: port 92h (system control port A of the IBM
//! PS/2 Hardware Interface Technical Reference), with the fast reset and the fast A20 gate, and port
//! CF9h (reset control of the Intel PIIX3, 290550). A20 is always open; its bit only reads back.

use serde::{Deserialize, Serialize};

use crate::state::Device;

/// System control port A.
pub(crate) const PORT_A: u16 = 0x92;
/// Reset control; answers to byte accesses only, since wider ones are for the PCI configuration
/// address around it.
pub(crate) const RESET_CONTROL: u16 = 0xcf9;

const A_FAST_RESET: u8 = 1 << 0;
const A_A20: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;
const RESET_CONTROL_WRITABLE: u8 = 0b110;

/// Both ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResetPorts {
    port_a: u8,
    reset_control: u8,
}

impl Device for ResetPorts {
    const NAME: &'static str = "reset control";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        true
    }
}

impl ResetPorts {
    /// As a PC's firmware leaves them.
    pub(crate) fn new() -> Self {
        Self { port_a: A_A20, reset_control: 0 }
    }

    pub(crate) fn read(&self, port: u16) -> u8 {
        if port == PORT_A { self.port_a } else { self.reset_control }
    }

    /// Writes either port; returns whether that resets the machine: a reset bit has to rise.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        if port == PORT_A {
            let risen = value & !self.port_a;
            self.port_a = value;
            risen & A_FAST_RESET != 0
        } else {
            let risen = value & !self.reset_control;
            self.reset_control = value & RESET_CONTROL_WRITABLE;
            risen & RESET_CPU != 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::state::contract::device_contract!(
        ResetPorts::new(),
        |ports: &mut ResetPorts, random| {
            let port = random.pick(&[PORT_A, RESET_CONTROL]);
            if random.below(2) == 0 {
                u64::from(ports.read(port))
            } else {
                u64::from(ports.write(port, random.byte()))
            }
        }
    );

    #[test]
    fn a_reset_takes_a_rising_bit() {
        let mut ports = ResetPorts::new();
        assert!(!ports.write(PORT_A, 0x02));
        assert_eq!(ports.read(PORT_A), 0x02);
        assert!(ports.write(PORT_A, 0x03));
        // As Linux writes it: first what kind of reset, then the reset.
        assert!(!ports.write(RESET_CONTROL, 0x02));
        assert_eq!(ports.read(RESET_CONTROL), 0x02);
        assert!(ports.write(RESET_CONTROL, 0x06));
        assert!(!ports.write(RESET_CONTROL, 0x06));
    }
}
