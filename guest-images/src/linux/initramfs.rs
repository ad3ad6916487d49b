//! The initramfs: a cpio archive in the kernel's "newc" form (its documentation of early user space
//! has it), written here so that the same busybox always gives the same bytes: entries in order of
//! name, no times, no owners.

use std::collections::BTreeMap;

/// What `init` does: mounts, links for all that busybox can be called, then a shell with job
/// control on the console. When the shell ends, the machine is powered off.
const INIT: &str = "\
#!/bin/busybox sh
export PATH=/bin HOME=/ TERM=linux
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
hostname guest
setsid -c sh < /dev/ttyS0 > /dev/ttyS0 2>&1
sync
poweroff -f
";

const DIRECTORIES: &[&str] = &["bin", "dev", "etc", "proc", "root", "sys", "tmp"];

/// (name, major, minor): the kernel opens the console before `init` can mount /dev.
const DEVICES: &[(&str, u32, u32)] = &[("dev/console", 5, 1), ("dev/null", 1, 3)];

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;

/// One file of the archive.
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Entry {
    fn new(mode: u32, content: &[u8]) -> Self {
        Self { mode, device: (0, 0), content: content.to_vec() }
    }
}

/// The archive, uncompressed: unpacking it costs the guest less so.
pub(super) fn build(busybox: &[u8]) -> Vec<u8> {
    let mut entries = BTreeMap::new();
    for directory in DIRECTORIES {
        entries.insert((*directory).to_owned(), Entry::new(TYPE_DIRECTORY | 0o755, b""));
    }
    for (name, major, minor) in DEVICES {
        let mode = TYPE_CHARACTER_DEVICE | 0o600;
        let entry = Entry { mode, device: (*major, *minor), content: Vec::new() };
        entries.insert((*name).to_owned(), entry);
    }
    entries.insert("bin/busybox".to_owned(), Entry::new(TYPE_FILE | 0o755, busybox));
    entries.insert("init".to_owned(), Entry::new(TYPE_FILE | 0o755, INIT.as_bytes()));
    archive(&entries)
}

fn archive(entries: &BTreeMap<String, Entry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (inode, (name, entry)) in (1..).zip(entries) {
        append(&mut bytes, inode, name, entry);
    }
    append(&mut bytes, 0, "TRAILER!!!", &Entry::new(0, b""));
    bytes
}

fn append(bytes: &mut Vec<u8>, inode: u32, name: &str, entry: &Entry) {
    let links = if entry.mode & TYPE_DIRECTORY != 0 { 2 } else { 1 };
    let content_bytes =
        u32::try_from(entry.content.len()).expect("a file of an initramfs is small");
    let name_bytes = u32::try_from(name.len() + 1).expect("a name is short");
    let fields = [
        inode,
        entry.mode,
        0, // user
        0, // group
        links,
        0, // time of modification
        content_bytes,
        0, // device of the file system, major and minor
        0,
        entry.device.0,
        entry.device.1,
        name_bytes,
        0, // check: none in this form
    ];
    bytes.extend_from_slice(b"070701");
    for field in fields {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(&entry.content);
    pad(bytes);
}

/// To the next multiple of four.
fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (name, mode, content).
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut files = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |at: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).expect("ASCII");
                u32::from_str_radix(digits, 16).expect("hexadecimal")
            };
            let name_end = 110 + field(11) as usize;
            let name = String::from_utf8(bytes[110..name_end - 1].to_vec()).expect("UTF-8");
            let start = name_end.next_multiple_of(4);
            let end = start + field(6) as usize;
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), end.next_multiple_of(4));
                return files;
            }
            files.push((name, field(1), bytes[start..end].to_vec()));
            bytes = &bytes[end.next_multiple_of(4)..];
        }
    }

    #[test]
    fn it_holds_init_and_busybox() {
        let files = read(&build(b"program"));
        let find = |name: &str| {
            let (_, mode, content) = files.iter().find(|file| file.0 == name).expect("it is there");
            (*mode, content.as_slice())
        };
        assert_eq!(find("bin/busybox"), (0o100_755, b"program".as_slice()));
        assert_eq!(find("init"), (0o100_755, INIT.as_bytes()));
        assert_eq!(find("dev/console").0, 0o020_600);
        assert_eq!(find("proc").0, 0o040_755);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let files = read(&build(b""));
        for (at, (name, ..)) in files.iter().enumerate() {
            if let Some((directory, _)) = name.rsplit_once('/') {
                assert!(files[..at].iter().any(|file| file.0 == directory), "{name}");
            }
        }
    }
}
