//! What the trainer's tests share: a small spec, data, and runs in process.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{self, Sender},
    },
};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::{
    error::TrainError,
    events::Events,
    process::{self, Args, OpsArgs},
    random::{Draws, Purpose},
};
use crate::domain::{
    contract::{Command, Event, RankCount},
    lineage::NodeKind,
    spec::{Linear, TrainSpec},
};

pub const VOCAB_SIZE: i64 = 61;
const ALL_LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// ReLoRA with a warm start of 4 and cycles of 5 steps, changed as the JSON merge patch says.
pub fn spec(patch: Value) -> TrainSpec {
    let mut spec = json!({
        "spec_version": 1, "name": "test", "dataset": "ds_1", "tokenization": "tz_1",
        "model": {
            "preset": null, "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "initializer_range": 0.1, "tie_word_embeddings": false
        },
        "method": {
            "type": "relora", "rank": 3, "scale": 2.0, "dropout": 0.0, "target_modules": ALL_LINEARS,
            "train_embeddings": true, "train_head": true, "warm_start_steps": 4, "relora_warmup_steps": 2,
            "restart_every_steps": 5, "reset_every_steps": 5, "restart_warmup_steps": 2, "restart_schedule": "jagged",
            "restart_lr": "one_over_w", "optimizer_reset": {"type": "zero", "reset_step_count": true},
            "allow_short_last_cycle": false, "rank_threshold": null
        },
        "optimizer": {
            "learning_rate": 0.01, "warm_start_learning_rate": 0.005, "betas": [0.9, 0.99], "eps": 1e-8,
            "weight_decay": 0.01, "clip_norm": 1.0
        },
        "schedule": {"num_steps": 14, "warmup_steps": 2, "min_lr_frac": 0.1},
        "batch": {"num_seqs": 5, "sequence_length": 9, "micro_batch_seqs": 2, "skip_seqs": 0},
        "memory": {"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"},
        "precision": "fp32", "deterministic": true, "seed": 11,
        "eval": {"every_steps": 100, "max_tokens": 90, "prompts": []},
        "checkpoints": {"every_steps": 100}, "state_every_s": 3600,
        "resources": {"device": "cpu", "num_gpus": 1}, "priority": 0, "labels": {}, "max_runtime_s": null,
        "max_stall_s": 900, "retries": {"infrastructure": 5, "user": 0}
    });
    merge(&mut spec, patch);
    let spec: TrainSpec = serde_json::from_value(spec).expect("a spec");
    TrainSpec { model: spec.trained_model(), ..spec }
}

/// ReLoRA's method as in [`spec`], changed as the JSON merge patch says.
pub fn method(patch: Value) -> Value {
    let mut method = serde_json::to_value(spec(json!({})).method).expect("a method");
    let Value::Object(patch) = patch else { panic!("not an object: {patch}") };
    patch.into_iter().for_each(|(key, value)| method[key] = value);
    method
}

pub fn with_method(method: Value) -> Value {
    json!({"method": method})
}

fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        // A method of another type has other fields.
        (target, Value::Object(patch)) if patch.contains_key("type") => *target = Value::Object(patch),
        (Value::Object(target), Value::Object(patch)) => {
            patch.into_iter().for_each(|(key, value)| merge(target.entry(key).or_insert(Value::Null), value));
        }
        (target, patch) => *target = patch,
    }
}

/// One thread: tests run beside each other, and equal bits need equal threads.
pub fn scratch_dir() -> TempDir {
    tch::set_num_threads(1);
    tempfile::tempdir().expect("a scratch directory")
}

/// Tokens of which each depends on the one before, so that there is something to learn.
pub fn write_data(dir: &Path) {
    let mut token = 0;
    for (split, num_tokens) in [("train.bin", 500), ("valid.bin", 100)] {
        let mut bytes = Vec::new();
        for index in 0..num_tokens {
            let [word, ..] = Draws::new(99, Purpose::Weights, [num_tokens, index]).block(0);
            token = (token * 3 + i64::from(word % 4)) % VOCAB_SIZE;
            bytes.extend((token as u16).to_le_bytes());
        }
        fs::write(dir.join(split), bytes).expect("write tokens");
    }
    let facts = json!({
        "format_version": 1, "dtype": "u16", "vocab_size": VOCAB_SIZE, "train_tokens": 500, "valid_tokens": 100,
        "eos_token_id": 0
    });
    fs::write(dir.join("tokenization.json"), facts.to_string()).expect("write tokenization");
    fs::write(dir.join("tokenizer.json"), "{}").expect("write tokenizer");
}

