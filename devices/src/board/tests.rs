//! The wiring: interrupts, deadlines, ports, and one leap against many steps.

use alloc::vec;
use reprise_random::Random;

use reprise_trace::event::{Event, LoggedEvent, Record};
use reprise_trace::log::{DiscardSink, LogWriter};
use reprise_trace::moment::Moment;

use super::*;
use crate::pic::tests::OPEN as OPEN_PIC;
use crate::time::NS_PER_S;

const CONFIG: BoardConfig = BoardConfig { ram_bytes: 512 << 20, rtc_start_s: 1_795_391_998 };

fn at(ns: u64) -> VirtualTime {
    VirtualTime::from_ns(ns)
}

fn write_all(board: &mut Board, accesses: &[(u16, u8)], now_ns: u64) {
    for &(port, value) in accesses {
        board.port_write(port, 1, value.into(), at(now_ns));
    }
}

fn read(board: &mut Board, port: u16, now_ns: u64) -> u8 {
    board.port_read(port, 1, at(now_ns)) as u8
}

/// 250 interrupts a second, as Debian's kernel has it.
const TIMER_250_HZ: [(u16, u8); 3] = [(0x43, 0x34), (0x40, 0xa5), (0x40, 0x12)];
/// FIFOs that interrupt at 8 bytes, 115200 baud, RTS, OUT2, receive interrupts.
const OPEN_SERIAL: [(u16, u8); 7] = [
    (0x3fb, 0x80),
    (0x3f8, 0x01),
    (0x3f9, 0x00),
    (0x3fb, 0x03),
    (0x3fa, 0x81),
    (0x3fc, 0x0b),
    (0x3f9, 0x05),
];

fn logged(bytes: &[u8]) -> Logged<Vec<u8>> {
    let record = Record {
        moment: Moment { tick: 0, rip: 0, rcx: 0 },
        cpu_digest: 0,
        event: Event::Console(bytes.to_vec()),
    };
    let record = LogWriter::new(DiscardSink).append(record).expect("a small record is written");
    match record.into_event() {
        LoggedEvent::Console(bytes) => bytes,
        other => panic!("not console input: {other:?}"),
    }
}

#[test]
fn the_timer_interrupts_every_4_milliseconds() {
    let mut board = Board::new(&CONFIG);
    assert_eq!(board.next_deadline(), None, "all masked");
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &TIMER_250_HZ, 0);
    let mut interrupts = 0;
    while let Some(deadline) = board.next_deadline() {
        if deadline.ns >= NS_PER_S {
            break;
        }
        board.advance(at(deadline.ns - 1));
        assert!(!board.interrupt_pending());
        board.advance(deadline);
        assert_eq!(board.next_deadline(), None, "it would not interrupt once more");
        assert!(board.interrupt_pending());
        assert_eq!(board.acknowledge_interrupt(), 0x30);
        assert_eq!(board.next_deadline(), None, "in service");
        board.port_write(0x20, 1, 0x20, deadline);
        interrupts += 1;
    }
    // A period of 4773 edges is a little longer than 4 ms.
    assert_eq!(interrupts, 249);
}

#[test]
fn a_masked_timer_does_not_wake_an_idle_guest_but_keeps_its_edge() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &TIMER_250_HZ, 0);
    write_all(&mut board, &[(0x21, 0x01)], 0);
    assert_eq!(board.next_deadline(), None);
    let now_ns = 3600 * NS_PER_S;
    board.advance(at(now_ns));
    assert!(!board.interrupt_pending());
    assert_eq!(read(&mut board, 0x20, now_ns), 0x01);
    write_all(&mut board, &[(0x21, 0x00)], now_ns);
    assert!(board.interrupt_pending());
}

#[test]
fn a_late_look_loses_no_tick_of_a_square_wave() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    // 1000 edges, of which 500 are low before each rise.
    write_all(&mut board, &[(0x43, 0x36), (0x40, 0xe8), (0x40, 0x03)], 0);
    let deadline = board.next_deadline().expect("a square wave rises");
    // More than half a period late: the output is low again.
    board.advance(at(deadline.ns + 500_000));
    assert_eq!(board.acknowledge_interrupt(), 0x30);
}

