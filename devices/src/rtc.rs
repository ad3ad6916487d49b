//! The clock and CMOS memory: a Motorola MC146818 on interrupt line 8, its 128 bytes behind ports
//! 70h and 71h as in the IBM PC/AT. The divider chain runs from a 32,768 Hz crystal; any divider
//! setting but the one for that crystal holds the chain. Time of day is the wall clock at virtual
//! time zero plus virtual time. An update takes no time, but is announced as long before as the
//! datasheet says.

mod cmos;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::calendar::Date;
use crate::state::Device;
use crate::time::{NS_PER_S, Oscillator};

const CRYSTAL: Oscillator = Oscillator { hz: 32_768 };
const S_PER_DAY: u64 = 86_400;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const DAY_OF_WEEK: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const REGISTER_A: usize = 0x0a;
const REGISTER_B: usize = 0x0b;
const REGISTER_C: usize = 0x0c;
const REGISTER_D: usize = 0x0d;
/// A PC keeps the century in CMOS memory.
const CENTURY: usize = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_DIVIDER: u8 = 0b0111_0000;
const A_DIVIDER_RUNS: u8 = 0b0010_0000;
const A_RATE: u8 = 0b1111;

const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;

/// Interrupt flags in register C, and at the same place their enables in B.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE_ENDED: u8 = 1 << 4;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE_ENDED;
const C_INTERRUPT_REQUEST: u8 = 1 << 7;

const D_VALID: u8 = 1 << 7;

const AFTERNOON: u8 = 1 << 7;
/// An alarm register with both top bits set matches anything.
const ALARM_ANY: u8 = 0xc0;

/// How long before an update the chip announces it.
const ANNOUNCEMENT_NS: u64 = 244_000;
/// The first update comes this long after the divider chain is released.
const FIRST_UPDATE_NS: u64 = NS_PER_S / 2;

/// The MC146818 and its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rtc {
    now_ns: u64,
    /// The divider chain stands at virtual time plus this, and updates at whole seconds.
    chain_phase_ns: u64,
    index: u8,
    /// All registers, 128 bytes; in C just the three flags.
    registers: Vec<u8>,
}

impl Device for Rtc {
    const NAME: &'static str = "clock (MC146818)";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        self.registers.len() == cmos::BYTES
            && usize::from(self.index) < cmos::BYTES
            && self.chain_phase_ns < NS_PER_S
            && self.now_ns <= i64::MAX as u64
    }
}

impl Rtc {
    /// At virtual time zero, `start_s` seconds after 1970 began, as a PC's firmware leaves it: in
    /// binary-coded decimal and 24 hours.
    pub(crate) fn new(start_s: u64, ram_bytes: u64) -> Self {
        let mut registers = cmos::contents(ram_bytes);
        registers[REGISTER_A] = A_DIVIDER_RUNS | 6;
        registers[REGISTER_B] = B_24_HOURS;
        registers[REGISTER_D] = D_VALID;
        let mut rtc = Self { now_ns: 0, chain_phase_ns: 0, index: 0, registers };
        let date = Date::from_unix_days(start_s / S_PER_DAY);
        rtc.registers[DAY_OF_WEEK] = rtc.encoded(date.day_of_week() + 1);
        rtc.set_date(date);
        rtc.set_second_of_day((start_s % S_PER_DAY) as u32);
        rtc
    }

    /// A number as the guest wants numbers.
    fn encoded(&self, number: u32) -> u8 {
        let binary = self.registers[REGISTER_B] & B_BINARY != 0;
        (if binary { number } else { number / 10 * 16 + number % 10 }) as u8
    }

    fn decoded(&self, value: u8) -> u32 {
        let binary = self.registers[REGISTER_B] & B_BINARY != 0;
        let value = u32::from(value);
        if binary { value } else { value / 16 * 10 + value % 16 }
    }

