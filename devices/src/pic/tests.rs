//! Priorities, the cascade and the modes, vector by vector.

use super::*;
use crate::state::contract::device_contract;
use reprise_random::Random;

device_contract!(Pic::new(), |pic: &mut Pic, random: &mut Random| {
    let port = random.pick(&[0x20, 0x20, 0x21, 0xa0, 0xa0, 0xa1, 0x4d0, 0x4d1]);
    match random.below(6) {
        0 => pic.write(port, random.byte()),
        1 => pic.write(port, random.pick(&[0x11, 0x20, 0x0a, 0x0b, 0x0c, 0x00, 0x60, 0xa0])),
        2 => return u64::from(pic.read(port)),
        3 if pic.interrupt_pending() => return u64::from(pic.acknowledge()),
        4 => return u64::from(pic.passes_on(random.below(16) as u8)),
        _ => pic.set_line(random.below(16) as u8, random.below(2) != 0),
    }
    u64::from(pic.interrupt_pending())
});

/// What Linux writes to initialize them: vectors 30h and 38h, all open.
pub(crate) const OPEN: [(u16, u8); 10] = [
    (0x20, 0x11),
    (0x21, 0x30),
    (0x21, 0x04),
    (0x21, 0x01),
    (0xa0, 0x11),
    (0xa1, 0x38),
    (0xa1, 0x02),
    (0xa1, 0x01),
    (0x21, 0x00),
    (0xa1, 0x00),
];

/// As Linux initializes them, all closed first.
fn initialized() -> Pic {
    let mut pic = Pic::new();
    for (port, value) in [(0x21, 0xff), (0xa1, 0xff)].into_iter().chain(OPEN) {
        pic.write(port, value);
    }
    pic
}

fn pulse(pic: &mut Pic, irq: u8) {
    pic.set_line(irq, false);
    pic.set_line(irq, true);
}

/// The vector, if an interrupt is pending.
fn take(pic: &mut Pic) -> Option<u8> {
    pic.interrupt_pending().then(|| pic.acknowledge())
}

fn in_service(pic: &mut Pic, port: u16) -> u8 {
    pic.write(port, 0x0b);
    let value = pic.read(port);
    pic.write(port, 0x0a);
    value
}

#[test]
fn linux_finds_a_controller() {
    let mut pic = Pic::new();
    pic.write(0xa1, 0xff);
    pic.write(0x21, 0xfb);
    assert_eq!(pic.read(0x21), 0xfb);
}

#[test]
fn nothing_interrupts_before_initialization_is_over() {
    let mut pic = initialized();
    pic.write(0x20, 0x11);
    for value in [0x30, 0x04, 0x01] {
        pulse(&mut pic, 0);
        assert!(!pic.interrupt_pending());
        pic.write(0x21, value);
    }
    assert_eq!(take(&mut pic), Some(0x30), "initialization opens the mask");
}

#[test]
fn initialization_forgets_edges_but_not_levels() {
    let mut pic = initialized();
    pic.write(0x4d0, 0x20);
    pic.set_line(4, true);
    pic.set_line(5, true);
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x01)] {
        pic.write(port, value);
    }
    assert_eq!(pic.read(0x20), 0x20);
    pulse(&mut pic, 4);
    assert_eq!(pic.read(0x20), 0x30);
}

#[test]
fn lower_inputs_wait_for_higher_ones() {
    let mut pic = initialized();
    for irq in [4, 1, 14, 8] {
        pulse(&mut pic, irq);
    }
    // The slave's inputs come in place of input 2.
    for vector in [0x31, 0x38, 0x3e, 0x34] {
        assert_eq!(take(&mut pic), Some(vector));
        assert_eq!(take(&mut pic), None, "in service");
        if vector >= 0x38 {
            assert_eq!(in_service(&mut pic, 0x20), 0x04);
            pic.write(0xa0, 0x20);
        }
        pic.write(0x20, 0x20);
    }
    assert_eq!(take(&mut pic), None);
}

#[test]
fn a_higher_input_interrupts_a_lower_one() {
    let mut pic = initialized();
    pulse(&mut pic, 4);
    assert_eq!(take(&mut pic), Some(0x34));
    assert!(pic.passes_on(0) && !pic.passes_on(4) && !pic.passes_on(5));
    pulse(&mut pic, 0);
    assert_eq!(take(&mut pic), Some(0x30));
    assert_eq!(in_service(&mut pic, 0x20), 0x11);
    pic.write(0x20, 0x20);
    assert_eq!(in_service(&mut pic, 0x20), 0x10, "ends the highest");
    pic.write(0x20, 0x64);
    assert_eq!(in_service(&mut pic, 0x20), 0x00);
}

/// Linux masks the line, and ends the interrupt by its number.
#[test]
fn masked_edges_are_kept() {
    let mut pic = initialized();
    pulse(&mut pic, 12);
    assert_eq!(take(&mut pic), Some(0x3c));
    pic.write(0xa1, 0x10);
    pic.write(0xa0, 0x64);
    pic.write(0x20, 0x62);
    assert!(!pic.passes_on(12));
    pulse(&mut pic, 12);
    assert_eq!(take(&mut pic), None);
    pic.write(0xa1, 0x00);
    assert_eq!(take(&mut pic), Some(0x3c));
}

