//! `cargo xtask test`.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};

use crate::{command, setup};

/// Sets up, builds, runs every test of the workspace, and ends with the sums.
///
/// Everything is built in the release profile: the scenarios run
/// `target/release/bgswitch`, so there is one build. Tests run one at a time:
/// many share the kernel.
pub fn run(arguments: &[OsString]) -> Result<()> {
    setup::run()?;
    if !command::is_root() {
        bail!(
            "the tests load BPF programs and make network namespaces; run: \
             sudo env \"PATH=$PATH\" cargo xtask test"
        );
    }
    command::build_all()?;

    let mut tests = command::cargo();
    tests
        .args(["test", "--release", "--workspace", "--no-fail-fast", "--"])
        .arg("--test-threads=1")
        .args(arguments);
    eprintln!("$ {}", command::line(&tests));
    let mut child = tests
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cargo test")?;
    let output = child.stdout.take().context("cargo test has no stdout")?;
    let mut sums = Sums::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        sums.add(&line);
    }
    let status = child.wait()?;

    for failure in &sums.failures {
        println!("failed: {failure}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        sums.passed, sums.failed, sums.ignored
    );
    command::check(&tests, status)?;
    if sums.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// The sums over all test binaries.
#[derive(Default)]
struct Sums {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
}

impl Sums {
    /// Counts a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; ...`
    /// and keeps the name in `test some::name ... FAILED`.
    fn add(&mut self, line: &str) {
        if let Some(test) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(test.to_owned());
        }
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else {
                continue;
            };
            let number = number.parse().unwrap_or(0);
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Sums;

    #[test]
    fn sums_are_over_all_binaries() {
        let mut sums = Sums::default();
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s",
        ] {
            sums.add(line);
        }
        assert_eq!((sums.passed, sums.failed, sums.ignored), (8, 1, 1));
        assert_eq!(sums.failures, ["a::c"]);
    }
}
