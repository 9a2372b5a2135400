//! A proxy in front of the store that has faults, one request per connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

/// What becomes of a request.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// None: it is passed on, and so is the answer.
    Pass,
    /// The answer comes late.
    Late(Duration),
    /// Nothing is passed on and nothing is answered, ever.
    Silent,
    /// The connection is closed before anything is passed on.
    Refused,
    /// It is passed on, and the connection is closed instead of an answer.
    AnswerLost,
    /// It is passed on, and the last bytes of the answer are missing.
    AnswerCut,
    /// It is not passed on, and answered with this status and body.
    Answered(&'static str, &'static str),
    /// It is passed on, and yet answered so.
    DoneAndAnswered(&'static str, &'static str),
}

/// Takes the request line, such as `PUT /bucket/key?partNumber=1&uploadId=u HTTP/1.1`.
type Decide = dyn Fn(&str) -> Fault + Send + Sync;

pub struct Proxy {
    pub endpoint: String,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    pub async fn start(upstream: &str, decide: impl Fn(&str) -> Fault + Send + Sync + 'static) -> Self {
        let upstream: SocketAddr = upstream.strip_prefix("http://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let decide: Arc<Decide> = Arc::new(decide);
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let decide = decide.clone();
                // A client that goes away is no failure of the test.
                tokio::spawn(async move { answer(client, upstream, &*decide).await.ok() });
            }
        });
        Self { endpoint, _task: AbortOnDropHandle::new(task) }
    }
}

async fn answer(mut client: TcpStream, upstream: SocketAddr, decide: &Decide) -> std::io::Result<()> {
    let Some(request) = read_request(&mut client).await? else { return Ok(()) };
    let line = String::from_utf8_lossy(&request).lines().next().unwrap().to_owned();
    let answer = match decide(&line) {
        Fault::Pass => pass_on(&request, upstream).await?,
        Fault::Late(delay) => {
            tokio::time::sleep(delay).await;
            pass_on(&request, upstream).await?
        }
        Fault::Silent => std::future::pending().await,
        Fault::Refused => vec![],
        Fault::AnswerLost => pass_on(&request, upstream).await.map(|_| vec![])?,
        Fault::AnswerCut => {
            let mut answer = pass_on(&request, upstream).await?;
            answer.truncate(answer.len() - 4);
            answer
        }
        Fault::Answered(status, body) => written(status, body),
        Fault::DoneAndAnswered(status, body) => pass_on(&request, upstream).await.map(|_| written(status, body))?,
    };
    client.write_all(&answer).await?;
    client.shutdown().await
}

/// Head and body, or none where the client only connected.
async fn read_request(client: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut request = Vec::new();
    loop {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(None);
        }
        let Some(head_len) = request.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&request[..head_len]).to_ascii_lowercase();
        let body_len = head.lines().find_map(|line| line.strip_prefix("content-length:")).unwrap_or("0");
        let len = head_len + 4 + body_len.trim().parse::<usize>().unwrap();
        while request.len() < len {
            if client.read_buf(&mut request).await? == 0 {
                return Ok(None);
            }
        }
        return Ok(Some(request));
    }
}

async fn pass_on(request: &[u8], upstream: SocketAddr) -> std::io::Result<Vec<u8>> {
    let mut upstream = TcpStream::connect(upstream).await?;
    let line_len = request.windows(2).position(|window| window == b"\r\n").unwrap() + 2;
    upstream.write_all(&request[..line_len]).await?;
    upstream.write_all(b"connection: close\r\n").await?;
    upstream.write_all(&request[line_len..]).await?;
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer).await?;
    Ok(answer)
}

fn written(status: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/xml\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}