#[test]
fn a_request_has_to_stand_until_it_is_acknowledged() {
    let mut pic = initialized();
    pulse(&mut pic, 5);
    pic.set_line(5, false);
    assert!(!pic.interrupt_pending());
    // What a processor gets that had seen it already.
    assert_eq!(pic.acknowledge(), 0x37);
    assert_eq!(in_service(&mut pic, 0x20), 0x00, "spurious");
    pulse(&mut pic, 11);
    pic.slave.requested = 0;
    assert_eq!(pic.acknowledge(), 0x3f);
    assert_eq!(in_service(&mut pic, 0x20), 0x04);
    assert_eq!(in_service(&mut pic, 0xa0), 0x00, "spurious");
}

#[test]
fn level_triggered_inputs_request_again() {
    let mut pic = initialized();
    pic.write(0x4d0, 0xff);
    pic.write(0x4d1, 0xff);
    assert_eq!([pic.read(0x4d0), pic.read(0x4d1)], [0xf8, 0xde]);
    for (irq, vector) in [(5, 0x35), (11, 0x3b)] {
        pic.set_line(irq, true);
        for _ in 0..2 {
            assert_eq!(take(&mut pic), Some(vector));
            assert_eq!(take(&mut pic), None);
            pic.write(0xa0, 0x20);
            pic.write(0x20, 0x20);
        }
        pic.set_line(irq, false);
        assert_eq!(take(&mut pic), None);
    }
    // An edge-triggered one does not.
    pic.set_line(1, true);
    assert_eq!(take(&mut pic), Some(0x31));
    pic.write(0x20, 0x20);
    pic.set_line(1, true);
    assert_eq!(take(&mut pic), None);
}

#[test]
fn rotation_moves_the_lowest_priority() {
    let mut pic = initialized();
    // Set priority: 3 lowest, so 4 highest.
    pic.write(0x20, 0xc3);
    for irq in [0, 3, 4] {
        pulse(&mut pic, irq);
    }
    assert_eq!(take(&mut pic), Some(0x34));
    // Ends 4 and makes it the lowest: 5, 6, 7, 0 come first.
    pic.write(0x20, 0xa0);
    pulse(&mut pic, 4);
    assert_eq!(take(&mut pic), Some(0x30));
    // The same by number: 0 is the lowest.
    pic.write(0x20, 0xe0);
    pulse(&mut pic, 0);
    for vector in [0x33, 0x34, 0x30] {
        assert_eq!(take(&mut pic), Some(vector));
        pic.write(0x20, 0x20);
    }
}

#[test]
fn automatic_end_leaves_nothing_in_service() {
    let mut pic = initialized();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03), (0x20, 0x80)] {
        pic.write(port, value);
    }
    pulse(&mut pic, 1);
    pulse(&mut pic, 3);
    assert_eq!(take(&mut pic), Some(0x31));
    assert_eq!(in_service(&mut pic, 0x20), 0x00);
    // Rotating: 1 is now the lowest.
    pulse(&mut pic, 1);
    assert_eq!(take(&mut pic), Some(0x33));
    assert_eq!(take(&mut pic), Some(0x31));
}

#[test]
fn the_special_mask_lets_lower_inputs_through() {
    let mut pic = initialized();
    pulse(&mut pic, 1);
    assert_eq!(take(&mut pic), Some(0x31));
    pulse(&mut pic, 6);
    assert_eq!(take(&mut pic), None);
    pic.write(0x21, 0x02);
    assert_eq!(take(&mut pic), None);
    pic.write(0x20, 0x68);
    assert_eq!(take(&mut pic), Some(0x36));
    // The general end spares what is masked.
    pic.write(0x20, 0x20);
    assert_eq!(in_service(&mut pic, 0x20), 0x02);
    pic.write(0x20, 0x48);
    pulse(&mut pic, 6);
    assert_eq!(take(&mut pic), None);
}

#[test]
fn special_full_nesting_lets_a_slave_interrupt_itself() {
    for (mode, nested) in [(0x01, None), (0x11, Some(0x38))] {
        let mut pic = initialized();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, mode)] {
            pic.write(port, value);
        }
        pulse(&mut pic, 14);
        assert_eq!(take(&mut pic), Some(0x3e));
        assert_eq!(pic.passes_on(8), nested.is_some());
        pulse(&mut pic, 8);
        assert_eq!(take(&mut pic), nested);
    }
}

#[test]
fn polling_acknowledges() {
    let mut pic = initialized();
    pulse(&mut pic, 9);
    pulse(&mut pic, 3);
    let mut poll = |port| {
        pic.write(port, 0x0c);
        pic.read(port)
    };
    assert_eq!(poll(0x20), 0x82);
    assert_eq!(poll(0xa0), 0x81);
    assert_eq!(poll(0xa0), 0x00);
    assert_eq!(poll(0x20), 0x00, "3 is below the cascade, which is in service");
    assert_eq!(in_service(&mut pic, 0x20), 0x04);
    assert_eq!(in_service(&mut pic, 0xa0), 0x02);
}

#[test]
fn passing_on_means_to_interrupt() {
    for seed in 1..=2000 {
        let mut random = Random::new(seed);
        let mut pic = initialized();
        pic.write(0x21, random.byte() & random.byte());
        pic.write(0xa1, random.byte() & random.byte());
        for _ in 0..random.below(4) {
            pulse(&mut pic, random.below(16) as u8);
            if random.below(2) == 0 {
                take(&mut pic);
            }
        }
        let irq = random.pick(&[0, 1, 3, 4, 8, 12]);
        let passed_on = pic.passes_on(irq);
        let before = take(&mut pic.clone());
        pulse(&mut pic, irq);
        let changed = before != Some(0x30 + irq) && take(&mut pic) == Some(0x30 + irq);
        assert_eq!(passed_on, changed, "seed {seed}, line {irq}");
    }
}
