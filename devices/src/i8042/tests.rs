//! A guest's probe, and the reset line.

use super::*;
use crate::state::contract::device_contract;

device_contract!(KeyboardController::new(), |keyboard: &mut KeyboardController, random| {
    match random.below(4) {
        0 => u64::from(keyboard.write_command(random.byte())),
        1 => u64::from(keyboard.write_data(random.byte())),
        2 => u64::from(keyboard.read_data()),
        _ => u64::from(keyboard.read_status()) << 1 | u64::from(keyboard.interrupt()),
    }
});

/// Waits as Linux does for an answer, which has to be there at once.
fn command(keyboard: &mut KeyboardController, command: u8, parameter: Option<u8>) -> u8 {
    assert_eq!(keyboard.read_status() & 0x02, 0, "room for input");
    assert!(!keyboard.write_command(command));
    if let Some(parameter) = parameter {
        assert!(!keyboard.write_data(parameter));
    }
    assert_eq!(keyboard.read_status() & 0x01, 0x01, "an answer to {command:02x}");
    keyboard.read_data()
}

/// As Linux probes: flush, read the mode twice, write it, look for an auxiliary port.
#[test]
fn a_probe_has_done_at_once() {
    let mut keyboard = KeyboardController::new();
    assert_eq!(keyboard.read_status() & 0x01, 0, "nothing to flush");
    let mode = command(&mut keyboard, 0x20, None);
    assert_eq!(command(&mut keyboard, 0x20, None), mode);
    assert_eq!(mode & 0x04, 0x04, "the system flag");
    let quiet = (mode | 0x10) & !0x01;
    keyboard.write_command(0x60);
    keyboard.write_data(quiet);
    assert_eq!(command(&mut keyboard, 0x20, None), quiet);
    assert!(!keyboard.interrupt());
    // The echo does not come from an auxiliary port, and the port's lines fail their test.
    keyboard.write_command(0xd3);
    keyboard.write_data(0x5a);
    assert_eq!(keyboard.read_status() & 0x21, 0x01);
    assert_eq!(keyboard.read_data(), 0x5a);
    assert!(![0x00, 0xfa, 0xff].contains(&command(&mut keyboard, 0xa9, None)));
    assert_eq!(command(&mut keyboard, 0xaa, None), 0x55);
    assert_eq!(command(&mut keyboard, 0xab, None), 0x00);
}

#[test]
fn no_keyboard_answers() {
    let mut keyboard = KeyboardController::new();
    keyboard.write_data(0xff);
    assert!(keyboard.interrupt());
    assert_eq!(keyboard.read_status() & 0x41, 0x41, "an answer, by timeout");
    assert_eq!(keyboard.read_data(), 0xfe);
    assert!(!keyboard.interrupt());
    assert_eq!(keyboard.read_status() & 0x41, 0);
}

#[test]
fn the_reset_line_resets() {
    let mut keyboard = KeyboardController::new();
    for command in 0xf0..=0xff {
        assert_eq!(keyboard.write_command(command), command & 1 == 0, "{command:02x}");
    }
    keyboard.write_command(0xd1);
    assert!(!keyboard.write_data(0x03));
    assert_eq!(command(&mut keyboard, 0xd0, None), 0x03);
    keyboard.write_command(0xd1);
    assert!(keyboard.write_data(0x02));
}
