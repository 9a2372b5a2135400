//! What a spec may say, and what is said about one that is wrong.

use serde_json::{Value, json};

use super::*;
use crate::domain::ids::{DatasetId, TokenizationId};

fn data() -> DataFacts {
    DataFacts {
        dataset: DatasetId::from("ds_1".to_string()),
        tokenization: TokenizationId::from("tz_1".to_string()),
        vocab_size: 4_096,
        max_train_tokens: 100_000,
        max_valid_tokens: 5_000,
    }
}

fn good() -> Value {
    json!({
        "dataset": "ds_1",
        "model": {"preset": "llama-60m"},
        "method": {"type": "relora", "rank": 64, "restart_every_steps": 200, "warm_start_steps": 400},
        "schedule": {"num_steps": 1000},
        "batch": {"num_seqs": 16, "sequence_length": 128},
    })
}

type Mistakes = Vec<(String, String)>;

fn normalise(json: Value) -> Result<(TrainSpec, Vec<String>), Mistakes> {
    let (request, problems) = TrainSpecRequest::parse(json);
    assert_eq!(problems, []);
    let pairs = |problems: Vec<crate::domain::problem::Problem>| {
        problems.into_iter().map(|problem| (problem.pointer, problem.message)).collect()
    };
    request.normalise(Some(&data())).map_err(pairs)
}

fn pointers(json: Value) -> Vec<String> {
    let mut pointers: Vec<_> = normalise(json).unwrap_err().into_iter().map(|(pointer, _)| pointer).collect();
    pointers.sort();
    pointers
}

fn with(pointer: &str, value: Value) -> Value {
    let mut json = good();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    json.pointer_mut(parent).unwrap()[key] = value;
    json
}

#[test]
fn a_short_spec_is_completed_with_defaults() {
    let (spec, _) = normalise(good()).unwrap();
    assert_eq!(spec.model.vocab_size, 4_096);
    assert_eq!(spec.schedule.warmup_steps, 50);
    assert_eq!(spec.optimizer.warm_start_learning_rate, 5e-4);
    assert_eq!(spec.batch.micro_batch_seqs, MicroBatch::AUTO);
    let memory = json!({"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"});
    assert_eq!(serde_json::to_value(spec.memory).unwrap(), memory);
    let relora = spec.method.relora().unwrap();
    assert_eq!(relora.lora.factors.scale, 0.5);
    assert_eq!(relora.lora.factors.target_modules, Linear::ALL);
    assert_eq!((relora.reset_every_steps, relora.restart_warmup_steps), (200, 20));
    assert_eq!(relora.optimizer_reset, OptimizerReset::Zero { reset_step_count: true });
    assert_eq!((relora.restart_lr, relora.restart_schedule), (RestartLr::OneOverW, RestartSchedule::Jagged));
}

#[test]
fn a_normalised_spec_reads_back_as_it_was_written() {
    for method in every_method() {
        let (spec, _) = normalise(with("/method", method)).unwrap();
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(serde_json::from_value::<TrainSpec>(json.clone()).unwrap(), spec);
        // It may also be sent again.
        assert_eq!(normalise(json).unwrap().0, spec);
    }
}

fn every_method() -> Vec<Value> {
    let relora = |reset: Value| {
        json!({"type": "relora", "rank": 64, "warm_start_steps": 400, "restart_every_steps": 100,
            "reset_every_steps": 300, "rank_threshold": 0.1, "restart_schedule": "plain", "optimizer_reset": reset})
    };
    vec![
        json!({"type": "full"}),
        json!({"type": "control", "rank": 64}),
        json!({"type": "factorized", "rank": 64, "target_modules": ["down_proj", "q_proj"], "train_head": false}),
        json!({"type": "lora", "rank": 64, "scale": 0.3, "preset": "published", "warm_start_steps": 10}),
        relora(json!({"type": "zero", "reset_step_count": false})),
        relora(json!({"type": "magnitude", "frac": 0.9})),
        relora(json!({"type": "random", "frac": 0.999, "joint_mask": false})),
        relora(json!({"type": "none"})),
    ]
}

