//! Console input for the Linux image: what the benchmarks and the demonstration type. Lines are
//! short because a terminal takes them; each script is shorter than the 4 KiB that a terminal holds
//! for a program that is not reading yet.

/// The benchmark: SHA-256 of 16 MiB, awk making 30,000 lines, gzip and gunzip, sort twice, a
/// 100,000-step shell loop, 60 forks of true and ls; then a reset.
pub const WORKLOAD_W: &str = "\
dd if=/dev/zero bs=1M count=16 2>/dev/null | sha256sum
awk 'BEGIN{for(i=0;i<30000;i++)print i*7919%30011,\"line\",i}' >/tmp/lines
gzip -c /tmp/lines >/tmp/packed; gunzip -c /tmp/packed | cmp - /tmp/lines && echo unpacked
sort /tmp/lines | sha256sum
sort -rn /tmp/lines | sha256sum
i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo counted $i
i=0; while [ $i -lt 60 ]; do /bin/true; /bin/ls / >/dev/null; i=$((i+1)); done; echo forked $i
reboot -f
";

/// A few seconds of the same kinds of work, some 100 to 200 million instructions beyond the boot;
/// then a reset.
pub const WORKLOAD_SMALL: &str = "\
uname -r
dd if=/dev/zero bs=64k count=8 2>/dev/null | sha256sum
awk 'BEGIN{for(i=0;i<1000;i++)print i*7919%30011,\"line\",i}' >/tmp/lines
gzip -c /tmp/lines >/tmp/packed; gunzip -c /tmp/packed | cmp - /tmp/lines && echo unpacked
sort /tmp/lines | sha256sum
i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo counted $i
i=0; while [ $i -lt 3 ]; do /bin/true; /bin/ls / >/dev/null; i=$((i+1)); done; echo forked $i
reboot -f
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_takes_them() {
        for script in [WORKLOAD_W, WORKLOAD_SMALL] {
            assert!(script.len() < 4096);
            assert!(script.lines().all(|line| line.len() < 200));
            assert!(script.ends_with("\nreboot -f\n"));
        }
    }
}
