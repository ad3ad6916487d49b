//! Builds the bare-metal guests with the host's C compiler, assembler and linker, so that they are
//! embedded in the binary. The same compiler gives the same bytes wherever the sources lie.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const SOURCES: &str = "bare-metal";

/// Freestanding code for the plainest x86: the guest's CPU model, not the host's.
const COMPILE_FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-ffp-contract=off",
];
const FLAGS_64: &[&str] = &["-m64", "-march=x86-64", "-mtune=generic", "-mno-red-zone"];
const FLAGS_32: &[&str] = &["-m32", "-march=i686", "-mtune=generic", "-mgeneral-regs-only"];
/// Kernel code leaves the floating-point and vector registers alone; user code need not.
const KERNEL_FLAGS: &[&str] = &["-mgeneral-regs-only"];
const LINK_FLAGS: &[&str] = &[
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
    "-Wl,-z,norelro",
];

/// One guest: what it is made of.
struct Guest {
    name: &'static str,
    bits: u32,
    /// A multiboot header beside the PVH note.
    multiboot: bool,
    kernel: &'static [&'static str],
    /// Sources that run at CPL3.
    user: &'static [&'static str],
}

/// What every 64-bit guest with interrupts is made of.
macro_rules! with_interrupts {
    ($($source:literal),+) => {
        &["start.S", "interrupts.S", "interrupts.c", "console.c", "command_line.c", $($source),+]
    };
}

const GUESTS: &[Guest] = &[
    Guest {
        name: "hello",
        bits: 64,
        multiboot: true,
        kernel: &["start.S", "console.c", "command_line.c", "hello.c"],
        user: &[],
    },
    Guest {
        name: "hello32",
        bits: 32,
        multiboot: true,
        kernel: &["hello32.S", "console.c", "hello32.c"],
        user: &[],
    },
    Guest {
        name: "ticks",
        bits: 64,
        multiboot: false,
        kernel: with_interrupts!["position_hash.c", "ticks_loop.S", "ticks.c"],
        user: &[],
    },
    Guest {
        name: "echo",
        bits: 64,
        multiboot: false,
        kernel: with_interrupts!["position_hash.c", "echo.c"],
        user: &[],
    },
    Guest {
        name: "positions",
        bits: 64,
        multiboot: false,
        kernel: with_interrupts!["position_hash.c", "positions_scenarios.S", "positions.c"],
        user: &[],
    },
    Guest {
        name: "misbehave",
        bits: 64,
        multiboot: false,
        kernel: with_interrupts!["misbehave.c"],
        user: &[],
    },
    Guest {
        name: "compute",
        bits: 64,
        multiboot: false,
        kernel: with_interrupts!["compute.c"],
        user: &[
            "user/program.c",
            "user/sha256.c",
            "user/sort.c",
            "user/matrix.c",
            "user/compression.c",
            "user/system_calls.c",
        ],
    },
];

fn main() {
    println!("cargo::rerun-if-changed={SOURCES}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiler = find_compiler();
    for guest in GUESTS {
        build(guest, &compiler, &out);
    }
}

/// The words of the compiler's command: `CC` if set, else the first of the usual names that runs.
fn find_compiler() -> Vec<String> {
    if let Ok(command) = env::var("CC") {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if !words.is_empty() {
            return words;
        }
    }
    for name in ["cc", "gcc", "clang"] {
        if Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
        {
            return vec![name.to_owned()];
        }
    }
    fail("no C compiler found: install gcc (on Debian: apt install gcc libc6-dev), or set CC")
}

fn build(guest: &Guest, compiler: &[String], out: &Path) {
    let directory = out.join(guest.name);
    std::fs::create_dir_all(&directory)
        .unwrap_or_else(|error| fail(&format!("cannot make {}: {error}", directory.display())));
    let mut objects = Vec::new();
    for (sources, extra) in [(guest.kernel, KERNEL_FLAGS), (guest.user, &[][..])] {
        for source in sources {
            // The user layout knows the program's objects by their names.
            let object = directory.join(format!("{}.o", source.replace(['/', '.'], "_")));
            let mut command = compile_command(guest, compiler);
            command.args(extra).arg("-c").arg(source).arg("-o").arg(&object);
            run(&mut command);
            objects.push(object);
        }
    }
    let script = match (guest.bits, guest.user.is_empty()) {
        (32, _) => "link32.ld",
        (_, true) => "link.ld",
        (_, false) => "link-user.ld",
    };
    let mut command = compile_command(guest, compiler);
    command.args(LINK_FLAGS).arg(format!("-Wl,-T,{script}"));
    command.args(&objects).arg("-o").arg(out.join(format!("{}.elf", guest.name)));
    run(&mut command);
}

/// The compiler with the flags that compiling and linking share. It runs inside the source
/// directory, so that no path of this machine gets into an image.
fn compile_command(guest: &Guest, compiler: &[String]) -> Command {
    let mut command = Command::new(&compiler[0]);
    command.args(&compiler[1..]).current_dir(SOURCES).args(COMPILE_FLAGS);
    command.args(if guest.bits == 64 { FLAGS_64 } else { FLAGS_32 });
    if guest.multiboot {
        command.arg("-DMULTIBOOT");
    }
    command
}

fn run(command: &mut Command) {
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => fail(&format!("cannot run the C compiler {command:?}: {error}")),
    };
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        fail(&format!("the C compiler failed on a bare-metal guest: {command:?}"));
    }
}

fn fail(reason: &str) -> ! {
    println!("cargo::error={reason}");
    exit(1)
}
