//! The pass over a micro-batch as one launch, where that is asked for: on a fast GPU a small model would wait for its
//! kernels to be launched, one after the other.

use std::collections::HashMap;

use tch::Device;

use super::{Batch, scratch, shared::copy};
use crate::train::native::Graph;

/// The passes that have been recorded.
pub struct Graphs {
    device: Device,
    recorded: HashMap<Key, Recorded>,
    /// After one could not be recorded.
    are_given_up: bool,
}

/// What a recorded pass is for: sizes and numbers are part of what is recorded.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    num_seqs: i64,
    sequence_length: i64,
    scale_bits: u64,
}

struct Recorded {
    graph: Graph,
    /// The one that it reads.
    batch: Batch,
    /// How often memory had moved. It must not have moved since.
    num_moves: u64,
}

impl Graphs {
    pub fn new(device: Device) -> Self {
        Self { device, recorded: HashMap::new(), are_given_up: false }
    }

    /// To be called when anything but the shared buffers has moved.
    pub fn forget(&mut self) {
        self.recorded.clear();
    }

    /// Makes the pass over a batch, as a launch if one like it is recorded; else records it, too.
    pub fn run(&mut self, batch: &Batch, scale: f64, mut pass: impl FnMut(&Batch)) {
        if self.are_given_up {
            return pass(batch);
        }
        let Batch { num_seqs, sequence_length, .. } = *batch;
        let key = Key { num_seqs, sequence_length, scale_bits: scale.to_bits() };
        if let Some(recorded) = self.recorded.get(&key)
            && recorded.num_moves == scratch::num_moves()
        {
            copy(&batch.tokens, &recorded.batch.tokens);
            copy(&batch.targets, &recorded.batch.targets);
            return recorded.graph.launch(|| pass(&recorded.batch));
        }
        let own = Batch { tokens: batch.tokens.copy(), targets: batch.targets.copy(), ..*batch };
        match Graph::record(self.device, &mut || pass(&own)) {
            Ok(graph) => {
                let num_moves = scratch::num_moves();
                self.recorded.insert(key, Recorded { graph, batch: own, num_moves });
            }
            Err(error) => {
                tracing::warn!(%error, "passes are not launched as a whole");
                self.are_given_up = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::{super::scratch::Scratch, *};

    fn batch(num_seqs: i64, first: i64) -> Batch {
        let tokens = Tensor::arange_start(first, first + 3 * num_seqs, (Kind::Int64, Device::Cpu));
        let targets = &tokens + 1;
        Batch { num_seqs, sequence_length: 3, tokens, targets, masks: None }
    }

    /// Where the batch lay that the pass was made over, after a look at what it held.
    fn place_of_pass(graphs: &mut Graphs, batch: &Batch, scale: f64) -> *mut std::ffi::c_void {
        let mut places = Vec::new();
        graphs.run(batch, scale, |seen| {
            assert!(seen.tokens.equal(&batch.tokens) && seen.targets.equal(&batch.targets));
            places.push(seen.tokens.data_ptr());
        });
        assert_eq!(places.len(), 1, "one pass, no more");
        places[0]
    }

    #[test]
    fn a_pass_is_launched_again_over_the_memory_that_it_was_recorded_over() {
        let mut graphs = Graphs::new(Device::Cpu);
        let first = place_of_pass(&mut graphs, &batch(2, 0), 0.5);
        assert_eq!(place_of_pass(&mut graphs, &batch(2, 10), 0.5), first);
        let [smaller, scaled] =
            [(1, 0.5), (2, 0.25)].map(|(n, scale)| place_of_pass(&mut graphs, &batch(n, 20), scale));
        assert!(smaller != first && scaled != first && graphs.recorded.len() == 3);
        assert_eq!(place_of_pass(&mut graphs, &batch(2, 30), 0.5), first);
    }

    #[test]
    fn after_memory_has_moved_it_is_recorded_anew() {
        let mut graphs = Graphs::new(Device::Cpu);
        let first = place_of_pass(&mut graphs, &batch(2, 0), 0.5);
        let _ = Scratch::new((Kind::Float, Device::Cpu)).take(&[4]);
        assert_ne!(place_of_pass(&mut graphs, &batch(2, 10), 0.5), first);
        assert_eq!(graphs.recorded.len(), 1);
        graphs.forget();
        assert!(graphs.recorded.is_empty());
    }
}
