//! A connection: something accepts there. It proves no more.

use std::{io, net::SocketAddr};

use nix::errno::Errno;
use tokio::net::TcpStream;

use super::{Outcome, Trouble, tidy};

/// Connects to each of these, and closes.
pub async fn probe(endpoints: &[SocketAddr]) -> Outcome {
    for endpoint in endpoints {
        connect(*endpoint).await?;
    }
    Ok(())
}

/// A connection, or why there is none.
pub async fn connect(to: SocketAddr) -> Result<TcpStream, Trouble> {
    TcpStream::connect(to).await.map_err(|error| {
        let text = tidy(&format!("port {}: {error}", to.port()));
        if is_ours(&error) {
            Trouble::Ours(text)
        } else {
            Trouble::Theirs(text)
        }
    })
}

/// True when an error of a connection is the gateway's own trouble, which has no file
/// descriptor, memory or port left, or a firewall that does not let it out; else it is the
/// other end's, or the way's.
pub fn is_ours(error: &io::Error) -> bool {
    let errors = [
        Errno::EMFILE,
        Errno::ENFILE,
        Errno::ENOMEM,
        Errno::ENOBUFS,
        Errno::EADDRNOTAVAIL,
        Errno::EADDRINUSE,
        Errno::EPERM,
    ];
    let number = error.raw_os_error();
    number.is_some_and(|number| errors.contains(&Errno::from_raw(number)))
}
