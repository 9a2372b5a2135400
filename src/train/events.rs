//! The trainer's side of the contract: events on one locked output, commands from stdin.

use std::{
    io::{self, BufRead, Write},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use crate::domain::contract::{Command, Event};

/// After how much silence a run at work says so.
const ALIVE_EVERY: Duration = Duration::from_secs(5);

/// Where events go, one JSON document per line. Clones write to the same place, never into each other's lines.
#[derive(Clone)]
pub struct Events(Arc<Mutex<Output>>);

struct Output {
    lines: Box<dyn Write + Send>,
    last_line: Instant,
}

impl Events {
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Output { lines: Box::new(output), last_line: Instant::now() })))
    }

    /// To be called within whatever takes long: whoever watches must be able to tell it from a run that hangs.
    pub fn alive(&self, step: i64) {
        let last_line = self.0.lock().unwrap_or_else(PoisonError::into_inner).last_line;
        if last_line.elapsed() > ALIVE_EVERY {
            self.emit(&Event::Alive { step });
        }
    }

    /// An output that is gone does not end the run: then stdin has ended too, which stops it with a state.
    pub fn emit(&self, event: &Event) {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let written = serde_json::to_vec(event).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            output.lines.write_all(&line)?;
            output.lines.flush()
        });
        output.last_line = Instant::now();
        if let Err(error) = written {
            tracing::error!(%error, "event cannot be written");
        }
    }
}

/// Commands from stdin. Its end means that the worker is gone, and counts as `Stop`.
pub fn commands_from_stdin() -> Receiver<Command> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                // The receiver is gone only when the run is over.
                Ok(command) => {
                    let _ = sender.send(command);
                }
                Err(error) => tracing::error!(%error, line, "command is not understood"),
            }
        }
        let _ = sender.send(Command::Stop);
    });
    receiver
}
