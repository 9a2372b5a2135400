//! The service from outside: the real router over HTTP, a real PostgreSQL, a real S3 server.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod app;
mod auth;
mod datasets;
mod events;
mod health;
mod imports;
mod job_commands;
mod jobs;
mod layers;
mod lease_protocol;
mod lineage;
mod lineage_tasks;
mod metrics;
mod migrations;
mod openapi;
mod problems;
mod queue;
mod retention;
mod tokenizations;
mod uploads;
