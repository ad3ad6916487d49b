//! `reprise demo`.

use anyhow::{Result, bail};

use crate::output::Output;

/// To come.
///
/// # Errors
/// Always.
pub fn run(_output: Output) -> Result<u8> {
    bail!("demo is not built yet")
}
