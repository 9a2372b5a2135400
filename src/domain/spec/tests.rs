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
    assert_eq!(spec.batch.micro_batch_seqs, 16);
    assert_eq!(spec.method.low_rank().unwrap().scale, 0.5);
    assert_eq!(spec.method.restarts().unwrap().warmup_steps, 20);
}

#[test]
fn a_normalised_spec_reads_back_as_it_was_written() {
    let (spec, _) = normalise(good()).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<TrainSpec>(&text).unwrap(), spec);
}

#[test]
fn presets_have_the_papers_parameter_counts() {
    // relora.md 1.13, vocabulary 32100, in millions.
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
fn names_that_the_database_cannot_hold_are_refused() {
    for bad in [with("/name", json!("a\u{0}b")), with("/labels", json!({"a\u{0}": "b"}))] {
        assert_eq!(TrainSpecRequest::parse(bad).1.len(), 1);
    }
    assert_eq!(pointers(with("/name", json!("x".repeat(201)))), ["/name"]);
}
