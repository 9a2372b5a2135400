//! The servers that `relora serve` runs itself where none is configured: a private PostgreSQL and an
//! S3 server. They speak the same protocols as the real ones, so that nothing else knows the difference.
//!
//! Invariant: one server process per data folder, held by a lock.

mod account;
mod lock;
mod postgres;
mod s3;

pub use self::{postgres::Postgres, s3::S3};
