//! What drivers rely on: how Linux tells the chip, and when each interrupt comes and goes.

use alloc::vec::Vec;

use super::*;
use crate::state::contract::device_contract;

device_contract!(Uart::new(), |uart: &mut Uart, random| {
    // Time in which timeouts come due now and then.
    let now_ns = uart.timeout_ns.unwrap_or(0).saturating_sub(random.below(3));
    let register = random.below(8) as u8;
    match random.below(4) {
        0 => u64::from(uart.read(register, now_ns)),
        1 => {
            let written = uart.write(register, random.byte(), now_ns);
            u64::from(written.transmitted) << 1 | u64::from(written.interrupt_dipped)
        }
        2 => {
            let bytes = [random.byte(); 3];
            uart.receive(&bytes, now_ns);
            uart.room() as u64
        }
        _ => u64::from(uart.interrupt()) | uart.next_rise_ns().unwrap_or(0) << 1,
    }
});

/// A port at 115200 baud with FIFOs that interrupt at 8 bytes, as Linux sets it up.
fn open_port() -> Uart {
    let mut uart = Uart::new();
    for (register, value) in
        [(3, 0x80), (0, 1), (1, 0), (3, 0x03), (2, 0x01), (2, 0x81), (4, 0x0b), (1, 0x05)]
    {
        uart.write(register, value, 0);
    }
    uart
}

/// Four characters of ten bits at 115200 baud.
const TIMEOUT_NS: u64 = 347_220;

/// The steps by which Linux's driver tells what is at a port.
#[test]
fn linux_finds_a_16550a() {
    let mut uart = Uart::new();
    // There is a port: four interrupt-enable bits, no more.
    uart.write(1, 0x00, 0);
    assert_eq!(uart.read(1, 0) & 0x0f, 0x00);
    uart.write(1, 0x0f, 0);
    assert_eq!(uart.read(1, 0), 0x0f);
    assert_eq!(uart.room(), 0, "looking is not listening");
    uart.write(1, 0x00, 0);
    // Loopback connects OUT2 and RTS to carrier and CTS.
    uart.write(4, 0x1a, 0);
    assert_eq!(uart.read(6, 0) & 0xf0, 0x90);
    uart.write(4, 0x00, 0);
    // FIFOs that work, and no enhanced registers of later chips.
    uart.write(3, 0xbf, 0);
    uart.write(2, 0x00, 0);
    uart.write(3, 0x00, 0);
    uart.write(2, 0x01, 0);
    assert_eq!(uart.read(2, 0) >> 6, 3);
    for line_control in [0x80, 0xbf, 0xe0] {
        uart.write(3, line_control, 0);
        assert_ne!(uart.read(2, 0), 0, "no enhanced feature register");
    }
    uart.write(3, 0x00, 0);
    uart.write(1, 0x40, 0);
    assert_eq!(uart.read(1, 0) & 0x40, 0, "no UART enable of an XScale");
    // The FIFO's size, by overflowing it in loopback.
    uart.write(2, 0x07, 0);
    uart.write(4, 0x10, 0);
    for _ in 0..256 {
        assert!(!uart.write(0, 0xff, 0).transmitted);
    }
    let mut count = 0;
    while uart.read(5, 0) & 0x01 != 0 {
        uart.read(0, 0);
        count += 1;
    }
    assert_eq!(count, 16);
}

/// Linux's two tests for bugs of the transmitter's interrupt, and the order of a transmission.
#[test]
fn the_transmitter_interrupts_as_linux_expects() {
    let mut uart = open_port();
    for _ in 0..2 {
        uart.write(1, 0x02, 0);
        assert!(uart.interrupt());
        assert_eq!(uart.read(5, 0) & 0x60, 0x60);
        assert_eq!(uart.read(2, 0) & 0x0f, 0x02, "enabling raises the interrupt");
        assert_eq!(uart.read(2, 0) & 0x0f, 0x01, "looking clears it");
        uart.write(1, 0x00, 0);
    }
    uart.write(1, 0x02, 0);
    let first = uart.write(0, b'a', 0);
    assert_eq!(first, Written { transmitted: true, interrupt_dipped: true });
    assert_eq!(uart.read(2, 0) & 0x0f, 0x02);
    assert!(!uart.interrupt());
    let second = uart.write(0, b'b', 0);
    assert_eq!(second, Written { transmitted: true, interrupt_dipped: false });
    assert!(uart.interrupt());
}

#[test]
fn receiving_interrupts_at_the_trigger_or_by_timeout() {
    let mut uart = open_port();
    assert_eq!(uart.room(), 16);
    uart.receive(b"1234567", 1000);
    assert!(!uart.interrupt());
    assert_eq!(uart.next_rise_ns(), Some(1000 + TIMEOUT_NS));
    assert_eq!(uart.read(2, 1000 + TIMEOUT_NS - 1) & 0x0f, 0x01);
    assert_eq!(uart.read(2, 1000 + TIMEOUT_NS) & 0x0f, 0x0c);
    assert!(uart.interrupt());
    assert_eq!(uart.read(0, 400_000), b'1');
    assert!(!uart.interrupt(), "reading clears the timeout");
    assert_eq!(uart.next_rise_ns(), Some(400_000 + TIMEOUT_NS), "and starts it anew");
    uart.receive(b"89", 400_001);
    assert!(uart.interrupt());
    assert_eq!(uart.next_rise_ns(), None);
    assert_eq!(uart.read(2, 400_001) & 0x0f, 0x04);
    let rest: Vec<u8> = (0..8).map(|_| uart.read(0, 400_002)).collect();
    assert_eq!(rest, b"23456789");
    assert!(!uart.interrupt());
    assert_eq!(uart.next_rise_ns(), None, "nothing to time out");
}

