//! Blue servers that take and give as many bytes as a client asks for, over TCP.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
};

use anyhow::Result;
use nix::sys::socket::{getsockopt, sockopt::TcpMaxSeg};

use crate::{
    kernel::in_namespace,
    lab::{Lab, Place},
    load::PATIENCE,
};

/// Where they listen.
pub const PORT: u16 = 8000;

/// What a client asks for: bytes up, then bytes down.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// From the client.
    pub up: u32,
    /// To the client.
    pub down: u32,
}

/// Enough for many full-sized segments; the other way only acknowledgements.
pub const UPLOAD: Exchange = Exchange {
    up: 400_000,
    down: 1,
};
/// The same in the other direction.
pub const DOWNLOAD: Exchange = Exchange {
    up: 1,
    down: 400_000,
};

/// The n-th byte of what is sent: what is lost, doubled or misplaced shows.
const fn byte(n: usize) -> u8 {
    (n % 251) as u8
}

fn bytes(length: u32) -> Vec<u8> {
    (0..length as usize).map(byte).collect()
}

fn is_whole(bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(n, is)| *is == byte(n))
}

/// Starts the servers.
pub fn serve(lab: &Lab) -> Result<()> {
    let server = in_namespace(&lab.enter(Place::Blue)?, || TcpListener::bind(("::", PORT)))?;
    std::thread::spawn(move || {
        for stream in server.incoming().flatten() {
            // A client that gave up has its own complaint.
            std::thread::spawn(move || answer(stream).ok());
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    let mut request = vec![0; u32::from_be_bytes(word) as usize];
    stream.read_exact(&mut word)?;
    stream.read_exact(&mut request)?;
    if !is_whole(&request) {
        return Ok(()); // the client misses its answer
    }
    stream.write_all(&bytes(u32::from_be_bytes(word)))
}

/// Does an exchange; how many bytes came down, or why they did not.
pub fn exchange(lab: &Lab, to: SocketAddr, what: Exchange) -> io::Result<usize> {
    Ok(measured(lab, to, what)?.0)
}

/// The same, and how many bytes a segment of the client's may have.
pub fn measured(
    lab: &Lab,
    to: SocketAddr,
    Exchange { up, down }: Exchange,
) -> io::Result<(usize, u32)> {
    let client = lab.enter(Place::Client).map_err(io::Error::other)?;
    in_namespace(&client, || {
        let mut stream = TcpStream::connect(to)?;
        for timeout in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
            timeout(&stream, Some(PATIENCE))?;
        }
        stream.write_all(&[up.to_be_bytes(), down.to_be_bytes()].concat())?;
        stream.write_all(&bytes(up))?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        if !is_whole(&answer) {
            return Err(io::Error::other("the answer is not what was sent"));
        }
        Ok((answer.len(), getsockopt(&stream.as_fd(), TcpMaxSeg)?))
    })
}
