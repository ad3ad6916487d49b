//! What two machines differ in, a row for each register, flag and device, for a person.

use reprise_devices::board::BoardState;
use reprise_trace::cpu_state::{CpuState, Segment};
use serde::Serialize;

use crate::replica::Look;

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name, as in `RAX` or `uart.line_status`.
    pub name: String,
    /// What the first machine has.
    pub a: String,
    /// What the second one has.
    pub b: String,
}

const GENERAL: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];
const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

/// The flags that have names, from the lowest (AMD64 APM volume 2, 3.1.6).
const FLAGS: [(&str, u64); 17] = [
    ("CF", 0),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("IOPL0", 12),
    ("IOPL1", 13),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("ID", 21),
];

/// Registers of one word each.
const WORDS: [(&str, fn(&CpuState) -> u64); 28] = [
    ("RIP", |cpu| cpu.rip),
    ("CR0", |cpu| cpu.cr0),
    ("CR2", |cpu| cpu.cr2),
    ("CR3", |cpu| cpu.cr3),
    ("CR4", |cpu| cpu.cr4),
    ("CR8", |cpu| cpu.cr8),
    ("DR0", |cpu| cpu.dr[0]),
    ("DR1", |cpu| cpu.dr[1]),
    ("DR2", |cpu| cpu.dr[2]),
    ("DR3", |cpu| cpu.dr[3]),
    ("DR6", |cpu| cpu.dr6),
    ("DR7", |cpu| cpu.dr7),
    ("EFER", |cpu| cpu.efer),
    ("STAR", |cpu| cpu.star),
    ("LSTAR", |cpu| cpu.lstar),
    ("CSTAR", |cpu| cpu.cstar),
    ("SFMASK", |cpu| cpu.sfmask),
    ("KERNEL_GS_BASE", |cpu| cpu.kernel_gs_base),
    ("SYSENTER_CS", |cpu| cpu.sysenter_cs),
    ("SYSENTER_ESP", |cpu| cpu.sysenter_esp),
    ("SYSENTER_EIP", |cpu| cpu.sysenter_eip),
    ("PAT", |cpu| cpu.pat),
    ("TSC offset", |cpu| cpu.tsc_offset),
    ("TSC_AUX", |cpu| cpu.tsc_aux),
    ("FCW", |cpu| u64::from(cpu.fpu.fcw)),
    ("FSW", |cpu| u64::from(cpu.fpu.fsw)),
    ("FTW", |cpu| u64::from(cpu.fpu.ftw)),
    ("MXCSR", |cpu| u64::from(cpu.fpu.mxcsr)),
];

/// The rows in which two CPUs differ, none if they are the same.
pub fn cpu_rows(a: &CpuState, b: &CpuState) -> Vec<Row> {
    let mut rows = Rows::default();
    for (name, word) in WORDS.iter().take(1) {
        rows.compare_hex(name, word(a), word(b));
    }
    for (index, name) in GENERAL.iter().enumerate() {
        rows.compare_hex(name, a.gpr[index], b.gpr[index]);
    }
    rows.compare("RFLAGS", flags(a.rflags), flags(b.rflags));
    let segments = |cpu: &CpuState| {
        let named = SEGMENTS.into_iter().zip(cpu.segments);
        named.chain([("LDTR", cpu.ldtr), ("TR", cpu.tr)]).collect::<Vec<_>>()
    };
    for ((name, one), (_, other)) in segments(a).into_iter().zip(segments(b)) {
        rows.compare(name, segment(&one), segment(&other));
    }
    for (name, one, other) in [("GDTR", a.gdtr, b.gdtr), ("IDTR", a.idtr, b.idtr)] {
        let shown = |base: u64, limit: u16| format!("base {base:#x} limit {limit:#x}");
        rows.compare(name, shown(one.base, one.limit), shown(other.base, other.limit));
    }
    for (name, word) in WORDS.iter().skip(1) {
        rows.compare_hex(name, word(a), word(b));
    }
    let last = |cpu: &CpuState| {
        let fpu = &cpu.fpu;
        format!("opcode {:#x} at {:#x}, operand {:#x}", fpu.fop, fpu.fip, fpu.fdp)
    };
    rows.compare("last x87 instruction", last(a), last(b));
    for index in 0..8 {
        rows.compare(&format!("ST({index})"), bytes(&a.fpu.st[index]), bytes(&b.fpu.st[index]));
    }
    for index in 0..16 {
        let shown = |cpu: &CpuState| format!("{:#034x}", cpu.fpu.xmm[index]);
        rows.compare(&format!("XMM{index}"), shown(a), shown(b));
    }
    rows.compare("interrupt shadow", yes(a.interrupt_shadow), yes(b.interrupt_shadow));
    rows.compare("halted", yes(a.halted), yes(b.halted));
    rows.0
}

/// The rows in which two machines differ beside CPU and RAM.
pub fn other_rows(a: &Look, b: &Look) -> Vec<Row> {
    let mut rows = Rows::default();
    rows.compare("ticks", a.tick.to_string(), b.tick.to_string());
    rows.compare("the run is over", yes(a.over), yes(b.over));
    let (one, other) = (&a.surroundings, &b.surroundings);
    let ns = |ns: u64| format!("{ns} ns");
    rows.compare("virtual time", ns(one.virtual_ns), ns(other.virtual_ns));
    rows.compare("interrupts so far", one.interrupts.to_string(), other.interrupts.to_string());
    rows.compare("port accesses so far", one.accesses.to_string(), other.accesses.to_string());
    let console = |look: &Look| {
        let effects = look.surroundings.effects;
        let digest = effects.console_digest[..4].iter().map(|byte| format!("{byte:02x}"));
        format!("{} bytes, digest {}...", effects.console_bytes, digest.collect::<String>())
    };
    rows.compare("console output", console(a), console(b));
    if a.hidden.is_some() && b.hidden.is_some() && a.hidden != b.hidden {
        rows.compare("TLB and the like", "one content".to_owned(), "another".to_owned());
    }
    rows.0.extend(device_rows(&a.devices, &b.devices));
    rows.0
}

