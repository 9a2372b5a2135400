//! The spec of a fork: that of the job which made a checkpoint, changed.

use serde_json::{Value, json};

use super::TrainSpec;
use crate::domain::{ids::NodeId, json::merge_patch};

/// The request for a job that begins with a checkpoint which `source` made after `step`: its spec, with `changes` put over
/// it as a JSON merge patch (RFC 7396). The data is read on, and a warm start that lies behind is not made again.
pub fn fork_of(source: &TrainSpec, checkpoint: &NodeId, step: i64, changes: Value) -> Value {
    let mut spec = json!(source);
    spec["init_checkpoint"] = json!(checkpoint);
    spec["name"] = json!(format!("{} (fork)", source.name));
    spec["batch"]["skip_seqs"] = json!(source.batch.skip_seqs + step * source.batch.num_seqs);
    if let Some(warm_start_steps) = spec["method"]["warm_start_steps"].as_i64().filter(|&steps| steps <= step) {
        spec["method"]["warm_start_steps"] = json!(0);
        spec["schedule"]["num_steps"] = json!(source.schedule.num_steps - warm_start_steps);
    }
    // The sizes are the checkpoint's.
    spec["model"] = json!({"preset": source.model.preset});
    // Settings of one method mean nothing to another.
    let method = &changes["method"]["type"];
    if !method.is_null() && *method != spec["method"]["type"] {
        merge_patch(&mut spec, json!({"method": null}));
    }
    merge_patch(&mut spec, changes);
    spec
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::spec::{DataFacts, InitFacts, TrainSpecRequest};

    fn facts() -> DataFacts {
        DataFacts {
            dataset: "ds_1".to_owned().into(),
            tokenization: "tz_1".to_owned().into(),
            vocab_size: 300,
            max_train_tokens: 100_000,
            max_valid_tokens: 10_000,
        }
    }

    fn normalise(spec: Value, init: Option<&InitFacts>) -> TrainSpec {
        let (mut request, mut problems) = TrainSpecRequest::parse(spec);
        if let Some(init) = init {
            problems.extend(request.begin_with(init, Some(&facts())));
        }
        assert_eq!(problems, []);
        request.normalise(Some(&facts())).expect("valid").0
    }

    fn warm_start_steps(spec: &TrainSpec) -> Option<i64> {
        json!(spec)["method"]["warm_start_steps"].as_i64()
    }

    #[test]
    fn a_fork_is_a_valid_spec_that_reads_on_without_another_warm_start() {
        let source = normalise(
            json!({
                "name": "mine", "dataset": "ds_1", "model": {"preset": "llama-9m"},
                "method": {"type": "relora", "rank": 8, "restart_every_steps": 10, "warm_start_steps": 10},
                "schedule": {"num_steps": 40}, "batch": {"num_seqs": 4, "sequence_length": 32}, "seed": 7,
            }),
            None,
        );
        let init = InitFacts { model: source.model.clone(), tokenizer_sha256: None };
        let id = NodeId::from("node_1".to_owned());

        let fork =
            normalise(fork_of(&source, &id, 20, json!({"seed": 8, "optimizer": {"learning_rate": 2e-4}})), Some(&init));
        assert_eq!((fork.seed, fork.optimizer.learning_rate, fork.batch.skip_seqs), (8, 2e-4, 80));
        assert_eq!((warm_start_steps(&fork), fork.schedule.num_steps), (Some(0), 30));
        assert_eq!(
            (fork.name.as_str(), fork.init_checkpoint, fork.model),
            ("mine (fork)", Some(id.clone()), source.model.clone())
        );

        let within = normalise(fork_of(&source, &id, 5, json!({})), Some(&init));
        assert_eq!((warm_start_steps(&within), within.schedule.num_steps), (Some(10), 40));

        let full = normalise(fork_of(&source, &id, 20, json!({"method": {"type": "full"}})), Some(&init));
        assert_eq!(warm_start_steps(&full), None);
    }
}
