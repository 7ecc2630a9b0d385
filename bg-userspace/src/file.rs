//! Reading small files that a configuration names: no more of them than they may have,
//! and nothing that a read could wait for.

use std::{
    fs::{self, FileType},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::Path,
};

use hyper::header::HeaderValue;

/// A larger file is no token.
const MAX_TOKEN: u64 = 64 << 10;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The kernel's word.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Whoever reads it may wait for ever, or read without an end.
    #[error("is {0}: it must be a regular file")]
    NotRegular(&'static str),
    /// It has more bytes than it may have.
    #[error("is larger than {}", size(*.0))]
    TooLarge(u64),
    /// It is no text.
    #[error("is not UTF-8 text")]
    NotText,
}

/// The text of a regular file of `max` bytes at most.
pub fn text(file: &Path, max: u64) -> Result<String, Trouble> {
    // A FIFO without a writer is opened at once like this, and found out.
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(file)?;
    match kind(opened.metadata()?.file_type()) {
        None => bounded(&opened, max),
        Some(kind) => Err(Trouble::NotRegular(kind)),
    }
}

/// The same of whatever can be read, a pipe too: for who waits for it himself.
pub fn text_of_any(file: &Path, max: u64) -> Result<String, Trouble> {
    bounded(&fs::File::open(file)?, max)
}

/// The header of the bearer token in a file. An error names the file.
pub async fn bearer(file: &Path) -> Result<HeaderValue, String> {
    let path = file.to_owned();
    let read = tokio::task::spawn_blocking(move || text(&path, MAX_TOKEN)).await;
    let shown = file.display();
    let token = read.map_err(|error| format!("{shown}: {error}"))?;
    let token = token.map_err(|trouble| format!("{shown} {trouble}"))?;
    let bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
    let mut bearer = bearer.map_err(|_| format!("{shown} holds no token"))?;
    bearer.set_sensitive(true);
    Ok(bearer)
}

fn bounded(file: &fs::File, max: u64) -> Result<String, Trouble> {
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(Trouble::TooLarge(max));
    }
    String::from_utf8(bytes).map_err(|_| Trouble::NotText)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// What a file is that is no regular one.
fn kind(kind: FileType) -> Option<&'static str> {
    if kind.is_file() {
        return None;
    }
    Some(match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "something else",
    })
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read_and_nothing_hangs() {
        let directory = std::env::temp_dir().join(format!("bgswitch-file-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (fifo, plain) = (directory.join("fifo"), directory.join("plain"));
        let _ = fs::remove_file(&fifo);
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        fs::write(&plain, "text").unwrap();
        let said = |file: &Path, max| text(file, max).map_err(|trouble| trouble.to_string());
        let not_regular = |what: &str| Err(format!("is {what}: it must be a regular file"));
        assert_eq!(said(&plain, 4), Ok("text".to_owned()));
        assert_eq!(said(&plain, 3), Err("is larger than 3 bytes".to_owned()));
        assert_eq!(said(&fifo, 4), not_regular("a FIFO"));
        assert_eq!(said(Path::new("/dev/zero"), 4), not_regular("a device"));
        assert_eq!(said(&directory, 4), not_regular("a directory"));
        fs::write(&plain, [0xff]).unwrap();
        assert_eq!(said(&plain, 4), Err("is not UTF-8 text".to_owned()));
        fs::remove_dir_all(&directory).unwrap();
    }
}
