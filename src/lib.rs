pub mod client;
pub mod db;
pub mod domain;
