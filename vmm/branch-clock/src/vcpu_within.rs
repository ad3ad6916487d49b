//! vCPUs that are another vCPU but for a little: the trap of RDTSC, and what tests put around one.

/// The methods of [`Vcpu`] that are named: each asks the vCPU in the field before the colon. What nobody
/// names is written by hand, or as the trait has it.
///
/// [`Vcpu`]: crate::vcpu::Vcpu
#[macro_export]
macro_rules! ask_vcpu_within {
    ($vcpu:ident: $($method:ident),+ $(,)?) => {
        $($crate::ask_vcpu_within!(@$method $vcpu);)+
    };
    (@finish_access $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu finish_access(value: u128) -> bool);
    };
    (@conditional_branches $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu conditional_branches() -> u64);
    };
    (@set_overflow $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu set_overflow(branches: Option<u64>) -> ());
    };
    (@set_breakpoints $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu set_breakpoints(addresses: &[u64]) -> ());
    };
    (@step_off $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu step_off() -> ());
    };
    (@state $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu state() -> ::reprise_trace::cpu_state::CpuState);
    };
    (@set_state $vcpu:ident) => {
        $crate::ask_vcpu_within!(
            @fn $vcpu set_state(state: &::reprise_trace::cpu_state::CpuState) -> ()
        );
    };
    (@interruptible $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu interruptible() -> bool);
    };
    (@inject $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu inject(vector: u8) -> ());
    };
    (@catch_breakpoint_instructions $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu catch_breakpoint_instructions(catch: bool) -> ());
    };
    (@pass_breakpoint_instruction $vcpu:ident) => {
        $crate::ask_vcpu_within!(@fn $vcpu pass_breakpoint_instruction() -> ());
    };
    (@watch_writes $vcpu:ident) => {
        $crate::ask_vcpu_within!(
            @fn $vcpu watch_writes(physical: ::std::ops::Range<u64>, watch: bool) -> ()
        );
    };
    (@retire_instruction $vcpu:ident) => {
        $crate::ask_vcpu_within!(
            @fn $vcpu retire_instruction(after: &::reprise_trace::cpu_state::CpuState) -> ()
        );
    };
    (@fn $vcpu:ident $method:ident($($argument:ident: $of:ty),*) -> $gives:ty) => {
        fn $method(
            &mut self,
            $($argument: $of),*
        ) -> Result<$gives, ::reprise_machine::engine::EngineError> {
            self.$vcpu.$method($($argument),*)
        }
    };
    // Those that cannot fail.
    (@set_window_request $vcpu:ident) => {
        fn set_window_request(&mut self, wanted: bool) {
            self.$vcpu.set_window_request(wanted);
        }
    };
    (@write_ram $vcpu:ident) => {
        fn write_ram(&mut self, address: u64, bytes: &[u8]) {
            self.$vcpu.write_ram(address, bytes);
        }
    };
    (@instruction_at $vcpu:ident) => {
        fn instruction_at(
            &self,
            state: &::reprise_trace::cpu_state::CpuState,
        ) -> Option<::iced_x86::Instruction> {
            self.$vcpu.instruction_at(state)
        }
    };
    (@assists $vcpu:ident) => {
        fn assists(&self) -> ::reprise_trace::event::Assists {
            self.$vcpu.assists()
        }
    };
    (@ram $vcpu:ident) => {
        fn ram(&self) -> &::reprise_machine::ram::GuestRam {
            self.$vcpu.ram()
        }
    };
    (@kicker $vcpu:ident) => {
        fn kicker(&self) -> ::std::sync::Arc<dyn ::reprise_machine::engine::Kick> {
            self.$vcpu.kicker()
        }
    };
}
