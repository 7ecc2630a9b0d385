//! Kernels out of Debian's packages, by the mirror that this machine's apt uses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::command::{self, capture};

/// The package that names the newest kernel of a release.
const NEWEST: &str = "linux-image-cloud-amd64";
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel's files.
pub struct Files {
    /// What boots.
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// Finds the kernel of a release below `directory`, or fetches it there.
pub fn get(suite: &str, directory: &Path) -> Result<Files> {
    let root = directory.join("root");
    if let Ok(files) = Files::below(&root) {
        return Ok(files);
    }
    eprintln!("kernels: fetching the one of {suite}");
    let apt = Apt::new(suite, &directory.join("apt"))?;
    apt.run(&["update", "-q"])?;
    let mut packages = apt.parts(NEWEST)?;
    // Where an image is in parts, it depends on them.
    for image in packages.clone() {
        packages.extend(apt.parts(&image)?);
    }
    if packages.is_empty() {
        bail!("{suite} has no package {NEWEST}");
    }
    apt.download(&packages)?;
    // Whole or not at all: what is there is not fetched again.
    let unpacked = directory.join("unpacked");
    let _ = fs::remove_dir_all(&unpacked);
    for package in apt.downloaded()? {
        command::run(Command::new("dpkg").arg("-x").args([&package, &unpacked]))?;
    }
    Files::below(&unpacked)?;
    let _ = fs::remove_dir_all(&root);
    fs::rename(&unpacked, &root)?;
    fs::remove_dir_all(directory.join("apt"))?;
    Files::below(&root)
}

impl Files {
    fn below(root: &Path) -> Result<Self> {
        let modules = [root.join("usr/lib/modules"), root.join("lib/modules")];
        let modules = modules
            .iter()
            .find_map(|directory| only(directory, "").ok())
            .with_context(|| format!("no modules below {}", root.display()))?;
        // Beside its modules, in newer packages.
        let image = only(&modules, "vmlinuz").or_else(|_| only(&root.join("boot"), "vmlinuz-"))?;
        Ok(Self { image, modules })
    }
}

/// The one entry of a directory that begins with `prefix`.
fn only(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    let read =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in read {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => bail!("{}: {} of {prefix}*", directory.display(), found.len()),
    }
}

/// An apt of one release, with directories of its own: the machine's is not touched.
struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn new(suite: &str, directory: &Path) -> Result<Self> {
        let _ = fs::remove_dir_all(directory);
        for part in ["lists/partial", "archives/partial", "packages"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let directory = directory.canonicalize()?;
        let at = |part: &str| directory.join(part).display().to_string();
        let mirror = mirror()?;
        let source = format!("deb [arch=amd64 signed-by={KEYS}] {mirror} {suite} main\n");
        fs::write(directory.join("sources"), source)?;
        fs::write(directory.join("status"), "")?;
        let options = [
            ("Dir::Etc::SourceList", at("sources")),
            ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("")),
            ("Acquire::Languages", "none".to_owned()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".to_owned(),
            ),
            // Not as a user who may not write here.
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        let options = options
            .iter()
            .map(|(key, value)| format!("-o{key}={value}"));
        Ok(Self {
            options: options.collect(),
            directory,
        })
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.current_dir(self.directory.join("packages"))
            .args(&self.options)
            .args(arguments);
        command::run(&mut apt)
    }

    /// The packages that a package depends on and that hold a kernel.
    fn parts(&self, package: &str) -> Result<Vec<String>> {
        let arguments = self.options.iter().map(String::as_str);
        let arguments: Vec<_> = arguments.chain(["depends", package]).collect();
        let text = capture("apt-cache", &arguments)
            .with_context(|| format!("apt-cache does not know {package}"))?;
        let parts = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let is_part = |name: &&str| {
            let kinds = ["linux-image-", "linux-binary-", "linux-modules-"];
            name.ends_with("-cloud-amd64") && kinds.iter().any(|kind| name.starts_with(kind))
        };
        Ok(parts.filter(is_part).map(ToOwned::to_owned).collect())
    }

    fn download(&self, packages: &[String]) -> Result<()> {
        let packages = packages.iter().map(String::as_str);
        self.run(
            &["download", "-q"]
                .into_iter()
                .chain(packages)
                .collect::<Vec<_>>(),
        )
    }

    fn downloaded(&self) -> Result<Vec<PathBuf>> {
        fs::read_dir(self.directory.join("packages"))?
            .map(|entry| Ok(entry?.path()))
            .collect()
    }
}

/// Where this machine gets Debian from.
fn mirror() -> Result<String> {
    let arguments = [
        "indextargets",
        "--format",
        "$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ];
    let find = || {
        let targets = capture("apt-get", &arguments)?;
        let mirror = targets
            .lines()
            .find_map(|line| line.strip_prefix("Debian Debian main "));
        mirror.map(ToOwned::to_owned)
    };
    if let Some(mirror) = find() {
        return Ok(mirror);
    }
    // Who a source is from is known once its list was read.
    command::run(Command::new("apt-get").args(["update", "-q"]))?;
    find().context("apt's sources here name no mirror of Debian: kernels come from its packages")
}