#[test]
fn the_preset_published_does_as_the_papers_code_did() {
    let mut json = with("/method/preset", json!("published"));
    let (spec, _) = normalise(json.clone()).unwrap();
    let relora = spec.method.relora().unwrap();
    assert_eq!(relora.restart_lr, RestartLr::Zero);
    assert_eq!(relora.optimizer_reset, OptimizerReset::Zero { reset_step_count: false });
    assert_eq!(relora.lora.factors.dropout, 0.1);

    json["method"]["dropout"] = json!(0.0);
    json["method"]["optimizer_reset"] = json!({"type": "magnitude", "frac": 0.8});
    let (spec, _) = normalise(json).unwrap();
    let relora = spec.method.relora().unwrap();
    assert_eq!(relora.lora.factors.dropout, 0.0);
    let independent = OptimizerReset::Magnitude { frac: 0.8, reset_step_count: false, joint_mask: false };
    assert_eq!(relora.optimizer_reset, independent);
}

#[test]
fn a_control_has_as_many_parameters_as_lora_trains() {
    for (preset, vocab_size) in
        [("llama-60m", 32_100), ("llama-130m", 4_096), ("llama-350m", 32_100), ("llama-1b", 32_100)]
    {
        let mut json = with("/method", json!({"type": "control", "rank": 64}));
        json["model"] = json!({"preset": preset, "vocab_size": vocab_size});
        let (spec, _) = normalise(json).unwrap();
        let (model, control) = (&spec.model, spec.trained_model());
        let trained = model.num_params() - model.num_linear_params() + model.num_lora_params(64);
        let error = (control.num_params() - trained).abs() as f64 / trained as f64;
        assert!(error < 2e-3, "{preset}: {control:?} has {}, wanted {trained}", control.num_params());
        assert!(control.hidden_size < model.hidden_size);
        let aspect = |model: &ModelSpec| model.intermediate_size as f64 / model.hidden_size as f64;
        assert!((aspect(&control) / aspect(model)).ln().abs() < 0.5, "{preset}: {control:?}");
    }
}

#[test]
fn a_choice_that_the_method_does_not_have_is_refused_by_name() {
    let refused = |method: Value| pointers(with("/method", method));
    assert_eq!(refused(json!({"type": "control", "rank": 8, "dropout": 0.1})), ["/method/dropout"]);
    assert_eq!(refused(json!({"type": "factorized", "rank": 8, "warm_start_steps": 5})), ["/method/warm_start_steps"]);
    assert_eq!(refused(json!({"type": "lora", "rank": 8, "alpha": 8, "scale": 1})), ["/method/scale"]);
    assert_eq!(refused(json!({"type": "lora", "rank": 8, "target_modules": []})), ["/method/target_modules"]);
    let reset = |reset: Value| pointers(with("/method/optimizer_reset", reset));
    assert_eq!(reset(json!({"type": "magnitude"})), ["/method/optimizer_reset/frac"]);
    assert_eq!(reset(json!({"type": "random", "frac": 1.5})), ["/method/optimizer_reset/frac"]);
    assert_eq!(reset(json!({"type": "zero", "frac": 0.5})), ["/method/optimizer_reset/frac"]);
    assert_eq!(reset(json!({"type": "none", "reset_step_count": true})), ["/method/optimizer_reset/reset_step_count"]);
    assert_eq!(pointers(with("/method/reset_every_steps", json!(350))), ["/method/reset_every_steps"]);
    let mut tied = with("/model/tie_word_embeddings", json!(true));
    tied["method"]["train_embeddings"] = json!(false);
    tied["method"]["train_head"] = json!(true);
    assert_eq!(pointers(tied), ["/method/train_head"]);
}

