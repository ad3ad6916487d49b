//! `reprise doctor`.

use anyhow::{Result, bail};

use crate::output::Output;

/// To come.
///
/// # Errors
/// Always.
pub fn run(_output: Output) -> Result<u8> {
    bail!("doctor is not built yet")
}
