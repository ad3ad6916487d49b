//! Instruction traces for others: exporters to the formats of the field, statistics, checks and
//! listings. All are observers of a trace (see `reprise_trace::instructions`), so they take one from
//! a file or while it is made.
//!
//! This is a crate of its own because it decodes instructions, names files and starts threads, which
//! the devices, who depend on `reprise-trace`, must not see.

pub mod background;
pub mod bbv;
pub mod champsim;
pub mod check;
pub mod csv;
pub mod dinero;
pub mod disassembly;
pub mod drmemtrace;
pub mod dump;
pub mod formats;
pub mod gem5;
pub mod instruction;
pub mod kind;
pub mod output;
pub mod page;
pub mod parquet;
pub mod perf_script;
pub mod stats;
pub mod symbols;

pub use formats::{
    Destination, Export, ExportError, ExportOptions, Exported, FORMATS, Format, SETTINGS,
    foreign_setting,
};
