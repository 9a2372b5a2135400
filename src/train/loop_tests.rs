//! Whole runs, in process: what they leave, and that nothing but the spec decides the weights.

use std::{collections::HashMap, fs, path::Path};

use serde_json::json;
use tch::Tensor;

use super::test_support::{read_tensors, scratch_dir, spec, train, try_train};
use crate::domain::{contract::Event, job::FailureKind, lineage::NodeKind};

fn final_weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("out/checkpoints/14/model.safetensors")).expect("final checkpoint")
}

fn nodes(events: &[Event]) -> Vec<(NodeKind, i64, i64)> {
    let node = |event: &Event| match event {
        Event::Node(node) => Some((node.kind, node.step, node.restart)),
        _ => None,
    };
    events.iter().filter_map(node).collect()
}

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
fn a_run_stopped_and_resumed_at_any_step_gives_the_same_bits() {
    let whole = scratch_dir();
    train(whole.path(), &spec(json!({})));
    // In the warm start, around the wrap at 4, around the restart at 9, and in the last cycle.
    for stop in [2, 3, 4, 5, 8, 9, 10, 13] {
        let dir = scratch_dir();
        let first = try_train(dir.path(), &spec(json!({})), None, Some(stop)).expect("train");
        assert!(matches!(first.last(), Some(Event::Stopped { step }) if *step == stop), "{:?}", first.last());
        let state = dir.path().join(format!("out/states/{stop}"));
        let rest = try_train(dir.path(), &spec(json!({})), Some(state), None).expect("resume");
        assert!(!rest.iter().any(|e| matches!(e, Event::Warning { .. })), "{rest:?}");
        assert_eq!(nodes(&[first, rest].concat()).iter().filter(|n| n.0 == NodeKind::Restart).count(), 2);
        assert!(final_weights(dir.path()) == final_weights(whole.path()), "stopped at {stop}");
    }
}

#[test]
fn evaluating_and_saving_more_often_changes_no_bit() {
    let (seldom, often) = (scratch_dir(), scratch_dir());
    train(seldom.path(), &spec(json!({})));
    train(
        often.path(),
        &spec(
            json!({"eval": {"every_steps": 1, "max_tokens": 30}, "checkpoints": {"every_steps": 1}, "state_every_s": 0}),
        ),
    );
    assert!(final_weights(seldom.path()) == final_weights(often.path()));
    assert!(often.path().join("out/states/7/state.json").exists());
}

#[test]
fn base_and_deltas_in_order_give_the_final_checkpoint() {
    let dir = scratch_dir();
    let spec = spec(json!({}));
    train(dir.path(), &spec);
    let out = dir.path().join("out");
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
            "type": "lora", "rank": 3, "alpha": 6.0, "dropout": 0.3, "warm_start_steps": 0, "relora_warmup_steps": 0
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

    let json = fs::read_to_string(state.join("state.json")).expect("read state");
    fs::write(state.join("state.json"), json.replace("\"format_version\": 1", "\"format_version\": 2")).expect("write");
    assert!(resume(json!({})).message.contains("format_version 2"));
    fs::write(state.join("state.json"), json).expect("write");

    fs::copy(dir.path().join("out/base/4/model.safetensors"), state.join("state.safetensors")).expect("copy");
    assert!(resume(json!({})).message.contains("does not belong"));
}

#[test]
fn tokens_outside_the_vocabulary_fail_as_data() {
    let dir = scratch_dir();
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("create");
    super::test_support::write_data(&data);
    fs::write(data.join("train.bin"), vec![0xff; 1_000]).expect("write");
    let error = try_train(dir.path(), &spec(json!({})), None, None).expect_err("bad tokens");
    assert_eq!(error.kind, FailureKind::Data);
    assert!(error.message.contains("65535"), "{error}");
}

#[test]
fn a_restart_resets_the_optimizer_of_the_factors_alone() {
    for (reset, want) in [("zero", json!([6, 1])), ("none", json!([6, 6]))] {
        let dir = scratch_dir();
        let mut method = serde_json::to_value(spec(json!({})).method).expect("method");
        method["optimizer_reset"]["type"] = json!(reset);
        try_train(dir.path(), &spec(json!({"method": method})), None, Some(10)).expect("train");
        let state = fs::read(dir.path().join("out/states/10/state.json")).expect("state");
        let state: serde_json::Value = serde_json::from_slice(&state).expect("json");
        assert_eq!(state["num_updates"], want, "wrapped at 4, restarted at 9, with reset {reset}");
    }
}
