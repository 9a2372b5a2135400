//! A ReLoRA training service: a REST API queues pretraining jobs into PostgreSQL, workers execute them
//! with libtorch, and merged checkpoints and LoRA deltas stream to S3-compatible storage.
//!
//! Imports point down:
//!
//! ```text
//! bin, cli, serve -> api   worker   client   train    (no two of these import each other; worker and
//!                       \     |       |      /          train meet in files and JSON lines; train is
//!                     db, storage     |     /           part of the executable relora-trainer alone)
//!                           \         |    /
//!                            domain            config, telemetry, shutdown: leaves, passed down
//! ```

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod db;
pub mod domain;
pub mod embedded;
pub mod operate;
pub mod s3_check;
pub mod serve;
pub mod shutdown;
pub mod storage;
pub mod telemetry;
pub mod worker;