#[test]
fn names_are_those_of_the_wire() {
    for linear in Linear::ALL {
        assert_eq!(serde_json::to_value(linear).unwrap(), linear.name());
        assert!(linear.path().ends_with(linear.name()));
    }
    for method in every_method() {
        let kind: request::MethodType = serde_json::from_value(method["type"].clone()).unwrap();
        assert_eq!(kind.name(), method["type"]);
    }
}

/// Every example is a spec that the service takes.
#[test]
fn the_examples_are_valid_specs() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut num_examples = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let (request, problems) = TrainSpecRequest::parse(json);
        assert_eq!(problems, [], "{}", path.display());
        let data = DataFacts { max_train_tokens: i64::MAX, max_valid_tokens: i64::MAX, vocab_size: 32_100, ..data() };
        assert!(request.normalise(Some(&data)).is_ok(), "{}: {:?}", path.display(), request.normalise(Some(&data)));
        num_examples += 1;
    }
    assert!(num_examples > 1);
}

#[test]
fn presets_have_the_papers_parameter_counts() {
    // The sizes of the paper (Lialin et al. 2023, table 1) at a vocabulary of 32,100, in millions.
    #[rustfmt::skip]
    let want = [
        ("llama-9m", 9.0), ("llama-20m", 19.6), ("llama-35m", 35.3), ("llama-40m", 42.5), ("llama-60m", 58.2),
        ("llama-71m", 70.7), ("llama-100m", 100.1), ("llama-130m", 134.3), ("llama-250m", 247.5),
        ("llama-350m", 368.2), ("llama-1b", 1339.5), ("llama-3b", 2686.0), ("llama-7b", 6739.0),
    ];
    assert_eq!(PRESETS.len(), want.len());
    for (name, millions) in want {
        let mut json = with("/model/preset", json!(name));
        json["model"]["vocab_size"] = json!(32_100);
        let (spec, _) = normalise(json).unwrap();
        let got = spec.model.num_params() as f64 / 1e6;
        assert!((got - millions).abs() <= 0.5e-3 * millions + 0.05, "{name}: {got} M, want {millions} M");
    }
}

#[test]
fn every_problem_is_found_at_once() {
    let json = json!({
        "dataset": "ds_1",
        "model": {"preset": "llama-60m"},
        "method": {"type": "relora", "rank": 512, "restart_every_steps": 300, "warm_start_steps": 0},
        "schedule": {"num_steps": 1000, "min_lr_frac": 0.0},
        "batch": {"num_seqs": 16, "sequence_length": 8192, "micro_batch_seqs": 17},
        "resources": {"num_gpus": 9},
        "optimizer": {"betas": [0.9, 1.0]},
    });
    assert_eq!(
        pointers(json),
        [
            "/batch/micro_batch_seqs",
            "/batch/sequence_length",
            "/method/rank",
            "/method/restart_every_steps",
            "/optimizer/betas/1",
            "/resources/num_gpus",
            "/schedule/min_lr_frac",
        ]
    );
}

#[test]
fn an_empty_spec_is_told_everything_that_is_required() {
    assert_eq!(
        pointers(json!({})),
        ["/batch/num_seqs", "/batch/sequence_length", "/method/type", "/model", "/schedule/num_steps"]
    );
}

#[test]
fn a_short_last_cycle_is_allowed_only_by_name() {
    let mut json = with("/schedule/num_steps", json!(1100));
    assert_eq!(pointers(json.clone()), ["/method/restart_every_steps"]);
    json["method"]["allow_short_last_cycle"] = json!(true);
    assert!(normalise(json).is_ok());
}

#[test]
fn fields_of_another_method_are_refused() {
    let json = with("/method", json!({"type": "full", "rank": 8, "restart_every_steps": 10}));
    assert_eq!(pointers(json), ["/method/rank", "/method/restart_every_steps"]);
}

#[test]
fn a_rank_that_gains_nothing_is_a_warning_and_no_error() {
    let (_, warnings) = normalise(with("/method/rank", json!(500))).unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("no gain in speed")), "{warnings:?}");
}

