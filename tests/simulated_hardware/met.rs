//! The positions that the guest `positions` is there for, each told by the instructions around it.

use reprise_trace::event::{Event, Record};

use crate::watched::{Seen, What};

/// What a recording has met.
pub(crate) struct Met<'a> {
    pub(crate) seen: &'a [Seen],
    pub(crate) records: &'a [Record],
}

/// How often a position was met.
type Count = fn(&Met<'_>) -> usize;

const MOV_TO_SS: &[u8] = &[0x8e, 0xd1];
const STI: &[u8] = &[0xfb];
const HLT: &[u8] = &[0xf4];
const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
/// What RCX is at its start.
const REP_MOVSB_BYTES: u64 = 0x1140;
/// What the loop without conditional branches begins with, from each of its instructions on.
const STRAIGHT_LOOP: &[&[u8]] = &[
    &[0x48, 0xff, 0xc0, 0x48, 0x8d, 0x5c, 0x58, 0x03],
    &[0x48, 0x8d, 0x5c, 0x58, 0x03, 0x48, 0x31, 0xda],
    &[0x48, 0x31, 0xda, 0x52, 0x5e, 0xeb],
    &[0x52, 0x5e, 0xeb],
    &[0x5e, 0xeb],
];
const JUMP_TO_ITSELF: &[u8] = &[0xeb, 0xfe];
/// XOR of EAX with itself, behind what gives RAX the number of the round.
const FORGETS_ROUND: &[u8] = &[0x31, 0xc0];
/// MOV of one to EAX, where that is forgotten.
const NEXT_ROUND: &[u8] = &[0xb8, 0x01, 0, 0, 0];
const UD2: &[u8] = &[0x0f, 0x0b];
/// ADD of an absolute address to RBX.
const ADD_FROM_REMOVED_PAGE: &[u8] = &[0x48, 0x03, 0x1c, 0x25];
const PAGE_FAULT_ENTRY: &[u8] = &[0x50, 0x51, 0x52, 0x53, 0x56];
const UNDEFINED_ENTRY: &[u8] = &[0x48, 0x83, 0x04, 0x24, 0x02];
const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSTEM_CALL_ENTRY: &[u8] = &[0x49, 0xff, 0xc5];
const SYSRET: &[u8] = &[0x48, 0x0f, 0x07];
const INT_4: &[u8] = &[0xcd, 0x04];
/// It pushes no error code, and the vector.
const INT_4_ENTRY: &[u8] = &[0x6a, 0x00, 0x6a, 0x04];
const IRET: &[u8] = &[0x48, 0xcf];
/// MOV of AL to a place in the code, without its displacement.
const CHANGES_CODE: &[u8] = &[0x88, 0x05];
/// MOV to DL of what was put there.
const CHANGED: &[u8] = &[0xb2];
const CHANGED_TOO: &[u8] = &[0x48, 0x83, 0xc6];
/// INC of a 64-bit register, which the guest has behind what opens a shadow.
const INC_BYTES: usize = 3;
const DISPLACEMENT_BYTES: usize = 4;

fn kicks(met: &Met<'_>, at: impl Fn(&Seen) -> bool) -> usize {
    met.seen.iter().filter(|seen| seen.is_kick() && at(seen)).count()
}

fn interrupts(met: &Met<'_>, at: impl Fn(&Seen) -> bool) -> usize {
    met.seen.iter().filter(|seen| seen.is_interrupt() && at(seen)).count()
}

fn is_amid_rep(seen: &Seen) -> bool {
    let left = seen.state.gpr[reprise_trace::cpu_state::RCX];
    seen.is_at(REP_MOVSB) && left != 0 && left != REP_MOVSB_BYTES
}

/// Whether something like this entered where the guest was seen.
fn enters(met: &Met<'_>, seen: &Seen, like: fn(&Event) -> bool) -> bool {
    let digest = seen.state.short_digest();
    let mut there = met.records.iter().filter(|it| it.moment == seen.moment);
    there.any(|record| record.cpu_digest == digest && like(&record.event))
}

fn is_typed(event: &Event) -> bool {
    matches!(event, Event::Console(_))
}

/// Time or input arrives where a window's exit leaves the guest.
fn arrivals_at_windows(met: &Met<'_>) -> usize {
    let windows = met.seen.iter().filter(|seen| seen.what == What::Window);
    let arrives = |event: &Event| matches!(event, Event::Console(_) | Event::Time(_));
    windows.filter(|window| enters(met, window, arrives)).count()
}

/// Input at a place where the timer is due as well: one interrupt is taken there, and the other as soon as
/// its handler returns there.
fn two_at_once(met: &Met<'_>) -> usize {
    let taken: Vec<(&Seen, u8)> = met
        .seen
        .iter()
        .filter_map(|seen| match seen.what {
            What::Interrupt { vector } => Some((seen, vector)),
            _ => None,
        })
        .collect();
    let both = |pair: &&[(&Seen, u8)]| {
        let [(first, vector), (second, other)] = pair else { return false };
        vector != other
            && second.at_window
            && (first.state.rip, first.state.gpr) == (second.state.rip, second.state.gpr)
            && enters(met, first, is_typed)
    };
    taken.windows(2).filter(both).count()
}

/// An interrupt to which a kick has led the guest on: not one that was put off until interrupts open.
fn interrupts_led_to(met: &Met<'_>, at: impl Fn(&Seen) -> bool) -> usize {
    interrupts(met, |seen| !seen.at_window && at(seen))
}

/// Scenario, position, and how often a recording meets it.
pub(crate) type Position = (&'static str, &'static str, Count);

/// Stands for every scenario.
pub(crate) const ANY: &str = "";

/// By scenario, and what it is. All must be met in the few recordings of a test.
pub(crate) const POSITIONS: &[Position] = &[
    (ANY, "two arrivals at one moment", two_at_once),
    ("rep", "a kick amid a REP", |met| kicks(met, is_amid_rep)),
    ("rep", "an interrupt amid a REP", |met| interrupts(met, is_amid_rep)),
    ("rep", "a kick before the page fault's handler", |met| {
        kicks(met, |seen| seen.is_at(PAGE_FAULT_ENTRY))
    }),
    ("straight", "an interrupt within the loop", |met| {
        interrupts_led_to(met, |seen| STRAIGHT_LOOP.iter().any(|code| seen.is_at(code)))
    }),
    ("memory", "a kick where no register tells the round", |met| {
        kicks(met, |seen| seen.is_at(NEXT_ROUND))
    }),
    ("memory", "an interrupt where one does", |met| {
        interrupts_led_to(met, |seen| seen.is_at(FORGETS_ROUND))
    }),
    ("itself", "an interrupt", |met| interrupts_led_to(met, |seen| seen.is_at(JUMP_TO_ITSELF))),
    ("shadow", "a kick right behind STI", |met| {
        kicks(met, |seen| seen.state.interrupt_shadow && seen.follows(STI, 0))
    }),
    ("shadow", "a kick right behind MOV SS", |met| {
        kicks(met, |seen| seen.state.interrupt_shadow && seen.follows(MOV_TO_SS, 0))
    }),
    ("shadow", "an interrupt where STI's shadow ends", |met| {
        interrupts(met, |seen| seen.follows(STI, INC_BYTES))
    }),
    ("shadow", "an interrupt where MOV SS's shadow ends", |met| {
        interrupts(met, |seen| seen.follows(MOV_TO_SS, INC_BYTES))
    }),
    ("hlt", "a kick between STI and HLT", |met| {
        kicks(met, |seen| seen.is_at(HLT) && seen.follows(STI, 0))
    }),
    ("hlt", "an interrupt that ends HLT", |met| interrupts(met, |seen| seen.follows(HLT, 0))),
    ("fault", "an interrupt on UD2", |met| interrupts(met, |seen| seen.is_at(UD2))),
    ("fault", "an interrupt on what page-faults", |met| {
        interrupts(met, |seen| seen.is_at(ADD_FROM_REMOVED_PAGE) && seen.reads_absent_page)
    }),
    ("fault", "a kick before UD2's handler", |met| kicks(met, |seen| seen.is_at(UNDEFINED_ENTRY))),
    ("fault", "a kick before the page fault's handler", |met| {
        kicks(met, |seen| seen.is_at(PAGE_FAULT_ENTRY))
    }),
    ("window", "an interrupt in a window's exit", |met| interrupts(met, |seen| seen.at_window)),
    ("window", "a kick in a window's exit", |met| kicks(met, |seen| seen.at_window)),
    ("window", "an arrival in a window's exit", arrivals_at_windows),
    ("user", "a kick on SYSCALL", |met| kicks(met, |seen| seen.is_at(SYSCALL))),
    ("user", "a kick right behind SYSCALL", |met| kicks(met, |seen| seen.is_at(SYSTEM_CALL_ENTRY))),
    ("user", "a kick on SYSRET", |met| kicks(met, |seen| seen.is_at(SYSRET))),
    ("user", "a kick right behind INT", |met| kicks(met, |seen| seen.is_at(INT_4_ENTRY))),
    ("user", "a kick on IRET", |met| kicks(met, |seen| seen.is_at(IRET))),
    ("user", "an interrupt on SYSCALL", |met| interrupts(met, |seen| seen.is_at(SYSCALL))),
    ("user", "an interrupt right behind SYSRET", |met| {
        interrupts(met, |seen| seen.in_user_code() && seen.follows(SYSCALL, 0))
    }),
    ("user", "an interrupt on INT", |met| interrupts(met, |seen| seen.is_at(INT_4))),
    ("user", "an interrupt right behind IRET", |met| {
        interrupts(met, |seen| seen.in_user_code() && seen.follows(INT_4, 0))
    }),
    ("code", "a kick right behind a change of the next instruction", |met| {
        kicks(met, |seen| seen.is_at(CHANGED) && seen.follows(CHANGES_CODE, DISPLACEMENT_BYTES))
    }),
    ("code", "an interrupt right behind a change of the next instruction", |met| {
        interrupts(met, |seen| {
            seen.is_at(CHANGED) && seen.follows(CHANGES_CODE, DISPLACEMENT_BYTES)
        })
    }),
    ("code", "an interrupt on a changed instruction", |met| {
        interrupts(met, |seen| seen.is_at(CHANGED_TOO))
    }),
];
