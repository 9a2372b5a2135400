//! The trainer's side of the contract: events on one locked output, commands from stdin.

use std::{
    io::{self, BufRead, Write},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
};

use crate::domain::contract::{Command, Event};

/// Where events go, one JSON document per line. Clones write to the same place, never into each other's lines.
#[derive(Clone)]
pub struct Events(Arc<Mutex<Box<dyn Write + Send>>>);

impl Events {
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Box::new(output))))
    }

    /// An output that is gone does not end the run: then stdin has ended too, which stops it with a state.
    pub fn emit(&self, event: &Event) {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let written = serde_json::to_vec(event).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            output.write_all(&line)?;
            output.flush()
        });
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
