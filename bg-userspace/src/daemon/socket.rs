//! The control socket.

use std::{
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::stat::{Mode, umask},
    unistd::{Group, chown},
};

/// The bound socket; its file goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Binds the socket for root and the group `bgswitch`, in place of one that
    /// nobody listens on.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        let shown = path.display();
        let context = || format!("listening on {shown}");
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(context)?;
        }
        if UnixStream::connect(path).is_ok() {
            bail!("another process listens on {shown}: stop it, or set gateway.socket");
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        // 0660 from the first moment on.
        let before = umask(Mode::from_bits_truncate(0o117));
        let listener = UnixListener::bind(path);
        umask(before);
        let socket = Self {
            listener: listener.with_context(context)?,
            path: path.to_owned(),
        };
        if let Ok(Some(group)) = Group::from_name("bgswitch") {
            chown(path, None, Some(group.gid)).with_context(context)?;
        }
        socket
            .listener
            .set_nonblocking(true)
            .with_context(context)?;
        Ok(socket)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, for the runtime that this is called in.
    pub(super) fn listener(&self) -> Result<tokio::net::UnixListener> {
        let listener = self.listener.try_clone()?;
        Ok(tokio::net::UnixListener::from_std(listener)?)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
