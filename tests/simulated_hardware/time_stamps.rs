//! Guests that read the time-stamp counter, on hardware whose counter runs: every RDTSC is trapped, and its
//! answer logged.

use std::sync::Arc;

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::time_stamp_trap::{TimeStampTrap, TrapCounts};
use reprise_machine::engine::{Access, Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_replay::Start;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_time_stamp_sites::{Evidence, Instruction, KernelText, Site, Text};
use reprise_trace::cpu_state::{CS, CpuState, Segment};
use reprise_trace::header::{Header, Precaution, Treatment};
use reprise_trace::register_bits::CR4_TSD;

use crate::case::{Case, Clocked, Hardware, Recorded, assert_equal};
use crate::guest;
use crate::kept::Kept;

/// Hardware on which RDTSC of a kernel is trapped.
#[derive(Clone)]
pub(crate) struct Trapping {
    pub(crate) hardware: Hardware,
    kernel: Arc<KernelText>,
}

impl Trapping {
    /// For the kernel of this case.
    pub(crate) fn of(case: &Case<'_>, hardware: Hardware) -> Self {
        let kernel = KernelText::of_image(case.source.kernel).expect("it has sections");
        Self { hardware, kernel: Arc::new(kernel) }
    }

    /// What is known of the kernel.
    pub(crate) fn kernel(&self) -> KernelText {
        KernelText::clone(&self.kernel)
    }

    /// The same on other hardware.
    pub(crate) fn on(&self, hardware: Hardware) -> Self {
        Self { hardware, ..self.clone() }
    }
}

impl Clocked for Trapping {
    type Vcpu = TimeStampTrap<SimulatedVcpu>;

    fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    fn on_hardware(&self, hardware: Hardware) -> Self {
        self.on(hardware)
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        self.hardware.engine(ram)?.trapping_time_stamps(self.kernel())
    }

    fn simulated(engine: &BranchClock<Self::Vcpu>) -> &SimulatedVcpu {
        engine.vcpu().inner()
    }

    /// That of a recording that has the time stamps.
    fn header(&self, case: &Case<'_>) -> Header {
        let precaution = Precaution {
            what: Precaution::KERNEL_TIME_STAMPS.to_owned(),
            treatment: Treatment::Closed,
            how: "trapped".to_owned(),
        };
        Header { precautions: vec![precaution], ..case.header() }
    }
}

impl Case<'_> {
    /// As [`Case::record`], and what the trap did, and by how much the kernel was displaced.
    pub(crate) fn record_trapping(&self, trapping: &Trapping) -> (Recorded, TrapCounts, u64) {
        let (engine, recorded) = self.record_on(trapping);
        let traps = engine.vcpu().counts().expect("the kernel was found");
        let displacement = engine.vcpu().displacement().expect("the kernel was found");
        (recorded, traps, displacement)
    }

    /// Replays on trapping hardware of these kinds, and expands on the software CPU.
    #[track_caller]
    pub(crate) fn replays_trapping(
        &self,
        recorded: &Recorded,
        trapping: &Trapping,
        hardware: impl IntoIterator<Item = Hardware>,
    ) {
        for hardware in hardware {
            let seed = hardware.disturbance.seed;
            let (replay, _) = self.replay(&recorded.records, &trapping.on(hardware));
            let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_equal(&recorded.outcome, &replay, seed);
        }
        self.expand(recorded, &trapping.header(self));
    }
}

impl Kept {
    /// Replays from each checkpoint on trapping hardware. Gives how many there are.
    #[track_caller]
    pub(crate) fn replays_trapping(&self, trapping: &Trapping) -> usize {
        let count = self.replayable.checkpoints().len();
        for index in 0..count {
            let hardware = trapping.with_seed_added(1 + index as u64);
            let seed = hardware.hardware.disturbance.seed;
            let replay = self.replay(Start::Checkpoint(index), &hardware);
            let replay = replay.unwrap_or_else(|error| panic!("{index}, seed {seed}: {error}"));
            assert_equal(&self.recorded.outcome, &replay.outcome, seed);
        }
        count
    }

    /// Replays from each checkpoint on the software CPU.
    #[track_caller]
    pub(crate) fn replays_on_software(&self) {
        for index in 0..self.replayable.checkpoints().len() {
            let replay = self.replay_on_software(Start::Checkpoint(index));
            let replay = replay.unwrap_or_else(|error| panic!("{index}: {error}"));
            assert_equal(&self.recorded.outcome, &replay, index as u64);
        }
    }
}

