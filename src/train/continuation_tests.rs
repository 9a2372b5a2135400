//! Whole runs, in process: nothing but the spec decides the weights, wherever a run is stopped and whatever it saves.

use serde_json::{Value, json};

use super::test_support::{final_weights, method, nodes, ranks, scratch_dir, spec, train, try_train, with_method};
use crate::domain::{
    contract::Event,
    lineage::NodeKind,
    spec::{CheckpointsSpec, EvalSpec, TrainSpec},
};

/// One of every kind of run whose continuation could go wrong in a way of its own.
fn every_method() -> Vec<Value> {
    let factors = json!({
        "rank": 3, "scale": 2.0, "dropout": 0.2, "target_modules": ["q_proj", "up_proj"], "train_embeddings": true,
        "train_head": false,
    });
    let with = |more: Value| {
        let mut method = factors.clone();
        more.as_object().expect("an object").iter().for_each(|(key, value)| method[key] = value.clone());
        with_method(method)
    };
    let reset = |reset: Value| with_method(method(json!({"optimizer_reset": reset, "rank_threshold": 0.001})));
    vec![
        with_method(json!({"type": "full"})),
        with_method(json!({"type": "control", "rank": 3, "hidden_size": 8, "intermediate_size": 20})),
        with(json!({"type": "factorized"})),
        with(json!({"type": "lora", "warm_start_steps": 4, "relora_warmup_steps": 2})),
        with_method(method(json!({}))),
        json!({"method": method(json!({"dropout": 0.2, "restart_schedule": "cyclical"})), "precision": "bf16"}),
        with_method(method(json!({"restart_every_steps": 2, "reset_every_steps": 5, "restart_schedule": "plain"}))),
        // Resets between merges, and last cycles that are shorter than the others.
        with_method(method(json!({
            "restart_every_steps": 7, "reset_every_steps": 3, "restart_lr": "zero", "allow_short_last_cycle": true
        }))),
        json!({
            "method": method(json!({"train_embeddings": false, "train_head": false})),
            "model": {"tie_word_embeddings": true, "num_key_value_heads": 2},
        }),
        reset(json!({"type": "random", "frac": 0.7, "reset_step_count": false, "joint_mask": false})),
        reset(json!({"type": "magnitude", "frac": 0.7, "reset_step_count": true, "joint_mask": true})),
        json!({"memory": {"frozen_weights": "int8", "recompute": "layers"}}),
        json!({"memory": {"frozen_weights": "nf4", "recompute": "none"}, "precision": "bf16"}),
    ]
}

#[test]
fn a_run_stopped_and_resumed_at_any_step_gives_the_same_bits() {
    for patch in every_method() {
        let spec = spec(patch.clone());
        let whole = scratch_dir();
        let undisturbed = train(whole.path(), &spec);
        // In the warm start, around the wrap at 4, around the restart at 9, and in the last cycle.
        for stop in [2, 3, 4, 5, 8, 9, 10, 13] {
            let dir = scratch_dir();
            let first = try_train(dir.path(), &spec, None, Some(stop)).expect("train");
            assert!(matches!(first.last(), Some(Event::Stopped { step }) if *step == stop), "{:?}", first.last());
            let state = dir.path().join(format!("out/states/{stop}"));
            let rest = try_train(dir.path(), &spec, Some(state), None).expect("resume");
            assert!(!rest.iter().any(|e| matches!(e, Event::Warning { .. })), "{rest:?}");
            let together = [first, rest].concat();
            assert_eq!(nodes_but_states(&together), nodes_but_states(&undisturbed));
            assert_eq!(ranks(&together), ranks(&undisturbed), "{patch}, stopped at {stop}");
            assert!(final_weights(dir.path()) == final_weights(whole.path()), "{patch}, stopped at {stop}");
        }
    }
}

fn nodes_but_states(events: &[Event]) -> Vec<(NodeKind, i64, i64)> {
    nodes(events).into_iter().filter(|(kind, ..)| *kind != NodeKind::State).collect()
}

#[test]
fn evaluating_and_saving_more_often_changes_no_bit() {
    for patch in every_method() {
        let (seldom, often) = (scratch_dir(), scratch_dir());
        train(seldom.path(), &spec(patch.clone()));
        let frequent = TrainSpec {
            eval: EvalSpec { every_steps: 1, max_tokens: 30, prompts: vec![] },
            checkpoints: CheckpointsSpec {
                every_steps: 1,
                keep_last: None,
                keep_every_steps: None,
                keep_best: None,
                ttl_s: None,
            },
            state_every_s: 0,
            ..spec(patch.clone())
        };
        train(often.path(), &frequent);
        assert!(final_weights(seldom.path()) == final_weights(often.path()), "{patch}");
        assert!(often.path().join("out/states/7/state.json").exists());
    }
}
