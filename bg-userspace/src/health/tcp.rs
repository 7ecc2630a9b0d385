//! A connection: something accepts there. It proves no more.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use super::{Outcome, tidy};

/// Connects to each of these, and closes.
pub async fn probe(endpoints: &[SocketAddr]) -> Outcome {
    for endpoint in endpoints {
        connect(*endpoint).await?;
    }
    Ok(())
}

/// A connection, or why there is none.
pub async fn connect(to: SocketAddr) -> Result<TcpStream, String> {
    let failed = |error| tidy(&format!("port {}: {error}", to.port()));
    TcpStream::connect(to).await.map_err(failed)
}
