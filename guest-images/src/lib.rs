//! The guests that Reprise brings along: small bare-metal ones, built from source and embedded in
//! the binary, and the recipe of the stock-Debian Linux image.

mod embedded;

pub use embedded::{COMPUTE_AT_SCALE_1, EMBEDDED, EmbeddedGuest, embedded};
