//! A client that talks over one connection, a step at a time, and hears from its
//! socket how the connection ended; one that sends datagrams; and a ping.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, setsockopt, sockopt,
};

use crate::{kernel::in_namespace, load::PATIENCE};

/// One TCP connection to an HTTP server.
#[derive(Debug)]
pub struct Conversation {
    stream: TcpStream,
    /// Read, but not asked for yet.
    unread: Vec<u8>,
}

impl Conversation {
    /// Connects from a namespace.
    pub fn open(namespace: &File, to: SocketAddr) -> io::Result<Self> {
        Self::new(in_namespace(namespace, || {
            TcpStream::connect_timeout(&to, PATIENCE)
        })?)
    }

    /// Connects from an address and port that may have been used before.
    pub fn open_from(namespace: &File, from: SocketAddr, to: SocketAddr) -> io::Result<Self> {
        let socket = in_namespace(namespace, || -> io::Result<OwnedFd> {
            let family = match from {
                SocketAddr::V4(_) => AddressFamily::Inet,
                SocketAddr::V6(_) => AddressFamily::Inet6,
            };
            let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
            socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
            Ok(socket)
        })?;
        Self::new(socket.into())
    }

    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            unread: Vec::new(),
        })
    }

    /// The client's address and port.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// The listener's address and port.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// Asks who is there: the colour that answers.
    pub fn ask(&mut self) -> io::Result<String> {
        self.get("/")
    }

    /// Asks who is there, and whom the server sees.
    pub fn ask_for_peer(&mut self) -> io::Result<(String, SocketAddr)> {
        let text = self.get("/peer")?;
        let (colour, peer) = text.split_once(' ').unwrap_or_default();
        let peer = peer.parse().map_err(io::Error::other)?;
        Ok((colour.to_owned(), peer))
    }

    fn get(&mut self, path: &str) -> io::Result<String> {
        self.send(path)?;
        let head = self.until(b"\r\n\r\n")?;
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .ok_or_else(|| io::Error::other(format!("no length in {head}")))?;
        while self.unread.len() < length {
            self.read()?;
        }
        let body = self.unread.drain(..length).collect();
        String::from_utf8(body).map_err(io::Error::other)
    }

    /// Asks for a stream of `seconds`, and waits for its first line.
    pub fn listen(&mut self, seconds: u64) -> io::Result<String> {
        self.send(&format!("/stream/{seconds}"))?;
        self.until(b"\r\n\r\n")?;
        self.line()
    }

    /// The next line of a stream: a colour.
    pub fn line(&mut self) -> io::Result<String> {
        loop {
            // Between them are the lengths of the chunks, and blank lines.
            let line = self.until(b"\n")?;
            let line = line.trim_end();
            if u64::from_str_radix(line, 16).is_err() && !line.is_empty() {
                return Ok(line.to_owned());
            }
        }
    }

    /// Reads on until the connection ends; an error is how it ended.
    pub fn to_its_end(&mut self) -> io::Result<()> {
        loop {
            match self.read() {
                Ok(()) => self.unread.clear(),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Closes with a RST.
    pub fn reset(self) -> io::Result<()> {
        let at_once = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        Ok(setsockopt(&self.stream, sockopt::Linger, &at_once)?)
    }

    /// Closes without a word to the other side, as a host that lost power.
    pub fn vanish(self) -> io::Result<()> {
        Ok(setsockopt(&self.stream, sockopt::TcpRepair, &1)?)
    }

    fn send(&mut self, path: &str) -> io::Result<()> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: service\r\n\r\n");
        self.stream.write_all(request.as_bytes())
    }

    fn until(&mut self, mark: &[u8]) -> io::Result<String> {
        loop {
            let found = self.unread.windows(mark.len()).position(|w| w == mark);
            if let Some(at) = found {
                let text = self.unread.drain(..at + mark.len()).collect();
                return String::from_utf8(text).map_err(io::Error::other);
            }
            self.read()?;
        }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => {
                self.unread.extend(&buffer[..length]);
                Ok(())
            }
        }
    }
}

/// One UDP socket that asks a server.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

impl Datagrams {
    /// A socket in a namespace, for one server.
    pub fn open(namespace: &File, to: SocketAddr) -> io::Result<Self> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = in_namespace(namespace, || {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            Ok::<_, io::Error>(socket)
        })?;
        socket.set_read_timeout(Some(PATIENCE / 4))?;
        Ok(Self { socket })
    }

    /// Asks who is there: the colour that answers.
    pub fn ask(&self) -> io::Result<String> {
        let mut buffer = [0; 64];
        self.socket.send(b"who")?;
        let length = self.socket.recv(&mut buffer)?;
        String::from_utf8(buffer[..length].to_vec()).map_err(io::Error::other)
    }
}

/// An echo request (ICMP or ICMPv6) from a namespace, and whether what comes back
/// is what was sent.
pub fn ping(namespace: &File, to: IpAddr) -> io::Result<bool> {
    let (family, protocol, request, reply) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let socket: OwnedFd = in_namespace(namespace, || {
        socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)
    })?;
    let socket = UdpSocket::from(socket);
    socket.connect((to, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let payload: Vec<u8> = (0..=255).collect();
    socket.send(&[&[request, 0, 0, 0, 0, 0, 0, 1], payload.as_slice()].concat())?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    Ok(answer[0] == reply && answer[8..length] == payload)
}
