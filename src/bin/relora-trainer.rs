//! The trainer's executable: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use relora::train;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    if std::env::args().nth(1).as_deref() == Some("--probe") {
        return train::probe();
    }
    train::run(&train::Args::parse())
}
