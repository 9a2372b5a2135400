pub mod db;
pub mod domain;
pub mod worker;
