//! Pure values: what the service talks about. Nothing here does input or output.

pub mod checkpoint;
pub mod contract;
pub mod data;
pub mod ids;
pub mod job;
pub mod json;
pub mod lineage;
pub mod memory;
pub mod offer;
pub mod problem;
pub mod retention;
pub mod schedule;
pub mod spec;
pub mod verification;
