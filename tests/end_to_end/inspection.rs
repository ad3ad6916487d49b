//! `info`, `diff`, `images` and `doctor`.

use serde_json::Value;

use crate::program::{Workplace, record, run};

#[test]
fn info_gives_what_checks_read() {
    let workplace = Workplace::new();
    let file = workplace.path("ticks.rr");
    let recorded = record(&["--engine", "soft", "--image", "ticks"], &file, 0);
    let info = run(&["--json", "info", &file]).expect_code(0).json();
    let same = [
        "guest",
        "engine",
        "clock",
        "instructions",
        "ticks",
        "events",
        "log_bytes",
        "image_bytes",
        "file_bytes",
        "bytes_per_kiloinstruction",
        "ending",
        "console_bytes",
        "console_digest",
        "final_digest",
    ];
    for field in same {
        assert!(!info[field].is_null(), "info has no {field}: {info:#}");
        assert_eq!(info[field], recorded[field], "{field}");
    }
    assert_eq!((&info["complete"], &info["damage"]), (&true.into(), &Value::Null));
    assert_eq!(info["images"][0]["role"], "kernel");
    let size = std::fs::metadata(&file).expect("the recording").len();
    assert_eq!(info["file_bytes"], size);
    let shown = String::from_utf8(run(&["info", &file]).expect_code(0).stdout).expect("text");
    for part in ["ticks", "soft", recorded["final_digest"].as_str().expect("a digest")] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[test]
fn a_session_reports_every_field_that_checks_read() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let recorded = record(&["--engine", "soft", "--image", "hello"], &file, 0);
    let replayed = run(&["--json", "replay", &file]).expect_code(0).json();
    let ran = run(&["--json", "run", "--image", "hello"]).expect_code(0).json();
    for report in [&recorded, &replayed, &ran] {
        for field in ["instructions", "ticks", "wall_seconds", "mips", "events"] {
            assert!(report[field].is_number(), "{field}: {report:#}");
        }
        for field in ["engine", "clock", "final_digest", "console_digest"] {
            assert!(report[field].is_string(), "{field}: {report:#}");
        }
    }
    for field in ["log_bytes", "bytes_per_kiloinstruction"] {
        assert!(recorded[field].is_number() && replayed[field].is_number(), "{field}");
    }
    for field in ["verified", "divergence"] {
        assert!(replayed.get(field).is_some(), "{field}");
    }
}

#[test]
fn diff_finds_where_two_recordings_part() {
    let workplace = Workplace::new();
    let mut files = Vec::new();
    for (name, typed) in [("a", "same\rone\rquit\r"), ("b", "same\rtwo\rquit\r")] {
        let input = workplace.file(&format!("{name}.input"), typed);
        let file = workplace.path(&format!("{name}.rr"));
        record(&["--engine", "soft", "--image", "echo", "--input", &input], &file, 0);
        files.push(file);
    }
    let copy = workplace.path("copy.rr");
    std::fs::copy(&files[0], &copy).expect("a copy");
    let same = run(&["--json", "diff", &files[0], &copy]).expect_code(0).json();
    assert_eq!((&same["same"], &same["same_log"]), (&true.into(), &true.into()), "{same:#}");
    assert!(same["first_difference"].is_null(), "{same:#}");
    let other = run(&["--json", "diff", &files[0], &files[1]]).expect_code(0).json();
    assert_eq!(other["same_log"], false, "{other:#}");
    let first = &other["first_difference"];
    assert!(first["moment_a"]["tick"].is_u64() && first["record"].is_u64(), "{other:#}");
    let text = run(&["diff", &files[0], &files[1]]).expect_code(0);
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains("record ") && text.contains("tick "), "{text}");
}

#[test]
fn diff_names_the_fields_of_the_header_that_differ() {
    let workplace = Workplace::new();
    let [a, b] = ["16", "32"].map(|memory_mib| {
        let file = workplace.path(memory_mib);
        record(&["--engine", "soft", "--image", "hello", "--memory", memory_mib], &file, 0);
        file
    });
    let report = run(&["--json", "diff", &a, &b]).expect_code(0).json();
    let header = report["header"].as_array().expect("a list");
    let memory = header.iter().find(|found| found["field"] == "machine.ram_mib");
    let memory = memory.unwrap_or_else(|| panic!("{report:#}"));
    assert_eq!((&memory["a"], &memory["b"]), (&"16".into(), &"32".into()));
    // Both were recorded here, by this program.
    let of_the_host =
        |found: &&Value| found["field"].as_str().is_some_and(|f| f.starts_with("host"));
    assert_eq!(header.iter().find(of_the_host), None);
}

#[test]
fn images_lists_every_guest() {
    let listed = run(&["--json", "images"]).expect_code(0).json();
    let names: Vec<&str> = listed["images"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|image| image["name"].as_str())
        .collect();
    for name in ["hello", "ticks", "compute", "echo", "misbehave", "linux"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
}

#[test]
fn doctor_tells_what_this_host_can_do_and_auto_does_it() {
    let report = run(&["--json", "doctor"]).expect_code(0).json();
    assert!(report["error"].is_null(), "{report:#}");
    let engines = report["engines"].as_array().expect("a list");
    let mut names: Vec<_> = engines.iter().map(|e| (&e["engine"], &e["clock"])).collect();
    names.sort_by_key(|(engine, clock)| (engine.to_string(), clock.to_string()));
    let expected = [("kvm", "pmu"), ("kvm", "step"), ("kvm", "sync"), ("soft", "instructions")];
    assert_eq!(names.len(), expected.len());
    for ((engine, clock), expected) in names.into_iter().zip(expected) {
        assert_eq!((engine.as_str(), clock.as_str()), (Some(expected.0), Some(expected.1)));
    }
    for engine in engines {
        assert!(engine["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{engine:#}");
        let tried = engine["trial"]["equal"].as_bool() == Some(true);
        assert_eq!(engine["available"].as_bool(), Some(tried), "{engine:#}");
    }
    let auto = run(&["--json", "run", "--image", "hello"]).expect_code(0).json();
    assert_eq!((&auto["engine"], &auto["clock"]), (&report["engine"], &report["clock"]));
    assert!(auto["engine_reason"].is_string(), "{auto:#}");
}

#[test]
fn doctor_says_what_would_give_more() {
    let report = run(&["--json", "doctor"]).expect_code(0).json();
    let advice = report["advice"].as_array().expect("a list");
    let lacking = report["engines"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|engine| engine["available"] == false && engine["remedy"].is_string());
    let text = run(&["doctor"]).expect_code(0);
    let text = String::from_utf8_lossy(&text.stdout);
    for engine in lacking {
        let options = engine["options"].as_str().expect("options");
        let advised = |advice: &serde_json::Value| {
            advice["gives"].as_str().is_some_and(|gives| gives.contains(options))
                && advice["what"] == engine["remedy"]
        };
        assert!(advice.iter().any(advised), "{options} is not in {advice:#?}");
        assert!(text.contains(&format!("no   {options}\n")), "{text}");
    }
    assert!(text.contains("yes  --engine soft\n") && text.contains("tried: "), "{text}");
    if let Some(source) = report["branch_counter"]["source"].as_str() {
        assert!(text.contains(&format!("from {source})")), "{text}");
    }
    for finding in report["findings"].as_array().expect("a list") {
        assert!(text.contains(finding["topic"].as_str().expect("a topic")), "{finding:#}");
    }
}
