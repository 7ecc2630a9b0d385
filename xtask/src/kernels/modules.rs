//! The kernel modules that the checks need, each after those that it needs itself.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSection as _};

/// What the checks need; what of it is built into a kernel is no module there.
const WANTED: [&str; 4] = ["virtio_pci", "virtio_net", "veth", "8021q"];

/// A module, as the kernel takes it.
pub struct Module {
    /// Its name.
    pub name: String,
    /// The object.
    pub data: Vec<u8>,
}

/// The wanted modules below `directory`, in the order in which they can be inserted.
pub fn ordered(directory: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(directory, &mut files)?;
    let mut modules = Vec::new();
    for name in WANTED {
        add(name, &files, &mut modules)?;
    }
    Ok(modules)
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, modules: &mut Vec<Module>) -> Result<()> {
    let Some(path) = files.get(name) else {
        return Ok(());
    };
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let data = read(path)?;
    for needed in depends(&data).with_context(|| format!("reading {}", path.display()))? {
        add(&needed, files, modules)?;
    }
    modules.push(Module {
        name: name.to_owned(),
        data,
    });
    Ok(())
}

/// Files by the module's name, in which `-` is `_`.
fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            find(&path, files)?;
        } else if let Some((name, _)) = path
            .file_name()
            .and_then(|name| name.to_str()?.split_once(".ko"))
        {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let unpacked = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context("running xz")?;
    ensure!(
        unpacked.status.success(),
        "xz does not unpack {}",
        path.display()
    );
    Ok(unpacked.stdout)
}

/// The names in the field `depends` of a module's information.
fn depends(data: &[u8]) -> Result<Vec<String>> {
    let object = object::File::parse(data)?;
    let section = object.section_by_name(".modinfo").context("no .modinfo")?;
    let text = String::from_utf8_lossy(section.data()?).into_owned();
    let names = text
        .split('\0')
        .find_map(|field| field.strip_prefix("depends="));
    let names = names.unwrap_or_default().split(',');
    Ok(names
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}
