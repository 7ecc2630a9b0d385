//! The socket's connections, of which none waits for ever for somebody who does not read:
//! where nothing of what was written is read for [`PATIENCE`], it is closed. With it goes
//! what it held, like a place among those who listen to events.

use std::{
    io::{self, IoSlice},
    os::fd::AsRawFd as _,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{
        UnixListener, UnixStream,
        unix::{SocketAddr, UCred},
    },
    time::{Instant, Sleep, sleep_until},
};

/// So long a reader may read nothing of what there is.
const PATIENCE: Duration = Duration::from_secs(30);

/// The control socket.
pub(super) struct Patient(pub(super) UnixListener);

impl Listener for Patient {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        (Connection::new(stream), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// A connection, and since when its reader reads nothing.
pub(super) struct Connection {
    stream: UnixStream,
    /// What the kernel held behind the last write, that the reader had not read, bytes.
    unread: i32,
    /// When the reader had read something, or all of it, last.
    read_at: Instant,
    /// Wakes a write that waits.
    alarm: Pin<Box<Sleep>>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        let now = Instant::now();
        Self {
            stream,
            unread: 0,
            read_at: now,
            alarm: Box::pin(sleep_until(now)),
        }
    }

    /// Who is at the other end.
    pub(super) fn peer_cred(&self) -> io::Result<UCred> {
        self.stream.peer_cred()
    }

    /// Looks whether the reader has read something; an error when that is too long ago.
    fn look(&mut self) -> io::Result<()> {
        let unread = unread(&self.stream)?;
        if unread == 0 || unread < self.unread {
            self.read_at = Instant::now();
        }
        self.unread = unread;
        if self.read_at.elapsed() < PATIENCE {
            return Ok(());
        }
        tracing::info!("a connection to the socket was closed: nobody read what was written");
        Err(io::ErrorKind::TimedOut.into())
    }

    /// A write, which fails when nobody reads.
    fn patiently<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(Pin<&mut UnixStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        loop {
            self.look()?;
            if let Poll::Ready(written) = write(Pin::new(&mut self.stream), context) {
                self.unread = unread(&self.stream)?;
                return Poll::Ready(written);
            }
            self.alarm.as_mut().reset(self.read_at + PATIENCE);
            ready!(self.alarm.as_mut().poll(context));
        }
    }
}

mod kernel {
    #![allow(missing_docs, reason = "the macro writes them")]
    // `SIOCOUTQ` (unix(7)): what the other end has not read, in bytes of kernel memory.
    nix::ioctl_read_bad!(unread, nix::libc::TIOCOUTQ, nix::libc::c_int);
}

fn unread(stream: &UnixStream) -> io::Result<i32> {
    let mut unread = 0;
    // SAFETY: the descriptor is open as long as the stream is borrowed, and the kernel
    // writes one `int` to where the reference points.
    unsafe { kernel::unread(stream.as_raw_fd(), &raw mut unread) }?;
    Ok(unread)
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.patiently(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.patiently(context, |stream, context| {
            stream.poll_write_vectored(context, slices)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