/// Records events, and asks for a stop once the step of this number is reported.
struct Recorder {
    events: Arc<Mutex<Vec<Event>>>,
    stop_after: Option<i64>,
    commands: Sender<Command>,
}

impl Write for Recorder {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let event: Event = serde_json::from_slice(line)?;
        if matches!(&event, Event::Step(report) if Some(report.step) == self.stop_after) {
            self.commands.send(Command::Stop).map_err(io::Error::other)?;
        }
        self.events.lock().expect("events").push(event);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs in a directory that holds `data/` and receives `out/`; returns the events.
pub fn try_train(
    dir: &Path,
    spec: &TrainSpec,
    resume: Option<PathBuf>,
    stop_after: Option<i64>,
) -> Result<Vec<Event>, TrainError> {
    let data = dir.join("data");
    if !data.exists() {
        fs::create_dir(&data).expect("create data");
        write_data(&data);
    }
    let args = Args {
        spec: dir.join("spec.json"),
        data,
        out: dir.join("out"),
        resume,
        weights: spec.init_checkpoint.as_ref().map(|_| dir.join("weights")),
        rank: 0,
        world_size: 1,
        threads: None,
        profile: None,
        ops: OpsArgs::default(),
    };
    let (commands, receiver) = mpsc::channel();
    let events = Arc::new(Mutex::new(Vec::new()));
    let recorder = Recorder { events: Arc::clone(&events), stop_after, commands: commands.clone() };
    let job = process::settle(&args, spec, Device::Cpu)?;
    process::train(&args, job, &Events::new(recorder), receiver)?;
    drop(commands);
    Ok(events.lock().expect("events").clone())
}

/// Runs to the end.
pub fn train(dir: &Path, spec: &TrainSpec) -> Vec<Event> {
    try_train(dir, spec, None, None).expect("train")
}

/// The tensors of a safetensors file.
pub fn read_tensors(path: &Path) -> Vec<(String, Tensor)> {
    let bytes = fs::read(path).expect("read tensors");
    let file = SafeTensors::deserialize(&bytes).expect("a whole file");
    let tensor = |view: &safetensors::tensor::TensorView<'_>| {
        let shape: Vec<_> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, Kind::Float)
    };
    file.tensors().into_iter().map(|(name, view)| (name, tensor(&view))).collect()
}

/// The kind, step and restart of every node, as they were reported.
pub fn nodes(events: &[Event]) -> Vec<(NodeKind, i64, i64)> {
    let node = |event: &Event| match event {
        Event::Node(node) => Some((node.kind, node.step, node.restart)),
        _ => None,
    };
    events.iter().filter_map(node).collect()
}

/// The rank reports by restart. One may come twice where a run goes on, and then says the same.
pub fn ranks(events: &[Event]) -> BTreeMap<i64, BTreeMap<Linear, RankCount>> {
    let mut found = BTreeMap::new();
    for event in events {
        if let Event::Ranks { step, restart, kinds, .. } = event {
            assert_eq!(*step, 4 + 5 * restart);
            let earlier = found.insert(*restart, kinds.clone());
            assert!(earlier.is_none_or(|earlier| earlier == *kinds));
        }
    }
    found
}

/// What a run of fourteen steps, as [`spec`] has them, leaves.
pub fn final_weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("out/checkpoints/14/model.safetensors")).expect("final checkpoint")
}

/// Between -1 and 1, another for every seed.
pub fn noise(shape: &[i64], seed: i64) -> Tensor {
    let len = shape.iter().product::<i64>();
    let waves = (Tensor::arange(len, (Kind::Double, Device::Cpu)) * 12.9898 + seed).sin() * 43_758.545;
    ((&waves - waves.floor()) * 2.0 - 1.0).view(shape)
}

/// The largest difference of any element, relative to the largest element.
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    ((got - want).abs().max() / want.abs().max()).double_value(&[])
}
