//! The trainer: one synchronous process per device, from a spec and token files to nodes of a lineage.
//!
//! The only part that names libtorch. It knows no database, no network and no worker: files and JSON lines are all it
//! reads and writes. The loop is in [`run`], the model's passes in [`engine`], what makes it ReLoRA in [`relora`].

mod adamw;
mod checkpoint;
mod data;
mod delta;
mod device;
mod engine;
mod error;
mod eval;
mod events;
mod host_copy;
mod host_memory;
mod layout;
mod logits;
mod model;
mod native;
mod nodes;
mod ops;
mod process;
mod profile;
mod random;
mod ranks;
mod rebuild;
mod relora;
mod reset;
mod run;
mod state;
mod tensor_file;
mod weights;
mod writer;

#[cfg(test)]
mod continuation_tests;
#[cfg(test)]
mod loop_tests;
#[cfg(test)]
mod ops_tests;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod test_support;

pub use process::{Args, ProbeArgs, run, write_logits};
pub use rebuild::RebuildArgs;
