//! The guests that Reprise brings along: small bare-metal ones, built from source and embedded in
//! the binary, and the recipe of the stock-Debian Linux image.

mod embedded;
mod linux;

pub use embedded::{COMPUTE_AT_SCALE_1, EMBEDDED, EmbeddedGuest, embedded};
pub use linux::{
    LINUX_COMMAND_LINE, LinuxFile, LinuxImage, LinuxVersions, RecipeError, WORKLOAD_SMALL,
    WORKLOAD_W, build_linux, linux,
};
