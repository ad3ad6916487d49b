//! The time of day, setting it, and each interrupt's moment.

use super::*;
use crate::state::contract::device_contract;
use reprise_random::Random;

/// 2026-11-22 23:59:58 UTC, a Sunday.
const START_S: u64 = 1_795_391_998;
const RAM_BYTES: u64 = 512 << 20;

fn rtc() -> Rtc {
    Rtc::new(START_S, RAM_BYTES)
}

/// Random values that are often meant seriously.
fn random_access(rtc: &mut Rtc, random: &mut Random) -> u64 {
    let leap_ns = random.pick(&[0, 1000, 122_071, NS_PER_S / 4, NS_PER_S, 100_000 * NS_PER_S]);
    rtc.advance(rtc.now_ns + random.below(leap_ns + 1));
    rtc.select(random.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 12, 13, 0x32, 0x50]));
    let any = random.byte();
    match random.below(3) {
        0 => rtc.write(random.pick(&[0x26, 0x02, 0x72, 0x12, 0x21, 0xff, any])),
        1 => return u64::from(rtc.read()),
        _ => return rtc.next_rise_ns().unwrap_or(0) << 1 | u64::from(rtc.interrupt()),
    }
    0
}

device_contract!(rtc(), random_access);

fn read(rtc: &mut Rtc, index: usize) -> u8 {
    rtc.select(index as u8);
    rtc.read()
}

fn write(rtc: &mut Rtc, index: usize, value: u8) {
    rtc.select(index as u8);
    rtc.write(value);
}

/// Century, year, month, day, hours, minutes, seconds, day of the week.
fn registers(rtc: &mut Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, DAY_OF_WEEK].map(|index| read(rtc, index))
}

#[test]
fn time_of_day_is_the_wall_clock_plus_virtual_time() {
    let mut rtc = rtc();
    assert_eq!(registers(&mut rtc), [0x20, 0x26, 0x11, 0x22, 0x23, 0x59, 0x58, 1]);
    rtc.advance(NS_PER_S - 1);
    assert_eq!(read(&mut rtc, SECONDS), 0x58);
    rtc.advance(NS_PER_S);
    assert_eq!(read(&mut rtc, SECONDS), 0x59);
    rtc.advance(2 * NS_PER_S);
    assert_eq!(registers(&mut rtc), [0x20, 0x26, 0x11, 0x23, 0x00, 0x00, 0x00, 2]);
    rtc.advance(S_PER_DAY * 365 * NS_PER_S);
    assert_eq!(registers(&mut rtc), [0x20, 0x27, 0x11, 0x22, 0x23, 0x59, 0x58, 2]);
}

#[test]
fn binary_and_twelve_hours_are_other_forms_of_the_same() {
    let cases = [
        (0, 0x12, 12, 0),
        (1, 0x01, 1, 1),
        (11, 0x11, 11, 11),
        (12, 0x92, 0x8c, 12),
        (13, 0x81, 0x81, 13),
        (23, 0x91, 0x8b, 23),
    ];
    for (hour, decimal_12, binary_12, binary_24) in cases {
        for (mode, expected) in [(0x00, decimal_12), (0x04, binary_12), (0x06, binary_24)] {
            let mut rtc = rtc();
            write(&mut rtc, REGISTER_B, mode | 0x80);
            // 34 minutes past, half a minute before that is over.
            for (index, value) in [(MINUTES, 33), (SECONDS, 59)] {
                let value = rtc.encoded(value);
                write(&mut rtc, index, value);
            }
            let hour = rtc.encoded_hour(hour);
            assert_eq!(hour, expected, "mode {mode:02x}");
            write(&mut rtc, HOURS, hour);
            write(&mut rtc, REGISTER_B, mode);
            rtc.advance(NS_PER_S);
            let minute = rtc.encoded(34);
            assert_eq!(read(&mut rtc, HOURS), expected, "mode {mode:02x}");
            assert_eq!(read(&mut rtc, MINUTES), minute);
            assert_eq!(read(&mut rtc, SECONDS), 0);
        }
    }
}