#[test]
fn no_byte_is_lost_that_there_was_room_for() {
    let mut uart = open_port();
    let mut received = Vec::new();
    let mut sent = 0u8;
    while received.len() < 200 {
        let bytes: Vec<u8> = (0..uart.room()).map(|offset| sent + offset as u8).collect();
        sent += bytes.len() as u8;
        uart.receive(&bytes, 0);
        assert_eq!(uart.room(), 0);
        for _ in 0..7 {
            assert_eq!(uart.read(5, 0) & 0x03, 0x01, "ready, no overrun");
            received.push(uart.read(0, 0));
        }
    }
    assert!(received.iter().copied().eq(0..received.len() as u8));
}

#[test]
fn an_overrun_keeps_the_fifo_and_is_told_first() {
    let mut uart = open_port();
    uart.receive(&[7; 16], 0);
    uart.receive(&[8], 0);
    assert_eq!(uart.read(2, 0) & 0x0f, 0x06);
    assert_eq!(uart.read(5, 0) & 0x03, 0x03);
    assert_eq!(uart.read(5, 0) & 0x03, 0x01);
    assert_eq!(uart.read(2, 0) & 0x0f, 0x04);
    assert!((0..16).all(|_| uart.read(0, 0) == 7));
    assert_eq!(uart.read(5, 0) & 0x01, 0);
}

#[test]
fn without_fifos_there_is_room_for_one_byte() {
    let mut uart = open_port();
    uart.write(2, 0x00, 0);
    assert_eq!(uart.room(), 1);
    uart.receive(b"a", 0);
    assert_eq!((uart.room(), uart.next_rise_ns()), (0, None));
    assert_eq!(uart.read(2, 0), 0x04);
    uart.receive(b"b", 0);
    assert_eq!(uart.read(5, 0) & 0x03, 0x03);
    assert_eq!(uart.read(0, 0), b'b');
    assert_eq!(uart.room(), 1);
}

#[test]
fn only_a_guest_that_listens_has_room() {
    let mut uart = Uart::new();
    assert_eq!(uart.room(), 0);
    uart.write(4, 0x02, 0);
    assert_eq!(uart.room(), 0, "RTS alone: Linux raises it before it empties the FIFO");
    for _ in 0..POLLING_LOOKS {
        assert_eq!(uart.room(), 0, "looking for a byte, but not yet polling");
        uart.read(5, 0);
    }
    assert_eq!(uart.room(), 1, "polling");
    uart.write(0, b'>', 0);
    assert_eq!(uart.room(), 0, "looking while sending is no polling");
    for _ in 0..POLLING_LOOKS {
        uart.read(5, 0);
    }
    uart.write(4, 0x12, 0);
    assert_eq!(uart.room(), 0, "loopback");
    uart.write(4, 0x08, 0);
    uart.write(1, 0x01, 0);
    assert_eq!(uart.room(), 1, "receive interrupts");
}

#[test]
fn out2_gates_the_interrupt() {
    let mut uart = open_port();
    uart.write(1, 0x02, 0);
    for (modem_control, reaches) in [(0x0b, true), (0x03, false), (0x1b, false), (0x08, true)] {
        uart.write(4, modem_control, 0);
        assert_eq!(uart.interrupt(), reaches, "{modem_control:02x}");
    }
}

#[test]
fn modem_status_tells_changes_once() {
    let mut uart = Uart::new();
    assert_eq!(uart.read(6, 0), 0xb0, "a terminal is there");
    uart.write(1, 0x08, 0);
    uart.write(4, 0x1f, 0);
    assert_eq!(uart.read(2, 0), 0x01);
    assert_eq!(uart.read(6, 0), 0xf0, "only the end of ringing is a change");
    uart.write(4, 0x10, 0);
    assert_eq!(uart.read(2, 0), 0x00);
    assert_eq!(uart.read(6, 0), 0x0f);
    assert_eq!(uart.read(6, 0), 0x00);
    assert_eq!(uart.read(2, 0), 0x01);
}

#[test]
fn the_divisor_is_behind_its_latch() {
    let mut uart = Uart::new();
    uart.write(3, 0x83, 0);
    uart.write(0, 0x34, 0);
    uart.write(1, 0x12, 0);
    assert_eq!((uart.read(0, 0), uart.read(1, 0)), (0x34, 0x12));
    uart.write(3, 0x03, 0);
    assert_eq!((uart.read(0, 0), uart.read(1, 0)), (0, 0));
    uart.write(7, 0xa5, 0);
    assert_eq!(uart.read(7, 0), 0xa5);
    assert_eq!(uart.character_ns(), 10 * 0x1234 * NS_PER_S / 115_200);
}