/// RFLAGS with its flags' names.
pub(crate) fn flags(rflags: u64) -> String {
    format!("{rflags:#x} [{}]", flag_names(rflags))
}

/// The names of the flags that are set.
pub(crate) fn flag_names(rflags: u64) -> String {
    let names = FLAGS.iter().filter(|(_, bit)| rflags >> bit & 1 != 0).map(|(name, _)| *name);
    names.collect::<Vec<_>>().join(" ")
}

fn segment(segment: &Segment) -> String {
    let Segment { selector, attributes, limit, base } = segment;
    format!("{selector:#x} base {base:#x} limit {limit:#x} attributes {attributes:#x}")
}

fn bytes(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

#[derive(Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn compare(&mut self, name: &str, a: String, b: String) {
        if a != b {
            self.0.push(Row { name: name.to_owned(), a, b });
        }
    }

    fn compare_hex(&mut self, name: &str, a: u64, b: u64) {
        if a != b {
            self.compare(name, format!("{a:#x}"), format!("{b:#x}"));
        }
    }
}

/// The devices' fields that differ, by the names that their code has for them.
fn device_rows(a: &BoardState, b: &BoardState) -> Vec<Row> {
    let (one, other) = (fields(&format!("{a:#?}")), fields(&format!("{b:#?}")));
    let value_in = |list: &[(String, String)], name: &str| {
        list.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    };
    let absent = || "none".to_owned();
    let mut rows = Rows::default();
    for (name, value) in &one {
        rows.compare(name, value.clone(), value_in(&other, name).unwrap_or_else(absent));
    }
    for (name, value) in &other {
        if value_in(&one, name).is_none() {
            rows.compare(name, absent(), value.clone());
        }
    }
    rows.0
}

/// The leaves of a value as the standard library prints it over many lines, each with its path.
fn fields(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // A name, and how many unnamed things were in it.
    let mut path: Vec<(String, usize)> = Vec::new();
    for line in text.lines().map(|line| line.trim().trim_end_matches(',')) {
        if matches!(line, "}" | "]" | ")") {
            path.pop();
            continue;
        }
        let (name, value) = match line.split_once(": ") {
            Some((name, value)) => (name.to_owned(), value),
            None => {
                let number = path.last_mut().map_or(0, |(_, count)| {
                    *count += 1;
                    *count - 1
                });
                (number.to_string(), line)
            }
        };
        if value.ends_with(['{', '[', '(']) {
            path.push((name, 0));
            continue;
        }
        // What holds everything, and a wrapper around every device, say nothing.
        let within = path.iter().skip(1).map(|(name, _)| name.as_str());
        let within = within.filter(|name| !matches!(*name, "device"));
        let whole: Vec<&str> = within.chain([name.as_str()]).collect();
        found.push((whole.join("."), value.to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use reprise_devices::board::{Board, BoardConfig};
    use reprise_devices::time::VirtualTime;

    use super::*;

    #[test]
    fn every_part_of_the_cpu_has_a_row() {
        let base = CpuState::default();
        let changes: [(&str, fn(&mut CpuState)); 12] = [
            ("RIP", |cpu| cpu.rip = 1),
            ("R15", |cpu| cpu.gpr[15] = 1),
            ("RFLAGS", |cpu| cpu.rflags |= 1),
            ("GS", |cpu| cpu.segments[5].base = 1),
            ("TR", |cpu| cpu.tr.selector = 8),
            ("IDTR", |cpu| cpu.idtr.limit = 1),
            ("CR2", |cpu| cpu.cr2 = 1),
            ("DR3", |cpu| cpu.dr[3] = 1),
            ("ST(7)", |cpu| cpu.fpu.st[7][0] = 1),
            ("XMM9", |cpu| cpu.fpu.xmm[9] = 1),
            ("last x87 instruction", |cpu| cpu.fpu.fdp = 1),
            ("interrupt shadow", |cpu| cpu.interrupt_shadow = true),
        ];
        assert_eq!(cpu_rows(&base, &base), []);
        for (name, change) in changes {
            let mut changed = base.clone();
            change(&mut changed);
            let names: Vec<String> =
                cpu_rows(&base, &changed).into_iter().map(|row| row.name).collect();
            assert_eq!(names, [name]);
        }
        assert_eq!(flags(0x246), "0x246 [PF ZF IF]");
    }

    #[test]
    fn a_device_is_named_with_its_field() {
        let config = BoardConfig { ram_bytes: 64 << 20, rtc_start_s: 0 };
        let (one, mut other) = (Board::new(&config), Board::new(&config));
        // The serial port's scratch register.
        other.port_write(0x3ff, 1, 0x5a, VirtualTime::from_ns(0));
        let rows = device_rows(&one.save(), &other.save());
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert!(rows[0].name.starts_with("uart."), "{rows:?}");
        assert_eq!((rows[0].a.as_str(), rows[0].b.as_str()), ("0", "90"));
    }
}