/// As Linux sets the time: updates stopped, divider held; the first second is then half as long.
#[test]
fn setting_the_time_starts_a_second_anew() {
    let mut rtc = rtc();
    let start_ns = 12_345_678_901;
    rtc.advance(start_ns);
    write(&mut rtc, REGISTER_B, 0x82);
    write(&mut rtc, REGISTER_A, 0x76);
    for (index, value) in
        [(YEAR, 0x28), (MONTH, 0x02), (DAY, 0x29), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
    {
        write(&mut rtc, index, value);
    }
    rtc.advance(start_ns + 7 * NS_PER_S);
    assert_eq!(read(&mut rtc, SECONDS), 0x59, "held");
    // Even where an update would be near.
    write(&mut rtc, REGISTER_B, 0x02);
    rtc.advance(20 * NS_PER_S - 1);
    assert_eq!(read(&mut rtc, REGISTER_A), 0x76);
    assert_eq!(rtc.next_rise_ns(), None);
    let released_ns = rtc.now_ns;
    write(&mut rtc, REGISTER_B, 0x02);
    write(&mut rtc, REGISTER_A, 0x26);
    rtc.advance(released_ns + NS_PER_S / 2 - 1);
    assert_eq!(read(&mut rtc, SECONDS), 0x59);
    rtc.advance(released_ns + NS_PER_S / 2);
    assert_eq!(registers(&mut rtc)[..7], [0x20, 0x28, 0x03, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn stopping_updates_disables_their_interrupt() {
    let mut rtc = rtc();
    write(&mut rtc, REGISTER_B, 0x92);
    assert_eq!(read(&mut rtc, REGISTER_B), 0x82);
    write(&mut rtc, REGISTER_B, 0x12);
    assert_eq!(read(&mut rtc, REGISTER_B), 0x12);
}

#[test]
fn an_update_is_announced() {
    let mut rtc = rtc();
    for (now_ns, announced) in [
        (0, false),
        (NS_PER_S - 244_001, false),
        (NS_PER_S - 244_000, true),
        (NS_PER_S - 1, true),
        (NS_PER_S, false),
    ] {
        rtc.advance(now_ns);
        assert_eq!(read(&mut rtc, REGISTER_A) & 0x80 != 0, announced, "at {now_ns}");
    }
}

#[test]
fn each_interrupt_is_flagged_and_raised_where_enabled() {
    let alarm_s = 120;
    // Enabled in register B, when the pin rises, flags in register C by then.
    let cases = [
        (UPDATE_ENDED, NS_PER_S, UPDATE_ENDED | PERIODIC),
        (PERIODIC, 976_563, PERIODIC),
        (ALARM, alarm_s * NS_PER_S, ALARM | UPDATE_ENDED | PERIODIC),
    ];
    for (enable, rise_ns, flags) in cases {
        let mut rtc = rtc();
        // Two minutes on, at any hour.
        for (index, value) in [(SECONDS_ALARM, 0x58), (MINUTES_ALARM, 0x01), (HOURS_ALARM, 0xff)] {
            write(&mut rtc, index, value);
        }
        write(&mut rtc, REGISTER_B, 0x02 | enable);
        assert_eq!(rtc.next_rise_ns(), Some(rise_ns), "{enable:02x}");
        rtc.advance(rise_ns - 1);
        assert!(!rtc.interrupt());
        rtc.advance(rise_ns);
        assert!(rtc.interrupt());
        assert_eq!(rtc.next_rise_ns(), None, "already high");
        assert_eq!(read(&mut rtc, REGISTER_C), flags | C_INTERRUPT_REQUEST);
        assert!(!rtc.interrupt());
        assert_eq!(read(&mut rtc, REGISTER_C), 0);
    }
}

#[test]
fn the_periodic_rate_is_the_datasheets() {
    // Periods in nanoseconds, rounded up, for a 32,768 Hz crystal.
    let periods_ns = [
        3_906_250,
        7_812_500,
        122_071,
        244_141,
        488_282,
        976_563,
        1_953_125,
        3_906_250,
        7_812_500,
        15_625_000,
        31_250_000,
        62_500_000,
        125_000_000,
        250_000_000,
        500_000_000,
    ];
    for (rate, period_ns) in (1..).zip(periods_ns) {
        let mut rtc = rtc();
        write(&mut rtc, REGISTER_B, 0x42);
        write(&mut rtc, REGISTER_A, 0x20 | rate);
        assert_eq!(rtc.next_rise_ns(), Some(period_ns), "rate {rate}");
    }
    let mut rtc = rtc();
    write(&mut rtc, REGISTER_B, 0x42);
    write(&mut rtc, REGISTER_A, 0x20);
    assert_eq!(rtc.next_rise_ns(), None);
}

/// An alarm that no time of day matches, and one that matches every second.
#[test]
fn alarms_match_what_they_say() {
    let mut rtc = rtc();
    for (hours, minutes, seconds, expected) in [
        (0xff, 0xff, 0xff, Some(1)),
        (0xc0, 0xff, 0x00, Some(2)),
        (0x23, 0x59, 0x58, Some(86_400)),
        (0x23, 0x59, 0x57, Some(86_399)),
        (0x22, 0xff, 0xff, Some(22 * 3600 + 2)),
        (0x24, 0xff, 0xff, None),
        (0xff, 0x60, 0xff, None),
        (0xff, 0xff, 0x60, None),
    ] {
        for (index, value) in
            [(HOURS_ALARM, hours), (MINUTES_ALARM, minutes), (SECONDS_ALARM, seconds)]
        {
            write(&mut rtc, index, value);
        }
        assert_eq!(rtc.seconds_to_alarm(), expected, "{hours:02x}:{minutes:02x}:{seconds:02x}");
    }
}

#[test]
fn one_leap_is_many_steps() {
    for seed in 1..=200 {
        let mut random = Random::new(seed);
        let mut leaping = rtc();
        for _ in 0..20 {
            random_access(&mut leaping, &mut random);
        }
        let mut stepping = leaping.clone();
        let end_ns = leaping.now_ns + random.pick(&[2, 300, 90_000]) * NS_PER_S;
        let step_ns = (end_ns - leaping.now_ns) / random.pick(&[3, 1000]) + 1;
        let rise_ns = leaping.next_rise_ns();
        let mut first_rise_ns = None;
        let was_high = leaping.interrupt();
        while stepping.now_ns < end_ns {
            // Steps of any size, but none over a deadline.
            let target_ns = (stepping.now_ns + random.below(step_ns) + 1).min(end_ns);
            let deadline_ns = stepping.next_rise_ns().filter(|&ns| ns < target_ns);
            stepping.advance(deadline_ns.unwrap_or(target_ns));
            if stepping.interrupt() && !was_high && first_rise_ns.is_none() {
                first_rise_ns = Some(stepping.now_ns);
            }
        }
        leaping.advance(end_ns);
        assert_eq!(leaping, stepping, "seed {seed}");
        assert_eq!(first_rise_ns, rise_ns.filter(|&ns| ns <= end_ns), "seed {seed}");
    }
}

#[test]
fn cmos_memory_tells_the_memory_size() {
    let word = |rtc: &Rtc, index: usize| {
        u64::from(u16::from_le_bytes([rtc.registers[index], rtc.registers[index + 1]]))
    };
    for (ram_bytes, base, extended, high) in [
        (4 << 20, 640, 3 * 1024, 0),
        (32 << 20, 640, 31 * 1024, 256),
        (RAM_BYTES, 640, 0xffff, (512 - 16) * 16),
        (3072 << 20, 640, 0xffff, (3072 - 16) * 16),
    ] {
        let rtc = Rtc::new(0, ram_bytes);
        let sizes = [0x15, 0x17, 0x30, 0x34].map(|index| word(&rtc, index));
        assert_eq!(sizes, [base, extended, extended, high]);
        let sum: u64 = rtc.registers[0x10..0x2e].iter().map(|&byte| u64::from(byte)).sum();
        let stored = [rtc.registers[0x2e], rtc.registers[0x2f]];
        assert_eq!(u64::from(u16::from_be_bytes(stored)), sum);
    }
}

#[test]
fn the_status_of_the_battery_is_good_and_read_only() {
    let mut rtc = rtc();
    write(&mut rtc, REGISTER_D, 0);
    assert_eq!(read(&mut rtc, REGISTER_D), 0x80);
}