    fn encoded_hour(&self, hour: u32) -> u8 {
        if self.registers[REGISTER_B] & B_24_HOURS != 0 {
            return self.encoded(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        afternoon | self.encoded((hour + 11) % 12 + 1)
    }

    fn decoded_hour(&self, value: u8) -> u32 {
        if self.registers[REGISTER_B] & B_24_HOURS != 0 {
            return self.decoded(value);
        }
        let afternoon = if value & AFTERNOON != 0 { 12 } else { 0 };
        self.decoded(value & !AFTERNOON) % 12 + afternoon
    }

    /// The date in the registers, or the nearest that exists.
    fn date(&self) -> Date {
        let [century, year, month, day] =
            [CENTURY, YEAR, MONTH, DAY].map(|index| self.decoded(self.registers[index]));
        Date::nearest(century.min(99) * 100 + year.min(99), month, day)
    }

    fn set_date(&mut self, date: Date) {
        let fields = [
            (CENTURY, date.year / 100),
            (YEAR, date.year % 100),
            (MONTH, date.month),
            (DAY, date.day),
        ];
        for (index, number) in fields {
            self.registers[index] = self.encoded(number);
        }
    }

    /// The time of day in the registers, or the nearest that exists.
    fn second_of_day(&self) -> u32 {
        let hour = self.decoded_hour(self.registers[HOURS]).min(23);
        let minute = self.decoded(self.registers[MINUTES]).min(59);
        let second = self.decoded(self.registers[SECONDS]).min(59);
        (hour * 60 + minute) * 60 + second
    }

    fn set_second_of_day(&mut self, second_of_day: u32) {
        self.registers[SECONDS] = self.encoded(second_of_day % 60);
        self.registers[MINUTES] = self.encoded(second_of_day / 60 % 60);
        self.registers[HOURS] = self.encoded_hour(second_of_day / 3600);
    }

    fn chain_runs(&self) -> bool {
        self.registers[REGISTER_A] & A_DIVIDER == A_DIVIDER_RUNS
    }

    fn updates(&self) -> bool {
        self.chain_runs() && self.registers[REGISTER_B] & B_SET == 0
    }

    /// Where the divider chain stands.
    fn chain_ns(&self) -> u64 {
        self.now_ns + self.chain_phase_ns
    }

    /// Crystal cycles in a period of the periodic interrupt.
    fn period_cycles(&self) -> Option<u64> {
        match self.registers[REGISTER_A] & A_RATE {
            0 => None,
            rate @ (1 | 2) => Some(64 << rate),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Seconds, 1 to 86400, until an update makes the alarm match.
    fn seconds_to_alarm(&self) -> Option<u32> {
        let pattern = |index: usize, hour: bool| {
            let value = self.registers[index];
            let number = if hour { self.decoded_hour(value) } else { self.decoded(value) };
            (value & ALARM_ANY != ALARM_ANY).then_some(number)
        };
        let hour = pattern(HOURS_ALARM, true);
        let minute = pattern(MINUTES_ALARM, false);
        let second = pattern(SECONDS_ALARM, false);
        let now = self.second_of_day();
        let mut candidate = now + 1;
        while candidate <= now + S_PER_DAY as u32 {
            if hour.is_some_and(|hour| hour != candidate / 3600 % 24) {
                candidate = (candidate / 3600 + 1) * 3600;
            } else if minute.is_some_and(|minute| minute != candidate / 60 % 60) {
                candidate = (candidate / 60 + 1) * 60;
            } else if second.is_some_and(|second| second != candidate % 60) {
                candidate += 1;
            } else {
                return Some(candidate - now);
            }
        }
        None
    }

    /// Lets time pass.
    pub(crate) fn advance(&mut self, now_ns: u64) {
        if now_ns <= self.now_ns {
            return;
        }
        let before_ns = self.chain_ns();
        self.now_ns = now_ns;
        if !self.chain_runs() {
            return;
        }
        let after_ns = self.chain_ns();
        if let Some(cycles) = self.period_cycles()
            && CRYSTAL.edges_at(before_ns) / cycles != CRYSTAL.edges_at(after_ns) / cycles
        {
            self.registers[REGISTER_C] |= PERIODIC;
        }
        let seconds = after_ns / NS_PER_S - before_ns / NS_PER_S;
        if seconds > 0 && self.updates() {
            self.update(seconds);
        }
    }

    /// This many updates.
    fn update(&mut self, seconds: u64) {
        self.registers[REGISTER_C] |= UPDATE_ENDED;
        if self.seconds_to_alarm().is_some_and(|to_alarm| u64::from(to_alarm) <= seconds) {
            self.registers[REGISTER_C] |= ALARM;
        }
        let second_of_day = u64::from(self.second_of_day()) + seconds;
        let days = second_of_day / S_PER_DAY;
        self.set_second_of_day((second_of_day % S_PER_DAY) as u32);
        self.set_date(self.date().after(days));
        let day_of_week = self.decoded(self.registers[DAY_OF_WEEK]).clamp(1, 7) - 1;
        let day_of_week = (u64::from(day_of_week) + days) % 7;
        self.registers[DAY_OF_WEEK] = self.encoded(day_of_week as u32 + 1);
    }

    /// The interrupt pin.
    pub(crate) fn interrupt(&self) -> bool {
        self.registers[REGISTER_C] & self.registers[REGISTER_B] & INTERRUPTS != 0
    }

    /// When the interrupt pin next rises by itself, in nanoseconds.
    pub(crate) fn next_rise_ns(&self) -> Option<u64> {
        let enabled = self.registers[REGISTER_B] & INTERRUPTS;
        if enabled == 0 || self.interrupt() || !self.chain_runs() {
            return None;
        }
        let chain_ns = self.chain_ns();
        let periodic = self.period_cycles().filter(|_| enabled & PERIODIC != 0);
        let periodic_ns = periodic.map(|cycles| {
            let periods = CRYSTAL.edges_at(chain_ns) / cycles + 1;
            CRYSTAL.first_ns_with(periods * cycles)
        });
        let seconds = match enabled & (UPDATE_ENDED | ALARM) {
            _ if !self.updates() => None,
            0 => None,
            ALARM => self.seconds_to_alarm().map(u64::from),
            _ => Some(1),
        };
        let update_ns = seconds.map(|seconds| (chain_ns / NS_PER_S + seconds) * NS_PER_S);
        let rise_ns = periodic_ns.into_iter().chain(update_ns).min()?;
        Some(rise_ns - self.chain_phase_ns)
    }

    /// Whether time has come this far and no further.
    pub(crate) fn stands_at(&self, now_ns: u64) -> bool {
        self.now_ns == now_ns
    }

    /// Writes the index port.
    pub(crate) fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads the selected register; time has come to the present.
    pub(crate) fn read(&mut self) -> u8 {
        let index = usize::from(self.index);
        let value = self.registers[index];
        match index {
            REGISTER_A if self.update_is_near() => value | A_UPDATE_IN_PROGRESS,
            REGISTER_C => {
                let request = if self.interrupt() { C_INTERRUPT_REQUEST } else { 0 };
                self.registers[REGISTER_C] = 0;
                value | request
            }
            _ => value,
        }
    }

    fn update_is_near(&self) -> bool {
        self.updates() && NS_PER_S - self.chain_ns() % NS_PER_S <= ANNOUNCEMENT_NS
    }

    /// Writes the selected register; time has come to the present.
    pub(crate) fn write(&mut self, value: u8) {
        let index = usize::from(self.index);
        match index {
            REGISTER_A => {
                let ran = self.chain_runs();
                self.registers[REGISTER_A] = value & !A_UPDATE_IN_PROGRESS;
                if !ran && self.chain_runs() {
                    let first_update_ns = self.now_ns % NS_PER_S + FIRST_UPDATE_NS;
                    self.chain_phase_ns = (2 * NS_PER_S - first_update_ns) % NS_PER_S;
                }
            }
            REGISTER_B => {
                let stops_updates = value & B_SET != 0;
                self.registers[REGISTER_B] =
                    if stops_updates { value & !UPDATE_ENDED } else { value };
            }
            REGISTER_C | REGISTER_D => {}
            _ => self.registers[index] = value,
        }
    }
}
