//! Exports against independent accounts of the same synthetic trace.

#[path = "../../../tests/instructions/synthetic/mod.rs"]
#[allow(dead_code)]
mod synthetic;

mod account;
mod analysis;
mod bbv;
mod champsim;
mod drmemtrace;
mod files;
mod formats;
mod gem5;
mod parquet;
mod text;
