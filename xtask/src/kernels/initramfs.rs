//! The machine's file system: the guest, `bgswitch`, what they run, what all of it
//! is linked with, and the modules. A cpio archive in the "new" format (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::modules;
use crate::{
    command::{self, capture},
    toolchain,
};

/// What the checks run, with the scenario tests' helpers.
const PROGRAMS: [&str; 4] = ["ip", "ethtool", "sysctl", "mount"];

/// The archive, with the modules below this directory.
pub fn build(directory: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for (name, place) in [("bgswitch-guest", "init"), ("bgswitch", "bgswitch")] {
        let program = stripped(name)?;
        archive.file(place, &fs::read(&program)?);
        archive.libraries(&program)?;
    }
    for name in PROGRAMS {
        let program = toolchain::program(name).with_context(|| format!("{name} is not here"))?;
        archive.file(&format!("bin/{name}"), &fs::read(&program)?);
        archive.libraries(&program)?;
    }
    let mut order = String::new();
    for module in modules::ordered(directory)? {
        archive.file(&format!("modules/{}", module.name), &module.data);
        order += &module.name;
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.end())
}

/// A program of the release build without what only debuggers read.
fn stripped(name: &str) -> Result<PathBuf> {
    let built = command::target().join("release").join(name);
    let stripped = command::target().join("kernels").join(name);
    command::run(Command::new("strip").arg("-o").args([&stripped, &built]))?;
    Ok(stripped)
}

/// An archive under construction.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    places: BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

impl Archive {
    /// The libraries that a program is linked with, and the loader, where it looks
    /// for them.
    fn libraries(&mut self, program: &Path) -> Result<()> {
        let text =
            capture("ldd", &[program]).with_context(|| format!("ldd {}", program.display()))?;
        let paths = text.lines().flat_map(str::split_whitespace);
        for path in paths.filter(|word| word.starts_with('/')) {
            let data = fs::read(path).with_context(|| format!("reading {path}"))?;
            self.file(path.trim_start_matches('/'), &data);
        }
        Ok(())
    }

    /// Adds a file, and the directories above it, unless it is there.
    fn file(&mut self, place: &str, data: &[u8]) {
        for (at, _) in place.match_indices('/') {
            self.entry(&place[..at], DIRECTORY, &[]);
        }
        self.entry(place, FILE, data);
    }

    fn entry(&mut self, place: &str, mode: u32, data: &[u8]) {
        if self.places.insert(place.to_owned()) {
            self.write(place, mode, data);
        }
    }

    /// A header of fourteen numbers in eight hexadecimal digits, the name, the data;
    /// each padded to four bytes.
    fn write(&mut self, place: &str, mode: u32, data: &[u8]) {
        let number = self.places.len() as u32;
        let (size, name) = (data.len() as u32, place.len() as u32 + 1);
        let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(place.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.write("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn a_file_lies_behind_its_directories_at_multiples_of_four() {
        let mut archive = Archive::default();
        archive.file("a/b/c", b"12345");
        archive.file("a/b/c", b"other");
        let bytes = archive.end();
        let heads: Vec<_> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, window)| window == b"070701")
            .map(|(at, _)| at)
            .collect();
        assert_eq!(heads.len(), 4, "two directories, the file, the end");
        assert!(heads.iter().all(|at| at % 4 == 0));
        let file = &bytes[heads[2]..];
        assert_eq!(&file[54..62], b"00000005", "its size");
        assert_eq!(&file[110..116], b"a/b/c\0");
        assert_eq!(&file[116..121], b"12345");
    }
}