#[test]
fn the_clock_interrupts_through_the_slave() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &[(0x43, 0x30), (0x70, 0x0b), (0x71, 0x12)], 0);
    assert_eq!(board.next_deadline(), Some(at(NS_PER_S)));
    write_all(&mut board, &[(0x21, 0x04)], 0);
    assert_eq!(board.next_deadline(), None, "the cascade is masked");
    write_all(&mut board, &[(0x21, 0x00)], 0);
    board.advance(at(NS_PER_S));
    assert_eq!(board.acknowledge_interrupt(), 0x38);
    write_all(&mut board, &[(0xa0, 0x20), (0x20, 0x20)], NS_PER_S);
    assert_eq!(board.next_deadline(), None, "not before register C is read");
    write_all(&mut board, &[(0x70, 0x0c)], NS_PER_S);
    assert_eq!(read(&mut board, 0x71, NS_PER_S), 0xd0);
    assert_eq!(board.next_deadline(), Some(at(2 * NS_PER_S)));
}

#[test]
fn console_input_interrupts_by_timeout() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &[(0x43, 0x30)], 0);
    assert_eq!(board.console_room(), 0);
    write_all(&mut board, &OPEN_SERIAL, 0);
    assert_eq!(board.console_room(), 16);
    board.console_input(logged(b"ls\n"), at(1000));
    assert_eq!(board.console_room(), 13);
    assert!(!board.interrupt_pending());
    let deadline = board.next_deadline().expect("a timeout");
    assert_eq!(deadline.ns, 1000 + 347_220);
    board.advance(deadline);
    assert_eq!(board.acknowledge_interrupt(), 0x34);
    let line: Vec<u8> = (0..3).map(|_| read(&mut board, 0x3f8, deadline.ns)).collect();
    assert_eq!(line, b"ls\n");
    assert_eq!(read(&mut board, 0x3fa, deadline.ns) & 0x0f, 0x01);
}

/// Linux's interrupt handler for a transmission: few interrupts, and none left over.
#[test]
fn a_long_transmission_is_one_interrupt() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &OPEN_SERIAL, 0);
    write_all(&mut board, &[(0x43, 0x30), (0x3f9, 0x07)], 0);
    let mut unsent: Vec<u8> = (0..4096).map(|index| index as u8).collect();
    let text = unsent.clone();
    assert_eq!(board.acknowledge_interrupt(), 0x34);
    let mut passes = 0;
    while read(&mut board, 0x3fa, 0) & 0x01 == 0 {
        passes += 1;
        assert!(passes < 512, "too much work for the interrupt");
        for byte in unsent.drain(..unsent.len().min(16)) {
            write_all(&mut board, &[(0x3f8, byte)], 0);
        }
        if unsent.is_empty() {
            write_all(&mut board, &[(0x3f9, 0x05)], 0);
        }
    }
    write_all(&mut board, &[(0x20, 0x64)], 0);
    assert!(!board.interrupt_pending(), "no interrupt without work");
    assert!(board.has_console_output());
    assert_eq!(board.take_console_output(), text);
    assert!(!board.has_console_output());
}

/// A driver that writes one byte an interrupt and never reads the cause.
#[test]
fn each_byte_written_interrupts_anew() {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    write_all(&mut board, &[(0x3fc, 0x08), (0x3f9, 0x02)], 0);
    for _ in 0..3 {
        assert_eq!(board.acknowledge_interrupt(), 0x34);
        write_all(&mut board, &[(0x20, 0x20)], 0);
        assert!(!board.interrupt_pending());
        write_all(&mut board, &[(0x3f8, b'x')], 0);
        assert!(board.interrupt_pending());
    }
}

#[test]
fn what_is_absent_reads_all_ones() {
    let mut board = Board::new(&CONFIG);
    for port in [0x2f8, 0x3e8, 0x2e8, 0x3b4, 0x1f7, 0x43, 0x70, 0x80, 0xcfc, 0xffff] {
        board.port_write(port, 1, 0, at(0));
        assert_eq!(read(&mut board, port, 0), 0xff, "port {port:x}");
    }
    // As Linux looks for PCI.
    board.port_write(0xcf8, 4, 0x8000_0006, at(0));
    assert_eq!(board.port_read(0xcf8, 4, at(0)), u32::MAX);
    assert_eq!(board.port_read(0xcfc, 2, at(0)), 0xffff);
    assert_eq!(board.take_power_event(), None);
    board.mmio_write(0xfee0_0000, 4, 0, at(0));
    assert_eq!(board.mmio_read(0xfee0_0000, 4, at(0)), 0xffff_ffff);
    assert_eq!(board.mmio_read(1 << 39, 16, at(0)), u128::MAX);
}

#[test]
fn wide_accesses_are_accesses_to_neighbours() {
    let mut board = Board::new(&CONFIG);
    board.port_write(0x3fb, 2, 0x0b80, at(0));
    assert_eq!(board.port_read(0x3fb, 2, at(0)), 0x0b80);
    board.port_write(0x3f8, 2, 0x1234, at(0));
    assert_eq!(board.port_read(0x3f8, 4, at(0)), 0x8001_1234);
    // Past the last port there is none; wrapping does no harm.
    assert_eq!(board.port_read(0xffff, 4, at(0)), u32::MAX);
}

