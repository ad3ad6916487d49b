//! Files have their name only when they are whole, and observers work on threads of their own.

use std::fs;
use std::io::{self, Write};

use reprise_export::background::Background;
use reprise_export::csv::Csv;
use reprise_export::dinero::Dinero;
use reprise_export::output::PendingFile;
use reprise_trace::instructions::{Batch, Contents, TraceError};

use crate::account::show;
use crate::synthetic::{Options, Synthetic};

#[test]
fn a_file_has_its_name_only_when_it_is_whole() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("trace");
    fs::write(&path, "before").expect("can be written");
    let count = || fs::read_dir(directory.path()).expect("can be read").count();
    let mut file = PendingFile::create(&path).expect("can be made");
    file.write_all(b"half").expect("can be written");
    assert!(file.temporary().exists());
    assert_eq!(fs::read(&path).expect("is still there"), b"before");
    drop(file);
    assert_eq!(count(), 1, "what is not finished goes");
    assert_eq!(fs::read(&path).expect("is still there"), b"before");
    let mut file = PendingFile::create(&path).expect("can be made");
    file.write_all(b"whole").expect("can be written");
    file.finish().expect("can be finished");
    assert_eq!(fs::read(&path).expect("is there"), b"whole");
    assert_eq!(count(), 1);
    let mut file = PendingFile::create(&path).expect("can be made");
    file.write_all(b"late").expect("can be written");
    let refused = file.finish_new().expect_err("somebody else's file");
    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!((count(), &fs::read(&path).expect("is there")[..]), (1, &b"whole"[..]));
    fs::remove_file(&path).expect("can be removed");
    let mut file = PendingFile::create(&path).expect("can be made");
    file.write_all(b"new").expect("can be written");
    file.finish_new().expect("nobody else's");
    assert_eq!((count(), &fs::read(&path).expect("is there")[..]), (1, &b"new"[..]));
    assert!(PendingFile::create(directory.path()).is_err(), "a directory");
    assert!(PendingFile::create(&path.join("below")).is_err(), "below a file");
}

#[test]
fn an_observer_on_another_thread_sees_the_same() {
    let mut here = Dinero::new(Vec::new());
    show(Options::new(1), 20_000, &mut here);
    let mut machine = Synthetic::new(Options::new(1));
    let mut there =
        Background::start(Contents::default(), Dinero::new(Vec::new())).expect("starts");
    let mut batch = Batch::default();
    while machine.instructions < 20_000 {
        std::mem::swap(&mut batch, &mut machine.batch);
        batch = machine.advance(1_000);
        assert!(there.exchange(&mut batch));
        assert!(batch.is_empty(), "an empty one comes back");
    }
    let (there, ended) = there.finish().expect("ends");
    ended.expect("has seen all");
    assert!(there.into_inner() == here.into_inner());
}

/// Takes nothing.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_comes_back_from_the_other_thread() {
    let mut machine = Synthetic::new(Options::new(2));
    let mut there = Background::start(Contents::default(), Csv::new(Full)).expect("starts");
    let mut refused = false;
    for _ in 0..20 {
        let mut batch = machine.advance(500);
        refused |= !there.exchange(&mut batch);
    }
    assert!(refused, "a producer is told");
    let (_, ended) = there.finish().expect("ends");
    assert!(matches!(ended, Err(TraceError::Write(_))), "{ended:?}");
}
