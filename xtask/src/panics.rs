//! The eBPF objects must not contain a panic: the verifier would refuse them at
//! load, with a message that names no source line.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SectionKind};

use crate::command;

/// `goto -1`: what is left of `loop {}`, the body of the panic handler, where
/// it was inlined.
const JUMP_TO_SELF: [u8; 8] = [0x05, 0, 0xff, 0xff, 0, 0, 0, 0];

/// The objects that bg-userspace's build script makes.
const OBJECTS: [&str; 2] = ["bgswitch-ebpf", "bgswitch-bench-ebpf"];

/// Fails if an object of the release build can reach a panic.
pub fn check() -> Result<()> {
    let directory = built_objects()?;
    for name in OBJECTS {
        let path = directory.join(name);
        let data = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let found = panics(&data).with_context(|| format!("reading {}", path.display()))?;
        if !found.is_empty() {
            bail!(
                "{} can panic, the kernel would not load it: {}",
                path.display(),
                found.join(", ")
            );
        }
        eprintln!("no reachable panic in {}", path.display());
    }
    Ok(())
}

/// The signs of a panic: symbols of core's panic machinery, endless loops.
fn panics(data: &[u8]) -> Result<Vec<String>> {
    let object = object::File::parse(data)?;
    let mut found: Vec<String> = object
        .symbols()
        .filter_map(|symbol| symbol.name().ok())
        .filter(|name| name.contains("panic") || name.contains("unwind"))
        .map(ToOwned::to_owned)
        .collect();
    let mut sections = 0;
    for section in object.sections().filter(|s| s.kind() == SectionKind::Text) {
        sections += 1;
        let code = section.data()?;
        if code.as_chunks().0.contains(&JUMP_TO_SELF) {
            found.push(format!("an endless loop in section {}", section.name()?));
        }
    }
    if sections == 0 {
        bail!("no program in the object");
    }
    Ok(found)
}

/// The output directory of bg-userspace's build script, as cargo itself names it.
fn built_objects() -> Result<PathBuf> {
    // To check is enough: it runs build scripts, too.
    let mut build = command::cargo();
    build.args([
        "check",
        "--release",
        "--message-format=json-render-diagnostics",
    ]);
    eprintln!("$ {}", command::line(&build));
    let mut child = build.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("cargo check has no stdout")?;
    let mut directory = None;
    for line in BufReader::new(output).lines() {
        let message: serde_json::Value = serde_json::from_str(&line?)?;
        if message["reason"] == "build-script-executed"
            && message["package_id"]
                .as_str()
                .is_some_and(|id| id.contains("bg-userspace"))
        {
            directory = message["out_dir"].as_str().map(ToOwned::to_owned);
        }
    }
    command::check(&build, child.wait()?)?;
    let directory =
        directory.context("cargo did not name the output of bg-userspace's build script")?;
    Ok(PathBuf::from(directory))
}
