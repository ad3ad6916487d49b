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
         rounds; or, with sleep=, halts between them and prints a dot at every so many"
    ),
    guest!(
        "echo",
        "",
        "echoes and hashes what is typed, and where its interrupts landed; a line \"quit\" ends it"
    ),
    guest!(
        "compute",
        "scale=150",
        "SHA-256, sort, matrix product and compression at CPL3; scale= units of 20 million \
         instructions, 0 for 50 thousand; hz= interrupts; yields=0 without exits on the way"
    ),
    guest!(
        "positions",
        "hz=20000 count=40",
        "hashes where count= timer interrupts land, amid do=NAME: a REP that faults, interrupt shadows, \
         loops without branches...; without one it lists the names"
    ),
    guest!("misbehave", "", "does do=NAME, to test the machine; without one it lists the names"),
];

/// What `compute` prints with the command line `scale=1`. The same sources built for the host print
/// the same, and a test holds them to it.
pub const COMPUTE_AT_SCALE_1: &str = "\
    sha256: b042514fc5496b8b324a5e6bb29d7aeb2c85450e19ebd8cee3e1d3c315e6653c\r\n\
    sort: 99b0006254e64fa9\r\n\
    matrix: 860ff62830d8ef34\r\n\
    compression: 3624fa5476bba61f\r\n\
    compute: done\r\n";

/// The embedded guest of this name.
pub fn embedded(name: &str) -> Option<&'static EmbeddedGuest> {
    EMBEDDED.iter().find(|guest| guest.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PT_NOTE: u32 = 4;
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The entry that the PVH note of a 64-bit ELF gives.
    fn pvh_entry(image: &[u8]) -> Option<u32> {
        let headers = usize::try_from(u64_at(image, 32)).expect("a small file");
        let count = usize::from(image[56]);
        (0..count).map(|at| &image[headers + 56 * at..]).find_map(|header| {
            let note = &image[usize::try_from(u64_at(header, 8)).expect("a small file")..];
            let is_entry = u32_at(header, 0) == PT_NOTE
                && u32_at(note, 8) == XEN_ELFNOTE_PHYS32_ENTRY
                && &note[12..16] == b"Xen\0";
            is_entry.then(|| u32_at(note, 16))
        })
    }

    /// Whether the first 8 KiB hold a multiboot header whose checksum is right.
    fn has_multiboot_header(image: &[u8]) -> bool {
        let words: Vec<u32> =
            image[..8192.min(image.len())].chunks_exact(4).map(|word| u32_at(word, 0)).collect();
        words.windows(3).any(|words| {
            words[0] == MULTIBOOT_MAGIC
                && words[0].wrapping_add(words[1]).wrapping_add(words[2]) == 0
        })
    }

    #[test]
    fn each_image_carries_the_entries_that_it_says() {
        for guest in EMBEDDED {
            let is_32_bit = guest.name == "hello32";
            assert_eq!(&guest.image[..5], if is_32_bit { b"\x7fELF\x01" } else { b"\x7fELF\x02" });
            assert_eq!(has_multiboot_header(guest.image), guest.name.starts_with("hello"));
            if !is_32_bit {
                let entry = pvh_entry(guest.image);
                assert_eq!(entry.map(u64::from), Some(u64_at(guest.image, 24)), "{}", guest.name);
            }
        }
    }

    #[test]
    fn names_are_found_and_differ() {
        for guest in EMBEDDED {
            assert!(std::ptr::eq(embedded(guest.name).expect("it is listed"), guest));
        }
        assert!(embedded("linux").is_none());
    }
}
