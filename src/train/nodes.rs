//! The nodes that a run leaves: copied from the weights here, while the loop waits, and written by the writer's thread.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Instant,
};

use tch::Tensor;

use super::{
    error::TrainError,
    events::Events,
    layout,
    state::{self, FROZEN_TENSORS, LoopState, Phase, STATE_JSON, STATE_TENSORS, StateFile},
    weights::Weights,
    writer::{Content, Folder, Node, Writer},
};
use crate::domain::{
    contract::{Fingerprint, NodeFile},
    job::FailureKind,
    lineage::{ADAPTER_FILE, MODEL_FILE, NodeKind},
    spec::TrainSpec,
};

/// Copied beside full weights where the data has them.
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

pub struct Nodes {
    /// None after writing has failed or ended.
    writer: Option<Writer>,
    data_dir: PathBuf,
    eos_token_id: i64,
    fingerprint: Fingerprint,
    /// The restart whose frozen matrices this process has written, or has read from the same place.
    frozen_on_disk: Option<i64>,
    last_state: Instant,
    last_state_step: Option<i64>,
}

impl Nodes {
    pub fn new(
        out_dir: PathBuf,
        events: Events,
        data_dir: PathBuf,
        eos_token_id: i64,
        fingerprint: Fingerprint,
    ) -> Self {
        let writer = Some(Writer::start(out_dir, events));
        Self {
            writer,
            data_dir,
            eos_token_id,
            fingerprint,
            frozen_on_disk: None,
            last_state: Instant::now(),
            last_state_step: None,
        }
    }

    /// Says that the state of this run, and the frozen matrices if it names any, lie in the output directory already.
    pub fn set_on_disk(&mut self, state: &LoopState) {
        self.last_state_step = Some(state.step);
        self.frozen_on_disk = (state.phase == Phase::LowRank).then_some(state.restart);
    }

    pub fn save_base(&mut self, at: &LoopState, weights: &Weights, spec: &TrainSpec) -> Result<(), TrainError> {
        self.save_model(NodeKind::Base, at, weights, spec)
    }

    pub fn save_checkpoint(&mut self, at: &LoopState, weights: &Weights, spec: &TrainSpec) -> Result<(), TrainError> {
        self.save_model(NodeKind::Checkpoint, at, weights, spec)
    }

    /// The model with its factors merged, as `transformers` loads it.
    fn save_model(
        &mut self,
        kind: NodeKind,
        at: &LoopState,
        weights: &Weights,
        spec: &TrainSpec,
    ) -> Result<(), TrainError> {
        let started = Instant::now();
        let scale = spec.method.low_rank().map_or(0.0, |low_rank| low_rank.scale);
        let mut files = vec![
            (MODEL_FILE.into(), Content::Tensors(weights.merged(scale))),
            ("config.json".into(), Content::Json(layout::model_config(&spec.model, self.eos_token_id))),
            ("generation_config.json".into(), Content::Json(layout::generation_config(self.eos_token_id))),
        ];
        for name in TOKENIZER_FILES {
            let source = self.data_dir.join(name);
            if source.exists() {
                files.push((name.into(), Content::Copy(source)));
            }
        }
        self.submit(kind, at, vec![Folder { path: folder(kind, at.step), files }], vec![], started)
    }

    /// The factors as they were merged, and the values of everything else after the restart, as `peft` loads them.
    pub fn save_restart(
        &mut self,
        at: &LoopState,
        weights: &Weights,
        spec: &TrainSpec,
        merged_factors: Vec<(String, Tensor)>,
    ) -> Result<(), TrainError> {
        let started = Instant::now();
        let Some(low_rank) = spec.method.low_rank() else { return Ok(()) };
        let mut tensors = weights.full_rank_values();
        if spec.model.tie_word_embeddings {
            // `peft` keeps the two tied only if it finds both.
            let embedding = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight");
            let head = embedding.map(|(_, value)| ("lm_head.weight".to_owned(), value.shallow_clone()));
            tensors.extend(head);
        }
        tensors.extend(merged_factors);
        for (name, _) in &mut tensors {
            *name = layout::adapter_name(name);
        }
        let files = vec![
            (ADAPTER_FILE.into(), Content::Tensors(tensors)),
            ("adapter_config.json".into(), Content::Json(layout::adapter_config(&spec.model, low_rank))),
        ];
        let folders = vec![Folder { path: folder(NodeKind::Restart, at.restart), files }];
        self.submit(NodeKind::Restart, at, folders, vec![], started)
    }

    pub fn state_is_due(&self, spec: &TrainSpec) -> bool {
        self.last_state.elapsed().as_secs() as i64 >= spec.state_every_s
    }

    /// The first state of a cycle brings the frozen matrices along. A step has one state: batches that are skipped after
    /// it are skipped again by whoever goes on from it.
    pub fn save_state(&mut self, at: &LoopState, weights: &Weights, spec: &TrainSpec) -> Result<(), TrainError> {
        if self.last_state_step.replace(at.step) == Some(at.step) {
            return Ok(());
        }
        let started = Instant::now();
        let json = serde_json::to_value(StateFile::new(at, weights, &self.fingerprint, spec))
            .map_err(|error| TrainError::new(FailureKind::Internal, format!("write {STATE_JSON}: {error}")))?;
        let mut folders = Vec::new();
        let mut shared_files = Vec::new();
        if weights.low_rank.is_some() {
            let path = state::frozen_folder(at.restart);
            if self.frozen_on_disk == Some(at.restart) {
                shared_files.push(NodeFile { name: FROZEN_TENSORS.into(), path: format!("{path}/{FROZEN_TENSORS}") });
            } else {
                let files = vec![(FROZEN_TENSORS.into(), Content::Tensors(state::frozen_tensors(weights)))];
                folders.push(Folder { path, files });
                self.frozen_on_disk = Some(at.restart);
            }
        }
        let files = vec![
            (STATE_TENSORS.into(), Content::Tensors(state::state_tensors(weights))),
            (STATE_JSON.into(), Content::Json(json)),
        ];
        folders.push(Folder { path: folder(NodeKind::State, at.step), files });
        self.last_state = Instant::now();
        self.submit(NodeKind::State, at, folders, shared_files, started)
    }

    fn submit(
        &mut self,
        kind: NodeKind,
        at: &LoopState,
        folders: Vec<Folder>,
        shared_files: Vec<NodeFile>,
        started: Instant,
    ) -> Result<(), TrainError> {
        let stall_ms = Arc::new(AtomicI64::default());
        let node =
            Node { kind, step: at.step, restart: at.restart, folders, shared_files, stall_ms: Arc::clone(&stall_ms) };
        let submitted = self.writer.as_ref().map(|writer| writer.submit(node));
        stall_ms.store(started.elapsed().as_millis() as i64, Ordering::Relaxed);
        match submitted {
            Some(true) => Ok(()),
            _ => self.finish(),
        }
    }

    /// Fails as soon as writing has failed.
    pub fn check(&mut self) -> Result<(), TrainError> {
        match &self.writer {
            Some(writer) if !writer.has_failed() => Ok(()),
            _ => self.finish(),
        }
    }

    /// Waits until every node is written.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        match self.writer.take() {
            Some(writer) => writer.finish(),
            None => Err(TrainError::new(FailureKind::Storage, "nodes can no longer be written")),
        }
    }
}

/// A run that fails leaves the nodes that were handed over before.
impl Drop for Nodes {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.writer.take().map(Writer::finish) {
            tracing::error!(%error, "nodes cannot be written");
        }
    }
}

fn folder(kind: NodeKind, number: i64) -> String {
    format!("{}/{number}", kind.folder())
}
