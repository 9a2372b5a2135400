pub mod api;
pub mod config;
pub mod db;
pub mod domain;
pub mod embedded;
pub mod shutdown;
pub mod storage;
pub mod telemetry;
