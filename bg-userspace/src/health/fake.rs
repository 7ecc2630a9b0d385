//! Servers on loopback that do what they are told, right or wrong.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// What a server does with a connection once it has heard a request.
#[derive(Clone, Debug)]
pub enum Does {
    /// Sends these bytes, and closes.
    Send(Vec<u8>),
    /// Nothing.
    Hang,
}

/// A server, and the requests that it hears.
pub async fn server(does: Does) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    talking(move |_| does.clone()).await
}

/// The same, where what is done depends on the request.
pub async fn talking(
    does: impl Fn(&str) -> Does + Clone + Send + 'static,
) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, does.clone(), heard.clone()));
        }
    });
    (address, requests)
}

/// An address on loopback where nobody listens.
pub async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

/// An HTTP answer.
pub fn answer(status: u16, body: &str) -> Does {
    let head = format!(
        "HTTP/1.1 {status} Whatever\r\ncontent-length: {}",
        body.len()
    );
    Does::Send(format!("{head}\r\n\r\n{body}").into_bytes())
}

async fn serve(
    mut stream: TcpStream,
    does: impl Fn(&str) -> Does,
    heard: mpsc::UnboundedSender<String>,
) {
    let mut request = Vec::new();
    while !is_whole(&request) {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(length @ 1..) => request.extend(&buffer[..length]),
            _ => return,
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let does = does(&request);
    let _ = heard.send(request);
    match does {
        Does::Send(bytes) => {
            let _ = stream.write_all(&bytes).await;
        }
        Does::Hang => std::future::pending().await,
    }
}

/// Whether a request's head and body have come.
fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}
