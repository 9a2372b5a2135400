//! The trainer's executable: arguments in, exit code out. The training engine is part of this
//! executable alone, so that nothing else links libtorch.

#[path = "../train/mod.rs"]
mod train;

use std::process::ExitCode;

use clap::Parser;
use relora::domain;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    if std::env::args().nth(1).as_deref() == Some("--probe") {
        return train::probe();
    }
    train::run(&train::Args::parse())
}