#[test]
fn every_way_to_reset_is_told_once() {
    let ways: [&[(u16, u8)]; 5] = [
        &[(0x64, 0xfe)],
        &[(0x64, 0xd1), (0x60, 0x02)],
        &[(0x92, 0x01)],
        &[(0xcf9, 0x02), (0xcf9, 0x06)],
        &[(0xcf9, 0x0e), (0xf4, 0x10)],
    ];
    for way in ways {
        let mut board = Board::new(&CONFIG);
        write_all(&mut board, way, 0);
        assert_eq!(board.take_power_event(), Some(PowerEvent::Reset), "{way:x?}");
        assert_eq!(board.take_power_event(), None);
    }
    let mut board = Board::new(&CONFIG);
    board.port_write(0xf4, 4, 0x1234_5610, at(0));
    assert_eq!(board.take_power_event(), Some(PowerEvent::DebugExit(0x10)));
}

#[test]
fn the_ports_that_read_time_are_known() {
    let timed: Vec<u16> =
        (0..=u16::MAX).filter(|&port| Board::port_depends_on_time(port)).collect();
    assert_eq!(timed, [0x40, 0x41, 0x42, 0x43, 0x61, 0x71]);
}

#[test]
fn time_never_goes_back() {
    let mut board = Board::new(&CONFIG);
    board.advance(at(5 * NS_PER_S));
    let state = board.save();
    board.advance(at(NS_PER_S));
    assert_eq!(board.save(), state);
}

/// Ports of the parts, those of the interrupt controllers and the timer more often.
const PORTS: [u16; 22] = [
    0x20, 0x21, 0xa0, 0xa1, 0x20, 0x40, 0x43, 0x40, 0x61, 0x60, 0x64, 0x70, 0x71, 0x71, 0x92,
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x4d0,
];

/// Sets interrupts up as guests do, so that pseudo-random accesses find something to disturb.
fn lively_board(random: &mut Random) -> Board {
    let mut board = Board::new(&CONFIG);
    write_all(&mut board, &OPEN_PIC, 0);
    if random.below(4) == 0 {
        // Interrupts end as they are acknowledged.
        write_all(&mut board, &[(0x20, 0x13), (0x21, 0x30), (0x21, 0x03)], 0);
    }
    let mode = random.pick(&[0x30, 0x34, 0x36, 0x38]);
    write_all(&mut board, &[(0x43, mode), (0x40, random.byte()), (0x40, random.byte())], 0);
    write_all(&mut board, &OPEN_SERIAL, 0);
    let (enables, alarm) = (random.byte() & 0x70 | 0x02, random.pick(&[0xff, 0x01, 0x30]));
    write_all(&mut board, &[(0x70, 0x0b), (0x71, enables), (0x70, 0x01), (0x71, alarm)], 0);
    board
}

/// One access, and what it answers.
fn access(board: &mut Board, random: &mut Random, now_ns: u64) -> u64 {
    let (port, value) = (random.pick(&PORTS), random.byte());
    match random.below(8) {
        0 if board.interrupt_pending() => return u64::from(board.acknowledge_interrupt()),
        0 | 1 => board.receive(&[value; 2][..random.below(3) as usize], at(now_ns)),
        2 => write_all(board, &[(0xa0, 0x20), (0x20, 0x20)], now_ns),
        // Guests rarely initialize the interrupt controllers anew.
        3 if port & 0x7e != 0x20 => board.port_write(port, 1, value.into(), at(now_ns)),
        4 => return board.next_deadline().map_or(0, |deadline| deadline.ns),
        _ => return u64::from(board.port_read(port, random.pick(&[1, 2, 4]), at(now_ns))),
    }
    u64::from(board.interrupt_pending()) << 32 | board.console_room() as u64
}

/// How far time goes between two accesses.
fn leap_ns(random: &mut Random) -> u64 {
    let longest_ns = random.pick(&[0, 500, 10_000, 1_000_000, 100_000_000, 4 * NS_PER_S]);
    random.below(longest_ns + 1)
}

