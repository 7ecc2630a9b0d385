//! Programs of peers: unpacked beside the build by `cargo xtask bench`, or the
//! machine's own.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use bg_tests::lab::beside_the_build;

/// A program of a peer.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
    /// Where its libraries and modules are.
    root: PathBuf,
}

/// Whether the peers' programs are there: better before all else than behind it.
pub fn check() -> Result<()> {
    ["nft", "haproxy", "nginx"]
        .into_iter()
        .try_for_each(|name| Tool::find(name).map(drop))
}

impl Tool {
    /// Finds it by its name.
    pub fn find(name: &str) -> Result<Self> {
        let root = std::path::absolute(beside_the_build("peers")?)?;
        let unpacked = root.join("usr/sbin").join(name);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(unpacked)
            .chain(std::env::split_paths(&path).map(|directory| directory.join(name)))
            .find(|file| file.is_file())
            .with_context(|| format!("there is no {name}; `cargo xtask bench` fetches it"))?;
        Ok(Self { path, root })
    }

    /// The program's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells a command where the program's libraries are.
    pub fn prepare(&self, command: &mut Command) {
        command.env(
            "LD_LIBRARY_PATH",
            self.root
                .join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH)),
        );
    }

    /// A file that came with the programs, or the machine's own.
    pub fn file(&self, path: &str) -> PathBuf {
        let unpacked = self.root.join(path);
        if unpacked.exists() {
            unpacked
        } else {
            Path::new("/").join(path)
        }
    }
}