/// User code's RDTSC: refused by the guest itself and asked by its kernel; and left to the processor, where
/// it is caught at the entry of the guest's #GP handler, and given back as if it had not faulted.
#[test]
fn time_stamps_of_user_code_replay() {
    for (tsd, user) in [("tsd=1", 0), ("tsd=0", 5)] {
        let cmdline = format!("scale=1 timing=1 {tsd}");
        let case = guest("compute", &cmdline, "");
        let trapping = Trapping::of(&case, Hardware::intel(1));
        let (recorded, traps, displacement) = case.record_trapping(&trapping);
        assert_eq!(displacement, 0);
        eprintln!("{tsd}: {traps:?}");
        assert!(recorded.console.contains("compute: done"), "{:?}", recorded.console);
        assert_eq!((traps.user, traps.kernel), (user, 5 - user), "{traps:?}");
        assert_eq!((traps.open, traps.refused), (0, 0), "{traps:?}");
        assert_eq!(recorded.console.matches("nanoseconds: ").count(), 4);
        case.replays_trapping(&recorded, &trapping, (2..4).map(Hardware::intel));
    }
}

/// A trap begins at any checkpoint: its own, of whose RAM the breakpoints are no part, and the software CPU's,
/// which knows nothing of traps. So does the software CPU.
#[test]
fn a_trap_begins_at_checkpoints() {
    for tsd in ["tsd=1", "tsd=0"] {
        let cmdline = format!("scale=1 timing=1 {tsd}");
        let case = guest("compute", &cmdline, "");
        let trapping = Trapping::of(&case, Hardware::intel(1));
        let kept = case.record_to_file(&trapping, 150_000);
        let count = kept.replays_trapping(&trapping);
        kept.replays_on_software();
        let kept = kept.with_checkpoints_of_software(100_000, 200_000, 8);
        let of_software = kept.replays_trapping(&trapping);
        let ticks = kept.recorded.outcome.ticks;
        eprintln!("{tsd}: {ticks} ticks, {count} checkpoints, {of_software} of software");
        assert!(count > 2 && of_software > 2, "{count}, {of_software}");
    }
}

/// Where the tiny guest below writes an RDTSC, and where it begins.
const WRITTEN: u64 = 0x1_0020;
const CODE: u64 = 0x1_0000;

/// A kernel of a few instructions that writes RDTSC into its own text, and its CPU state: 32-bit code, flat.
fn writing_kernel() -> (KernelText, CpuState, Vec<u8>) {
    let mut code = vec![0x66, 0xc7, 0x05];
    code.extend((WRITTEN as u32).to_le_bytes());
    code.extend([0x0f, 0x31]);
    // No-operations up to there and at it, then HLT.
    code.resize((WRITTEN - CODE) as usize + 2, 0x90);
    code.push(0xf4);
    let linear = CODE..CODE + 0x1000;
    let text = Text { name: ".text".to_owned(), linear, physical: CODE, initial: None };
    let entry_bytes = code[..8].to_vec();
    let kernel = KernelText { entry: CODE, entry_bytes, text: vec![text], ..KernelText::default() };
    let segment = |attributes| Segment { selector: 8, attributes, limit: u32::MAX, base: 0 };
    let mut state = CpuState { rip: CODE, cr0: 0x11, ..CpuState::default() };
    state.segments = [segment(0xc093); 6];
    state.segments[CS] = segment(0xc09b);
    (kernel, state, code)
}

/// The clock of an undisturbed vCPU whose guest is this code, RDTSC trapped.
fn trapping(
    kernel: KernelText,
    state: &CpuState,
    code: &[u8],
) -> BranchClock<TimeStampTrap<SimulatedVcpu>> {
    let mut ram = GuestRam::new(4).expect("4 MiB");
    let mut page = vec![0; 0x1000];
    page[..code.len()].copy_from_slice(code);
    assert!(ram.place(CODE, &page));
    let hardware = Disturbance { time_stamp_runs: true, ..Disturbance::none() };
    let vcpu = SimulatedVcpu::new(ram, hardware).expect("the host has memory");
    let vcpu = TimeStampTrap::new(vcpu, kernel).expect("it traps");
    let mut engine = BranchClock::new(vcpu, Parameters::with_skid(1)).expect("it counts");
    engine.set_cpu_state(state).expect("a first state");
    engine
}

