//! The software CPU: x86-64 system emulation on an x86-64 host.
//!
//! Guest and host speak the same instruction set, so the host CPU is the semantics: a
//! computational instruction runs as a short native sequence (`native/`) that loads just the
//! registers and flags it reads. What cannot run so is written by hand: `ops/` for control flow,
//! stack and string instructions, `system/` for segments, exceptions and system state. `decode/`
//! turns guest bytes into blocks of pre-decoded operations, `memory/` carries accesses through
//! paging, and `execute.rs` runs blocks.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the software CPU executes guest instructions on an x86-64 host");

mod counting;
pub mod cpu;
pub mod decode;
pub mod engine;
mod execute;
pub mod fault;
pub mod flag_laws;
mod flags;
mod integer_hash;
mod intervention;
pub mod latitude;
pub mod latitude_sites;
pub mod memory;
pub mod mode;
mod native;
mod ops;
mod other_maker;
pub mod profile;
mod saved;
pub mod scout;
mod system;
pub mod tracing;
pub mod translate;
