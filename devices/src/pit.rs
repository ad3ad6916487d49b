//! The interval timer: an Intel 8254 (datasheet 231164) on the PC's 1.193182 MHz, a third of the
//! colour subcarrier. Counter 0 drives interrupt line 0. Counter 1 timed memory refresh and is only
//! a counter here. Counter 2's gate and output are at port 61h, the PC/AT's port B (IBM PC/AT
//! Technical Reference, 1502494).

mod counter;
#[cfg(test)]
mod tests;

use counter::Counter;
use serde::{Deserialize, Serialize};

use crate::state::Device;
use crate::time::Oscillator;

const CLOCK: Oscillator = Oscillator { hz: 1_193_182 };

/// Control words: both bytes or the low one only, square wave or rate generator.
const SQUARE_WAVE_0: u8 = 0x36;
const RATE_GENERATOR_1: u8 = 0x54;
const SQUARE_WAVE_2: u8 = 0xb6;

/// Port B's bits that read as written: gate 2, speaker, two NMI masks.
const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_GATE_2: u8 = 1 << 0;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_OUT_2: u8 = 1 << 5;
/// Clock edges between two refresh cycles: 15 microseconds.
const REFRESH_EDGES: u64 = 18;

/// The 8254 and port B.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pit {
    /// Clock edges seen since the machine started.
    edges: u64,
    counters: [Counter; 3],
    port_b: u8,
}

impl Device for Pit {
    const NAME: &'static str = "interval timer (8254)";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        self.counters.iter().all(|counter| counter.is_possible(self.edges))
    }
}

impl Pit {
    /// As a PC's firmware leaves it: 18.2 interrupts a second.
    pub(crate) fn new() -> Self {
        let counters = [
            Counter::running(SQUARE_WAVE_0, 0),
            Counter::running(RATE_GENERATOR_1, REFRESH_EDGES as u8),
            Counter::gated_off(SQUARE_WAVE_2),
        ];
        Self { edges: 0, counters, port_b: 0 }
    }

    /// Lets time pass; returns whether counter 0's output rose.
    pub(crate) fn advance(&mut self, now_ns: u64) -> bool {
        let edges = CLOCK.edges_at(now_ns);
        if edges <= self.edges {
            return false;
        }
        let rose = self.counters[0].next_rise(self.edges).is_some_and(|rise| rise <= edges);
        self.edges = edges;
        for counter in &mut self.counters {
            counter.settle(edges);
        }
        rose
    }

    /// When counter 0's output next rises, in nanoseconds.
    pub(crate) fn next_rise_ns(&self) -> Option<u64> {
        self.counters[0].next_rise(self.edges).map(|edges| CLOCK.first_ns_with(edges))
    }

    /// Whether time has come this far and no further.
    pub(crate) fn stands_at(&self, now_ns: u64) -> bool {
        self.edges == CLOCK.edges_at(now_ns)
    }

    /// Reads a counter; time has come to the present.
    pub(crate) fn read_counter(&mut self, index: usize) -> u8 {
        self.counters[index].read(self.edges)
    }

    /// Writes a counter; time has come to the present. Returns whether counter 0's output rose.
    pub(crate) fn write_counter(&mut self, index: usize, value: u8) -> bool {
        self.watching_output_0(|counters, edges| counters[index].write(value, edges))
    }

    /// Writes the control word; time has come to the present. Returns whether counter 0's output
    /// rose.
    pub(crate) fn write_control(&mut self, value: u8) -> bool {
        self.watching_output_0(|counters, edges| match value >> 6 {
            0b11 => {
                for (index, counter) in counters.iter_mut().enumerate() {
                    if value & (2 << index) != 0 {
                        counter.read_back(value, edges);
                    }
                }
            }
            index => counters[usize::from(index)].control(value, edges),
        })
    }

    fn watching_output_0(&mut self, change: impl FnOnce(&mut [Counter; 3], u64)) -> bool {
        let before = self.counters[0].output(self.edges);
        change(&mut self.counters, self.edges);
        !before && self.counters[0].output(self.edges)
    }

    /// Reads port B; time has come to the present.
    pub(crate) fn read_port_b(&self) -> u8 {
        let refresh = !(self.edges / REFRESH_EDGES).is_multiple_of(2);
        let output = self.counters[2].output(self.edges);
        self.port_b
            | if refresh { PORT_B_REFRESH } else { 0 }
            | if output { PORT_B_OUT_2 } else { 0 }
    }

    /// Writes port B; time has come to the present.
    pub(crate) fn write_port_b(&mut self, value: u8) {
        self.port_b = value & PORT_B_WRITABLE;
        self.counters[2].set_gate(value & PORT_B_GATE_2 != 0, self.edges);
    }
}
