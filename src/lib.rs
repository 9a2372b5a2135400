pub mod domain;
#[cfg(feature = "train")]
pub mod train;
