//! A command on a terminal of its own, as people see it.

use std::{
    io::{Read as _, Write as _},
    process::{Child, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

use anyhow::{Context as _, Result};
use nix::unistd::Pid;

use crate::{
    lab::{Lab, Place},
    load::until,
};

/// `bgswitch` on a terminal, which util-linux' `script` makes.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    bytes: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// Starts a `bgswitch` command on a terminal that is so many columns wide.
    pub fn start(lab: &Lab, words: &[&str], columns: u16) -> Result<Self> {
        let words = lab.bgswitch(words)?;
        let line = [words.get_program()].into_iter().chain(words.get_args());
        let line: Vec<&str> = line.filter_map(|word| word.to_str()).collect();
        let line = format!(
            "stty rows 40 cols {columns}; echo pid $$; exec {}",
            line.join(" ")
        );
        let mut child = lab
            .command(Place::Gateway, "script")?
            .args(["-qefc", &line, "/dev/null"])
            .env("TERM", "xterm-256color")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut out = child.stdout.take().context("its output")?;
        let (sender, bytes) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = out.read(&mut buffer) {
                let _ = sender.send(buffer[..read].to_vec());
            }
        });
        let seen = String::new();
        Ok(Self { child, bytes, seen })
    }

    /// All that was written to it, escapes and all.
    pub fn seen(&mut self) -> &str {
        for bytes in self.bytes.try_iter() {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        &self.seen
    }

    /// Waits until this was written to it.
    pub fn until_seen(&mut self, text: &str) {
        until(&format!("{text:?} is seen"), || self.seen().contains(text));
    }

    /// Types these keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("its input")?;
        input.write_all(keys.as_bytes())?;
        Ok(input.flush()?)
    }

    /// The command, once anything was seen.
    pub fn pid(&self) -> Pid {
        let after = self.seen.split("pid ").nth(1).unwrap_or_default();
        let digits = after.split(|c: char| !c.is_ascii_digit()).next();
        let pid = digits.and_then(|digits| digits.parse().ok());
        Pid::from_raw(pid.expect("it says who it is, first of all"))
    }

    /// Waits for its end; its exit code. All that it wrote stays to be seen.
    pub fn end(&mut self) -> Result<i32> {
        // To wait closes it, and that would be the end of the terminal's input, too.
        let _input = self.child.stdin.take();
        let status = self.child.wait()?;
        // The reader ends with the output.
        while let Ok(bytes) = self.bytes.recv() {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        status.code().context("it was ended by a signal")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Ended already, as a rule; `script` ends its command with itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
