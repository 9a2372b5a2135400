//! Whole runs, in process: what they report, what they leave, and how they fail.

use std::{collections::HashMap, fs, path::Path};

use serde_json::{Value, json};
use tch::Tensor;

use super::test_support::{
    final_weights, method, nodes, ranks, read_tensors, scratch_dir, spec, train, try_train, with_method,
};
use crate::domain::{
    contract::{Event, FORMAT_VERSION},
    job::FailureKind,
    lineage::NodeKind,
    spec::{Choices, Linear, MergedPlan},
};

#[test]
fn a_run_reports_its_nodes_in_order_and_learns() {
    let dir = scratch_dir();
    let events = train(dir.path(), &spec(json!({"checkpoints": {"every_steps": 9}})));
    use NodeKind::{Base, Checkpoint, Restart};
    assert_eq!(
        nodes(&events),
        [(Base, 4, 0), (Checkpoint, 4, 0), (Restart, 9, 1), (Checkpoint, 9, 1), (Restart, 14, 2), (Checkpoint, 14, 2)]
    );
    let evals: Vec<_> = events
        .iter()
        .filter_map(|e| if let Event::Eval { step, loss, .. } = e { Some((*step, *loss)) } else { None })
        .collect();
    assert_eq!(evals.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 4, 14]);
    assert!(evals[2].1 < evals[0].1 - 0.1, "{evals:?}");
    assert!(matches!(events.first(), Some(Event::Ready { step: 0, .. })));
    assert!(matches!(events.last(), Some(Event::Done { step: 14 })));
    let steps: Vec<_> = events.iter().filter_map(|e| if let Event::Step(r) = e { Some(r) } else { None }).collect();
    assert_eq!(steps.iter().map(|r| r.num_restarts).collect::<Vec<_>>()[7..], [0, 1, 1, 1, 1, 1, 2]);
    assert_eq!(steps[13].num_tokens, 14 * 5 * 9);
    for event in &events {
        if let Event::Node(node) = event {
            for file in &node.files {
                assert!(dir.path().join("out").join(&file.path).is_file(), "{file:?}");
            }
        }
    }
}

