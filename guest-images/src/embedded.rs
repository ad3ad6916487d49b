//! The bare-metal guests, embedded. Their sources are in `bare-metal/`; `build.rs` builds them.

/// A guest that is part of the binary.
#[derive(Debug)]
pub struct EmbeddedGuest {
    /// What `--image` calls it.
    pub name: &'static str,
    /// One line for a person: what it does and which words its command line takes.
    pub description: &'static str,
    /// An ELF executable: 64-bit with a PVH entry note, or 32-bit with a multiboot 1 header. It
    /// needs 16 MiB of RAM.
    pub image: &'static [u8],
    /// The command line where the user gives none.
    pub default_command_line: &'static str,
}

/// One row: the image is the file of the same name that `build.rs` made.
macro_rules! guest {
    ($name:literal, $default_command_line:literal, $description:literal) => {
        EmbeddedGuest {
            name: $name,
            description: $description,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".elf")),
            default_command_line: $default_command_line,
        }
    };
}

/// All of them.
pub static EMBEDDED: &[EmbeddedGuest] = &[
    guest!("hello", "", "prints one line (PVH entry; also carries a multiboot 1 header)"),
    guest!("hello32", "", "prints one line, in 32-bit protected mode (multiboot 1 only)"),
    guest!(
        "ticks",
        "hz=2000 count=40 poll=100",
        "hashes where count= timer interrupts at hz= land in a loop, with a port write every poll= \
         rounds"
    ),
    guest!(
        "echo",
        "",
        "echoes what is typed and hashes it, and where its interrupts landed; a line \"quit\" ends it"
    ),
    guest!("misbehave", "", "does do=NAME, to test the machine; without one it lists the names"),
];

/// The embedded guest of this name.
pub fn embedded(name: &str) -> Option<&'static EmbeddedGuest> {
    EMBEDDED.iter().find(|guest| guest.name == name)
}
