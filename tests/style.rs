//! The house style, as far as a test can hold it: where unsafe code may stand, how long a file may
//! be, what a name may not be, and what a published tree must not contain.

use std::fs;
use std::path::{Path, PathBuf};

/// Files outside `vmm/kvm` in which unsafe code is allowed, each with its reason.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("expand/cpu/src/counting.rs", "calls the handler of the branch that it counts"),
    ("expand/cpu/src/execute.rs", "calls native sequences"),
    ("expand/cpu/src/decode/block_cache.rs", "hands out pointers to the blocks it owns"),
    ("expand/cpu/src/memory/access.rs", "reads and writes guest RAM by host pointer"),
    ("expand/cpu/src/memory/low_memory.rs", "maps memory that generated code names"),
    ("expand/cpu/src/memory/tlb.rs", "says that its entries may hold any bytes"),
    ("expand/cpu/src/memory/physical.rs", "reads and writes guest RAM by host pointer"),
    ("expand/cpu/src/native/code_buffer.rs", "maps executable memory"),
    ("expand/cpu/src/native/host_fpu.rs", "exchanges the host's FPU state"),
    ("expand/cpu/src/native/operand.rs", "calls native sequences"),
    ("expand/cpu/src/native/trapping.rs", "leaves native sequences on SIGFPE"),
    ("expand/cpu/src/native/direct.rs", "tests: runs single instructions on the host"),
    ("expand/cpu/src/tracing/mod.rs", "takes back vectors that generated code filled"),
    ("expand/cpu/src/translate/mod.rs", "runs translated code and keeps pointers to it"),
    ("expand/cpu/src/translate/site.rs", "runs operations for translated code"),
    ("expand/cpu/src/translate/jump_cache.rs", "says that its entries may hold any bytes"),
    ("expand/cpu/src/other_maker.rs", "calls the handler whose flags it changes"),
    ("expand/cpu/src/ops/testing.rs", "tests: calls handlers as the block loop does"),
    ("expand/cpu/src/ops/string.rs", "copies runs of guest RAM at the host's speed"),
    ("expand/cpu/src/system/segment.rs", "calls the handler behind a segment check"),
    ("vmm/host/src/terminal.rs", "terminal modes and signals"),
];
/// Lines of a file, tables and tests apart.
const MAX_LINES: usize = 650;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").into()
}

/// Every file below `folder` that git would track, with its path from the root.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("folder can be read") {
        let path = entry.expect("entry can be read").path();
        let name = path.file_name().expect("entry has a name").to_string_lossy().into_owned();
        if name == "target" || name == ".git" {
            continue;
        }
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned()
}

/// A file without the tests that stand at its end. A test module in a file of its own is declared wherever
/// modules are, and is no end.
fn shipped(text: &str) -> &str {
    let stands_here = |at: &usize| {
        let mut lines = text[*at..].lines().skip_while(|line| line.starts_with("#["));
        lines.next().is_some_and(|line| line.ends_with("mod tests {"))
    };
    let end = text.match_indices("#[cfg(test)]\n").map(|(at, _)| at).find(stands_here);
    &text[..end.unwrap_or(text.len())]
}

fn rust_files() -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&root(), &mut found);
    let rust = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    let mut texts: Vec<_> = found
        .into_iter()
        .filter(rust)
        .map(|path| (relative(&path), fs::read_to_string(&path).expect("source is text")))
        .collect();
    texts.sort();
    assert!(texts.len() > 50, "the walk found the sources");
    texts
}

#[test]
fn unsafe_code_stands_only_where_the_design_allows_it() {
    for (path, text) in rust_files() {
        let allows = text.contains("allow(unsafe_code)");
        let listed = UNSAFE_FILES.iter().any(|(file, _)| *file == path);
        let in_kvm = path.starts_with("vmm/kvm/");
        let is_test = path.contains("/tests/") || path.starts_with("tests/");
        assert!(!allows || listed || in_kvm || is_test, "{path} allows unsafe code");
    }
    for (file, reason) in UNSAFE_FILES {
        let text = fs::read_to_string(root().join(file)).unwrap_or_default();
        let needed = text.contains("allow(unsafe_code)");
        assert!(needed, "{file} ({reason}) has no unsafe code: take it off the list");
    }
}

#[test]
fn a_file_tells_one_story() {
    for (path, text) in rust_files() {
        let lines = shipped(&text).lines().count();
        assert!(lines <= MAX_LINES, "{path} has {lines} lines before its tests");
        assert!(text.starts_with("//!") || path.ends_with("build.rs"), "{path} says what it is");
    }
}

#[test]
fn names_say_what_is_inside() {
    let vague = ["util", "utils", "helper", "helpers", "manager", "misc", "common"];
    let mut found = Vec::new();
    files(&root(), &mut found);
    for path in found {
        let path = relative(&path);
        for part in path.split(['/', '.', '_', '-']) {
            assert!(!vague.contains(&part), "{path} has a name that says nothing: {part}");
        }
    }
}

#[test]
fn versions_are_declared_once() {
    let mut found = Vec::new();
    files(&root(), &mut found);
    for path in found.iter().filter(|path| path.ends_with("Cargo.toml")) {
        let text = fs::read_to_string(path).expect("manifest is text");
        if text.contains("[workspace]") {
            continue;
        }
        assert!(text.contains("[lints]\nworkspace = true"), "{} takes the lints", relative(path));
        let dependencies = text.split("dependencies]").skip(1);
        for line in dependencies
            .flat_map(|section| section.lines().skip(1).take_while(|line| !line.starts_with('[')))
        {
            let declared = line.contains("workspace = true") || line.trim().is_empty();
            assert!(declared, "{}: `{line}` declares its own version", relative(path));
        }
    }
}

#[test]
fn devices_cannot_name_the_host() {
    let text = fs::read_to_string(root().join("devices/src/lib.rs")).expect("devices exist");
    assert!(text.contains("#![no_std]") && text.contains("#![forbid(unsafe_code)]"));
    for (path, text) in rust_files().iter().filter(|(path, _)| path.starts_with("devices/src")) {
        for name in ["std::", "HashMap", "HashSet", "f32", "f64"] {
            let uses = shipped(text)
                .lines()
                .any(|line| line.contains(name) && !line.trim_start().starts_with("//"));
            assert!(!uses, "{path} names {name}");
        }
    }
}
