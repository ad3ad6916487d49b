//! What two CPU states differ in, for a person.

use reprise_trace::cpu_state::CpuState;

/// The fields that differ, a line each: where, and both values. Empty if there are none.
pub(crate) fn differences(translated: &CpuState, interpreted: &CpuState) -> String {
    let (one, other) = (format!("{translated:#x?}"), format!("{interpreted:#x?}"));
    let mut parents: Vec<(usize, &str)> = Vec::new();
    let mut found = String::new();
    // Both are printed alike, as many lines each: no field is of variable length.
    for (index, (line, other_line)) in one.lines().zip(other.lines()).enumerate() {
        let depth = line.len() - line.trim_start().len();
        parents.retain(|&(parent, ..)| parent < depth);
        if line != other_line {
            let within: Vec<&str> = parents.iter().skip(1).map(|&(_, name)| name).collect();
            let element = element_number(&one, index);
            let (here, there) = (line.trim(), other_line.trim());
            found += &format!("  {}{element} {here} and {there}\n", within.join(" "));
        }
        if line.ends_with(['[', '{', '(']) {
            parents.push((depth, line.trim().trim_end_matches(['[', '{', '('])));
        }
    }
    found
}

/// Which element of its array a line is, in brackets; nothing for a named field.
fn element_number(text: &str, line: usize) -> String {
    let lines: Vec<&str> = text.lines().take(line + 1).collect();
    if lines[line].contains(':') {
        return String::new();
    }
    let before = lines[..line].iter().rev().take_while(|before| !before.ends_with('['));
    format!("[{}]", before.count())
}

#[test]
fn differences_name_the_fields() {
    let mut changed = CpuState::default();
    assert_eq!(differences(&CpuState::default(), &changed), "");
    changed.gpr[3] = 0x17;
    changed.fpu.xmm[9] = 1;
    changed.rip += 1;
    let shown = differences(&changed, &CpuState::default());
    for part in ["gpr: [3] 0x17, and 0x0,", "xmm: [9] 0x1, and 0x0,", " rip: 0x"] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    assert_eq!(shown.lines().count(), 3, "{shown}");
}