#[test]
fn the_update_gains_rank_with_every_restart_and_no_more_than_its_factors_have() {
    // Factors of rank 3 beside matrices of 16 and 24; three cycles.
    let dir = scratch_dir();
    let patch = json!({"method": method(json!({"rank_threshold": 1e-6})), "schedule": {"num_steps": 19}});
    let events = train(dir.path(), &spec(patch));
    let ranks = ranks(&events);
    assert_eq!(ranks.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    for (restart, kinds) in ranks {
        for linear in Linear::ALL {
            let per_matrix = kinds[&linear].num_above as f64 / 2.0; // two layers
            assert!(per_matrix <= 3.0 * restart as f64, "{linear:?} has rank {per_matrix} after restart {restart}");
            assert!(restart < 2 || per_matrix > 3.0, "{linear:?} has rank {per_matrix} after restart {restart}");
            assert_eq!(kinds[&linear].num_values, 32);
        }
    }
    // What is reported is what the files hold.
    let difference = |name: &str| {
        let of = |path: &str| read_tensors(&dir.path().join(path)).into_iter().find(|(known, _)| known == name);
        let [start, end] = ["out/base/4/model.safetensors", "out/checkpoints/19/model.safetensors"].map(of);
        end.expect("weights").1 - start.expect("weights").1
    };
    let rank = difference("model.layers.1.mlp.up_proj.weight").linalg_matrix_rank(1e-5, false).int64_value(&[]);
    assert!((4..=9).contains(&rank), "{rank}");
}

#[test]
fn merges_and_resets_fall_where_their_own_periods_say() {
    let dir = scratch_dir();
    let online = method(json!({"restart_every_steps": 2, "reset_every_steps": 5}));
    let events = train(dir.path(), &spec(with_method(online)));
    let restarts: Vec<_> = nodes(&events).into_iter().filter(|(kind, ..)| *kind == NodeKind::Restart).collect();
    assert_eq!(restarts.iter().map(|(_, step, _)| *step).collect::<Vec<_>>(), [6, 8, 10, 12, 14]);
    let resets = events.iter().filter_map(|event| match event {
        Event::OptimizerReset { step, reset, cleared_frac } => Some((*step, *reset, *cleared_frac)),
        _ => None,
    });
    assert_eq!(resets.collect::<Vec<_>>(), [(9, 1, 1.0)]);
}

#[test]
fn base_and_deltas_in_order_give_the_final_checkpoint() {
    // However few bits the frozen matrices have, what is merged is merged in fp32.
    for frozen_weights in ["full", "int8", "nf4"] {
        let dir = scratch_dir();
        train(dir.path(), &spec(json!({"memory": {"frozen_weights": frozen_weights}})));
        assert_base_and_deltas_give_the_end(&dir.path().join("out"));
    }
}

fn assert_base_and_deltas_give_the_end(out: &Path) {
    let mut weights: HashMap<_, _> = read_tensors(&out.join("base/4/model.safetensors")).into_iter().collect();
    for restart in [1, 2] {
        let delta: HashMap<String, Tensor> =
            read_tensors(&out.join(format!("restarts/{restart}/adapter_model.safetensors"))).into_iter().collect();
        for (name, weight) in &mut weights {
            let path = format!("base_model.model.{}", name.trim_end_matches(".weight"));
            if let Some(value) = delta.get(&format!("{path}.weight")) {
                weight.copy_(value);
            } else {
                let [a, b] = ["lora_A", "lora_B"].map(|factor| &delta[&format!("{path}.{factor}.weight")]);
                *weight += b.mm(a) * 2.0; // alpha 6 over rank 3
            }
        }
    }
    for (name, want) in read_tensors(&out.join("checkpoints/14/model.safetensors")) {
        let error = (&weights[&name] - want).abs().max().double_value(&[]);
        assert!(error < 1e-6, "{name}: {error}");
    }
}

#[test]
fn micro_batches_change_the_result_by_rounding_only_even_with_dropout() {
    let loss_after = |micro_batch_seqs: i64| {
        let dir = scratch_dir();
        let method = json!({
            "type": "lora", "rank": 3, "scale": 2.0, "dropout": 0.3, "target_modules": ["q_proj", "down_proj"],
            "train_embeddings": true, "train_head": true, "warm_start_steps": 0, "relora_warmup_steps": 0
        });
        let spec = spec(json!({"batch": {"micro_batch_seqs": micro_batch_seqs}, "method": method}));
        let events = train(dir.path(), &spec);
        assert_eq!(
            nodes(&events),
            [(NodeKind::Base, 0, 0), (NodeKind::Checkpoint, 0, 0), (NodeKind::Checkpoint, 14, 0)]
        );
        events.iter().find_map(|e| if let Event::Eval { step: 14, loss, .. } = e { Some(*loss) } else { None })
    };
    let (one, five) = (loss_after(1).expect("loss"), loss_after(5).expect("loss"));
    assert!((one - five).abs() < 1e-4, "{one} {five}");
}

#[test]
fn a_run_that_passes_sequences_over_reads_on_where_the_other_stopped() {
    let losses = |skip_seqs: i64| {
        let dir = scratch_dir();
        // The weights stay as they are, so a loss tells which rows it is of.
        let patch = json!({
            "batch": {"skip_seqs": skip_seqs}, "method": {"type": "full"}, "optimizer": {"learning_rate": 1e-30}
        });
        let events = train(dir.path(), &spec(patch));
        events.iter().filter_map(|e| if let Event::Step(r) = e { Some(r.loss) } else { None }).collect::<Vec<_>>()
    };
    let (from_start, passed_over) = (losses(0), losses(10));
    assert_eq!(from_start[2..], passed_over[..12]);
    assert_ne!(from_start[0], from_start[2]);
}

#[test]
fn memory_settings_change_no_bit_or_stay_near() {
    let losses = |memory: Value| {
        let dir = scratch_dir();
        let events = train(dir.path(), &spec(json!({"memory": memory})));
        let steps = events.iter().filter_map(|e| if let Event::Step(report) = e { Some(report.loss) } else { None });
        (steps.collect::<Vec<_>>(), final_weights(dir.path()))
    };
    let (want, weights) = losses(json!({}));
    for memory in [json!({"recompute": "none"}), json!({"recompute": "layers", "merged_weights": "scratch"})] {
        assert!(losses(memory.clone()).1 == weights, "{memory}");
    }
    // Off by a rounding to 8 bits, and to 4, of weights that are drawn five times as large as a model's.
    for (form, bound) in [("int8", 2e-3), ("nf4", 3e-2)] {
        let (got, _) = losses(json!({"frozen_weights": form}));
        assert_eq!(got[..4], want[..4], "the warm start has no frozen weights");
        let error = got.iter().zip(&want).map(|(got, want)| (got / want - 1.0).abs()).fold(0.0, f64::max);
        assert!(error > 0.0 && error < bound, "{form} is off by {error}");
    }
}

#[test]
fn a_full_rank_run_of_a_grouped_and_tied_model_in_bf16_learns() {
    let dir = scratch_dir();
    let patch = json!({
        "method": {"type": "full"}, "precision": "bf16",
        "model": {"num_key_value_heads": 2, "tie_word_embeddings": true}
    });
    let events = train(dir.path(), &spec(patch));
    assert_eq!(nodes(&events), [(NodeKind::Checkpoint, 14, 0)]);
    let losses: Vec<_> =
        events.iter().filter_map(|e| if let Event::Eval { loss, .. } = e { Some(*loss) } else { None }).collect();
    assert!(losses[1] < losses[0] - 0.1, "{losses:?}");
}

#[test]
fn a_loss_that_is_never_finite_fails_as_diverged() {
    let dir = scratch_dir();
    let patch =
        json!({"optimizer": {"warm_start_learning_rate": 1e30, "clip_norm": 0.0}, "schedule": {"warmup_steps": 0}});
    let error = try_train(dir.path(), &spec(patch), None, None).expect_err("no finite loss");
    assert_eq!(error.kind, FailureKind::Diverged, "{error}");
    assert!(error.message.contains("there is no good checkpoint yet"), "{error}");

    // Here the low-rank phase alone is too fast.
    let dir = scratch_dir();
    let patch = json!({
        "optimizer": {"learning_rate": 1e30, "clip_norm": 0.0}, "method": method(json!({"relora_warmup_steps": 0})),
        // Also of weights that are no good any more.
        "checkpoints": {"every_steps": 1},
    });
    let error = try_train(dir.path(), &spec(patch), None, None).expect_err("no finite loss");
    assert_eq!(error.kind, FailureKind::Diverged, "{error}");
    assert!(error.message.contains("the last good checkpoint is that of step 4"), "{error}");
}

#[test]
fn a_state_of_another_spec_or_version_is_refused_by_name() {
    let dir = scratch_dir();
    try_train(dir.path(), &spec(json!({})), None, Some(6)).expect("train");
    let state = dir.path().join("out/states/6");
    let resume = |patch| try_train(dir.path(), &spec(patch), Some(state.clone()), None).expect_err("refused");

    let error = resume(json!({"seed": 12}));
    assert_eq!(error.kind, FailureKind::UserConfig);
    assert!(error.message.contains("seed"), "{error}");
    let error = resume(json!({"memory": {"frozen_weights": "int8"}}));
    assert!(error.message.contains("memory/frozen_weights differ"), "{error}");

    let json = fs::read_to_string(state.join("state.json")).expect("read state");
    let now = format!("\"format_version\": {FORMAT_VERSION}");
    assert!(json.contains(&now));
    fs::write(state.join("state.json"), json.replace(&now, "\"format_version\": 2")).expect("write");
    assert!(resume(json!({})).message.contains("format_version 2 is not known"));
    fs::write(state.join("state.json"), json).expect("write");

    fs::copy(dir.path().join("out/base/4/model.safetensors"), state.join("state.safetensors")).expect("copy");
    assert!(resume(json!({})).message.contains("does not belong"));
}

#[test]
fn a_run_that_goes_on_chooses_as_the_first_one_did() {
    let choices = |events: &[Event]| match events.first() {
        Some(Event::Ready { choices, fingerprint, .. }) => {
            assert_eq!(fingerprint.micro_batch_seqs, choices.micro_batch_seqs);
            *choices
        }
        other => panic!("no run is ready: {other:?}"),
    };
    let auto = spec(json!({"batch": {"micro_batch_seqs": "auto"}}));
    let resident = |micro_batch_seqs| Choices { micro_batch_seqs, merged_weights: MergedPlan::Resident };
    let dir = scratch_dir();
    assert_eq!(choices(&train(dir.path(), &auto)), resident(5), "all of a small batch");

    let dir = scratch_dir();
    let first = try_train(dir.path(), &spec(json!({})), None, Some(6)).expect("train");
    assert_eq!(choices(&first), resident(2));
    let state = dir.path().join("out/states/6");
    let rest = try_train(dir.path(), &auto, Some(state.clone()), Some(7)).expect("resume");
    assert_eq!(choices(&rest), resident(2));
    let given = spec(json!({"batch": {"micro_batch_seqs": 3}}));
    let rest = try_train(dir.path(), &given, Some(state), Some(7)).expect("resume");
    assert_eq!(choices(&rest), resident(3), "what is given counts more");
}

#[test]
fn tokens_outside_the_vocabulary_fail_as_data() {
    let dir = scratch_dir();
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("create");
    super::test_support::write_data(&data);
    let mut tokens = vec![0; 1_000];
    tokens[600..602].copy_from_slice(&[0xff, 0xff]);
    fs::write(data.join("train.bin"), tokens).expect("write");
    let error = try_train(dir.path(), &spec(json!({})), None, None).expect_err("bad tokens");
    assert_eq!(error.kind, FailureKind::Data);
    assert!(error.message.contains("train.bin: its token number 300 is 65535"), "{error}");
}

#[test]
fn a_reset_acts_on_the_factors_alone() {
    for (reset, want) in [
        (json!({"type": "zero", "reset_step_count": true}), [6, 1]),
        (json!({"type": "zero", "reset_step_count": false}), [6, 6]),
        (json!({"type": "random", "frac": 0.9, "reset_step_count": true, "joint_mask": true}), [6, 1]),
        (json!({"type": "none"}), [6, 6]),
    ] {
        let dir = scratch_dir();
        let spec = spec(with_method(method(json!({"optimizer_reset": reset}))));
        try_train(dir.path(), &spec, None, Some(10)).expect("train");
        let state = fs::read(dir.path().join("out/states/10/state.json")).expect("state");
        let state: Value = serde_json::from_slice(&state).expect("json");
        assert_eq!(state["num_updates"], json!(want), "wrapped at 4, reset at 9, with {reset}");
    }
}

#[test]
fn the_moments_of_the_factors_are_zero_after_a_reset_and_the_others_are_not() {
    let dir = scratch_dir();
    try_train(dir.path(), &spec(json!({})), None, Some(9)).expect("train");
    for (name, tensor) in read_tensors(&dir.path().join("out/states/9/state.safetensors")) {
        if name.starts_with("exp_avg") {
            let is_zero = tensor.abs().max().double_value(&[]) == 0.0;
            assert_eq!(is_zero, name.contains("lora_"), "{name}");
        }
    }
}
