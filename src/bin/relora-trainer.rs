//! The trainer's executable: arguments in, exit code out. The training engine is part of this
//! executable alone, so that nothing else links libtorch.

#[path = "../train/mod.rs"]
mod train;

use std::process::ExitCode;

use clap::Parser;
use relora::{config, domain};

fn main() -> ExitCode {
    // Without a reader of its log the trainer still has a state to save: a failed write must not panic.
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).log_internal_errors(false).init();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match &arguments[..] {
        [flag, ..] if flag == "--probe" => train::ProbeArgs::parse_from(&arguments).run(),
        [flag, checkpoint, out] if flag == "--logits" => train::write_logits(checkpoint.as_ref(), out.as_ref()),
        [flag, ..] if flag == "--rebuild" => train::RebuildArgs::parse_from(&arguments).run(),
        _ => train::run(&train::Args::parse()),
    }
}