/// RDTSC that the guest writes into its text is trapped; if nothing of its kernel said that it would, it is not
/// found again at a checkpoint, so that there is none.
#[test]
fn a_time_stamp_that_nobody_foresaw_ends_checkpoints() {
    let (kernel, state, code) = writing_kernel();
    let instruction = Instruction::ReadTimeStamp;
    let evidence = Evidence::UnwindTable;
    let site = Site { address: WRITTEN, instruction, bytes: 2, evidence };
    for sites in [vec![], vec![site]] {
        let foreseen = !sites.is_empty();
        let kernel = KernelText { sites, ..kernel.clone() };
        let mut engine = trapping(kernel, &state, &code);
        assert!(engine.save().expect("it can be asked").is_some());
        let exit = engine.run(u64::MAX).expect("it runs");
        assert_eq!(exit, Exit::Access(Access::TimeStamp));
        engine.finish_access(0x7_0000_0005).expect("it is answered");
        let after = engine.cpu_state().expect("it can be asked");
        assert_eq!((after.rip, after.gpr[0], after.gpr[2]), (WRITTEN + 2, 5, 7));
        let mut shown = [0; 2];
        engine.read_ram(WRITTEN, &mut shown);
        assert_eq!(shown, [0x0f, 0x31]);
        assert_eq!(engine.save().expect("it can be asked").is_some(), foreseen);
    }
}

/// Code of a kernel that has CR4.TSD set and cleared, writes back what it has read of its text, and writes
/// something else over an RDTSC. What is trapped stands at these offsets.
const REWRITING: [u8; 0x45] = {
    let code = [
        0x0f, 0x20, 0xe0, // 0x00: mov eax, cr4
        0x83, 0xc8, 0x04, // or eax, TSD
        0x0f, 0x22, 0xe0, // 0x06: mov cr4, eax
        0x0f, 0x20, 0xe3, // 0x09: mov ebx, cr4
        0x24, 0xfb, // and al, not TSD
        0x0f, 0x22, 0xe0, // 0x0e: mov cr4, eax
        0x0f, 0x20, 0xe1, // 0x11: mov ecx, cr4
        0x66, 0xa1, 0x40, 0x00, 0x01, 0x00, // mov ax, [0x10040]
        0x66, 0xa3, 0x40, 0x00, 0x01, 0x00, // mov [0x10040], ax
        0x66, 0xc7, 0x05, 0x42, 0x00, 0x01, 0x00, 0x90, 0x90, // mov word [0x10042], NOP NOP
        0xeb, 0x15, // 0x29: jmp 0x40
    ];
    let mut all = [0x90; 0x45];
    let mut at = 0;
    while at < code.len() {
        all[at] = code[at];
        at += 1;
    }
    // 0x40: rdtsc; 0x42: rdtsc; hlt
    let end = [0x0f, 0x31, 0x0f, 0x31, 0xf4];
    let mut at = 0;
    while at < end.len() {
        all[0x40 + at] = end[at];
        at += 1;
    }
    all
};

/// The guest has its own CR4.TSD; a breakpoint that it has written back as it read it stays, and one that it has
/// written over is gone.
#[test]
fn a_kernel_sees_its_own_control_register_and_text() {
    use Instruction::{ReadControl4, ReadTimeStamp, WriteControl4};
    let sites = [
        (0x00, ReadControl4, 3),
        (0x06, WriteControl4, 3),
        (0x09, ReadControl4, 3),
        (0x0e, WriteControl4, 3),
        (0x11, ReadControl4, 3),
        (0x40, ReadTimeStamp, 2),
        (0x42, ReadTimeStamp, 2),
    ];
    let site = |(offset, instruction, bytes)| {
        let (address, evidence) = (CODE + offset, Evidence::UnwindTable);
        Site { address, instruction, bytes, evidence }
    };
    let (kernel, state, _) = writing_kernel();
    let entry_bytes = REWRITING[..8].to_vec();
    let kernel = KernelText { sites: sites.map(site).to_vec(), entry_bytes, ..kernel };
    let mut engine = trapping(kernel, &state, &REWRITING);
    assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Access(Access::TimeStamp));
    engine.finish_access(0x7_0000_0005).expect("it is answered");
    assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Halt);
    let after = engine.cpu_state().expect("it can be asked");
    assert_eq!((after.rip, after.gpr[0], after.gpr[2]), (CODE + 0x45, 5, 7));
    assert_eq!((after.cr4, after.gpr[3], after.gpr[1]), (0, CR4_TSD, 0));
    let traps = engine.vcpu().counts().expect("the kernel was found");
    assert_eq!((traps.kernel, traps.control, traps.writes, traps.refused), (1, 5, 2, 0));
    let mut shown = [0; REWRITING.len()];
    engine.read_ram(CODE, &mut shown);
    let mut expected = REWRITING;
    expected[0x42..0x44].fill(0x90);
    assert_eq!(shown, expected);
}