#[test]
fn one_leap_is_many_steps_and_a_loaded_board_goes_on_as_the_saved_one() {
    for seed in 1..=300 {
        let mut random = Random::new(seed);
        let mut leaping = lively_board(&mut random);
        let mut stepping = leaping.clone();
        let mut now_ns = 0;
        for action in 0..100 {
            let leap_ns = leap_ns(&mut random);
            let mut steps_ns: Vec<u64> =
                (0..5).map(|_| now_ns + random.below(leap_ns + 1)).collect();
            steps_ns.sort_unstable();
            for step_ns in steps_ns {
                stepping.advance(at(step_ns));
                if random.below(4) == 0 {
                    stepping.catch_up();
                } else if random.below(4) == 0 {
                    let state = stepping.save();
                    stepping = lively_board(&mut random);
                    stepping.load(&state).expect("what was saved loads");
                    assert_eq!(stepping.save(), state, "seed {seed}");
                }
            }
            now_ns += leap_ns;
            for board in [&mut leaping, &mut stepping] {
                board.advance(at(now_ns));
            }
            let mut same_random = random.clone();
            let answer = access(&mut leaping, &mut random, now_ns);
            let same_answer = access(&mut stepping, &mut same_random, now_ns);
            let context = alloc::format!("seed {seed}, action {action}");
            assert_eq!(same_answer, answer, "{context}");
            assert_eq!(stepping.save(), leaping.save(), "{context}");
            assert_eq!(stepping.next_deadline(), leaping.next_deadline(), "{context}");
            assert_eq!(stepping.take_power_event(), leaping.take_power_event(), "{context}");
        }
        leaping.take_console_output();
    }
}

#[test]
fn nothing_interrupts_before_the_deadline_and_something_does_then() {
    let mut deadlines = 0;
    for seed in 1..=300 {
        let mut random = Random::new(seed);
        let mut board = lively_board(&mut random);
        let mut now_ns = 0;
        for action in 0..100 {
            let context = alloc::format!("seed {seed}, action {action}");
            now_ns += leap_ns(&mut random);
            board.advance(at(now_ns));
            access(&mut board, &mut random, now_ns);
            board.take_console_output();
            let pending = board.interrupt_pending();
            let deadline_ns = board.next_deadline().map(|deadline| deadline.ns);
            assert!(deadline_ns.is_none_or(|deadline_ns| deadline_ns > now_ns), "{context}");
            // Whatever the devices do until then, and after a long time without a deadline.
            let quiet_end_ns = deadline_ns.unwrap_or(now_ns + 100 * NS_PER_S) - 1;
            let mut looked_at = board.clone();
            for part in 1..=4 {
                looked_at.advance(at(now_ns + (quiet_end_ns - now_ns) / 4 * part));
                looked_at.catch_up();
                assert_eq!(looked_at.interrupt_pending(), pending, "{context}");
            }
            let mut due = board.clone();
            if let Some(deadline_ns) = deadline_ns {
                due.advance(at(deadline_ns));
                assert!(due.interrupt_pending(), "{context}");
                deadlines += 1;
            }
        }
    }
    assert!(deadlines > 1000, "the schedules are not about deadlines: {deadlines}");
}

#[test]
fn a_state_of_another_version_or_out_of_step_is_refused() {
    let mut board = Board::new(&CONFIG);
    board.advance(at(NS_PER_S));
    let good = board.save();
    let spoil: [fn(&mut BoardState); 5] = [
        |state| state.version += 1,
        |state| state.uart.version += 1,
        |state| state.reset.version += 1,
        |state| state.now_ns += 1_000_000,
        |state| state.now_ns = u64::MAX,
    ];
    for (index, spoil) in spoil.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        assert!(board.load(&state).is_err(), "case {index}");
        assert_eq!(board.save(), good, "unchanged");
    }
    assert_eq!(vec![board.load(&good)], [Ok(())]);
}

/// Saved states come from files.
#[test]
fn a_damaged_state_is_refused_or_does_no_harm() {
    let mut loaded = 0;
    for seed in 1..=5000 {
        let mut random = Random::new(seed);
        let mut board = lively_board(&mut random);
        let mut now_ns = 0;
        for _ in 0..10 {
            now_ns += leap_ns(&mut random);
            access(&mut board, &mut random, now_ns);
        }
        let mut bytes = postcard::to_allocvec(&board.save()).expect("a state encodes");
        for _ in 0..=random.below(3) {
            let index = random.below(bytes.len() as u64) as usize;
            let any = random.byte();
            bytes[index] = random.pick(&[0x00, 0x7f, 0xff, any]);
        }
        let Ok(state) = postcard::from_bytes::<BoardState>(&bytes) else {
            continue;
        };
        if board.load(&state).is_err() {
            continue;
        }
        loaded += 1;
        now_ns = state.now_ns;
        for _ in 0..50 {
            now_ns = now_ns.saturating_add(leap_ns(&mut random));
            board.advance(at(now_ns));
            access(&mut board, &mut random, now_ns);
            assert!(board.next_deadline().is_none_or(|deadline| deadline.ns > board.now_ns));
        }
    }
    assert!(loaded > 100, "all but {loaded} were refused, so nothing was tested");
}
