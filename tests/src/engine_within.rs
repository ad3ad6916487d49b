//! Engines of tests that are another engine but for a little.

/// The methods of [`Engine`] with which no such engine has anything to do: each asks the engine in the field
/// that is named.
///
/// [`Engine`]: reprise_machine::engine::Engine
#[macro_export]
macro_rules! ask_engine_within {
    ($engine:ident) => {
        fn tick_kind(&self) -> ::reprise_trace::moment::TickKind {
            self.$engine.tick_kind()
        }

        fn tick(&self) -> u64 {
            self.$engine.tick()
        }

        fn amid_accesses(&mut self) -> Result<bool, ::reprise_machine::engine::EngineError> {
            self.$engine.amid_accesses()
        }

        fn interruptible(&mut self) -> Result<bool, ::reprise_machine::engine::EngineError> {
            self.$engine.interruptible()
        }

        fn inject(&mut self, vector: u8) -> Result<(), ::reprise_machine::engine::EngineError> {
            self.$engine.inject(vector)
        }

        fn set_time_base(&mut self, base: ::reprise_machine::clock::TimeBase) {
            self.$engine.set_time_base(base);
        }

        fn moment(
            &mut self,
        ) -> Result<::reprise_trace::moment::Moment, ::reprise_machine::engine::EngineError> {
            self.$engine.moment()
        }

        fn cpu_state(
            &mut self,
        ) -> Result<::reprise_trace::cpu_state::CpuState, ::reprise_machine::engine::EngineError> {
            self.$engine.cpu_state()
        }

        fn set_cpu_state(
            &mut self,
            state: &::reprise_trace::cpu_state::CpuState,
        ) -> Result<(), ::reprise_machine::engine::EngineError> {
            self.$engine.set_cpu_state(state)
        }

        fn read_ram(&self, address: u64, bytes: &mut [u8]) {
            self.$engine.read_ram(address, bytes);
        }

        fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
            self.$engine.visit_ram(visit);
        }

        fn kicker(&self) -> ::std::sync::Arc<dyn ::reprise_machine::engine::Kick> {
            self.$engine.kicker()
        }
    };
}