#[test]
fn without_a_policy_all_checkpoints_are_kept_and_a_policy_must_make_sense() {
    let spec = |checkpoints: Value| normalise(with("/checkpoints", checkpoints));
    let all =
        json!({"every_steps": 1000, "keep_last": null, "keep_every_steps": null, "keep_best": null, "ttl_s": null});
    assert_eq!(serde_json::to_value(normalise(good()).unwrap().0.checkpoints).unwrap(), all);

    let policy = json!({"every_steps": 100, "keep_last": 3, "keep_every_steps": 500, "keep_best": 2, "ttl_s": 86400});
    let (given, warnings) = spec(policy.clone()).unwrap();
    assert_eq!(serde_json::to_value(given.checkpoints).unwrap(), policy);
    assert!(warnings.iter().any(|warning| warning.starts_with("/checkpoints/keep_best")), "{warnings:?}");

    let refused = |checkpoints: Value| pointers(with("/checkpoints", checkpoints));
    assert_eq!(
        refused(json!({"keep_last": 0, "keep_every_steps": 0, "keep_best": -1, "ttl_s": 0})),
        ["/checkpoints/keep_best", "/checkpoints/keep_every_steps", "/checkpoints/keep_last", "/checkpoints/ttl_s"]
    );
    assert_eq!(refused(json!({"keep_best": 2})), ["/checkpoints/keep_best"]);
    let odd = json!({"every_steps": 100, "keep_last": 1, "keep_every_steps": 250});
    assert_eq!(refused(odd), ["/checkpoints/keep_every_steps"]);
}

#[test]
fn names_that_the_database_cannot_hold_are_refused() {
    for bad in [with("/name", json!("a\u{0}b")), with("/labels", json!({"a\u{0}": "b"}))] {
        assert_eq!(TrainSpecRequest::parse(bad).1.len(), 1);
    }
    assert_eq!(pointers(with("/name", json!("x".repeat(201)))), ["/name"]);
}

#[test]
fn quantised_weights_need_a_method_that_freezes_some_and_are_merged_in_scratch_memory() {
    for frozen in ["int8", "nf4"] {
        let memory = |merged: &str| json!({"frozen_weights": frozen, "merged_weights": merged});
        assert_eq!(pointers(with("/memory", memory("resident"))), ["/memory/merged_weights"]);
        for merged in ["auto", "scratch"] {
            assert!(normalise(with("/memory", memory(merged))).is_ok());
        }
        for method in every_method() {
            let has_frozen = method["type"] == "lora" || method["type"] == "relora";
            let mut json = with("/method", method);
            json["memory"] = memory("auto");
            assert_eq!(normalise(json.clone()).is_ok(), has_frozen, "{json}");
            assert!(has_frozen || pointers(json) == ["/memory/frozen_weights"]);
        }
        let mut without_method = with("/memory", memory("auto"));
        without_method["method"] = json!({});
        assert_eq!(pointers(without_method), ["/method/type"]);
    }
}

#[test]
fn a_choice_takes_the_place_of_auto_and_of_nothing_else() {
    let choices = Choices { micro_batch_seqs: 5, merged_weights: MergedPlan::Scratch };
    let (spec, _) = normalise(good()).unwrap();
    assert_eq!(spec.choices(), None);
    let settled = spec.with_choices(&choices);
    assert_eq!(settled.choices(), Some(choices));
    assert_eq!(TrainSpec { batch: spec.batch.clone(), memory: spec.memory, ..settled.clone() }, spec);
    assert_eq!(serde_json::to_value(&settled).unwrap()["batch"]["micro_batch_seqs"], 5);

    let mut json = with("/batch/micro_batch_seqs", json!(3));
    json["memory"] = json!({"merged_weights": "resident"});
    let given = Choices { micro_batch_seqs: 3, merged_weights: MergedPlan::Resident };
    assert_eq!(normalise(json).unwrap().0.with_choices(&choices).choices(), Some(given));
}
