//! The nodes that a run leaves: copied from the weights here, while the loop waits, and written by the writer's thread.

use std::{
    collections::{BTreeMap, BTreeSet},
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
    ranks::RankReporter,
    state::{self, LoopState, Phase, STATE_JSON, STATE_TENSORS, StateFile},
    weights::{LowRankWeights, Weights},
    writer::{Content, Files, Folder, Node, Writer},
};
use crate::domain::{
    contract::{Fingerprint, NodeFile},
    job::FailureKind,
    lineage::{self, ADAPTER_CONFIG_FILE, ADAPTER_FILE, FROZEN_FILE, MODEL_FILE, NodeKind, START_FILE},
    spec::{Linear, TrainSpec},
};

/// Copied beside full weights where the data has them.
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

pub struct Nodes {
    /// None after writing has failed or ended.
    writer: Option<Writer>,
    data_dir: PathBuf,
    eos_token_id: i64,
    fingerprint: Fingerprint,
    /// The restarts whose frozen matrices this process has written, or has read from the same place.
    frozen_on_disk: BTreeSet<i64>,
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
            frozen_on_disk: BTreeSet::new(),
            last_state: Instant::now(),
            last_state_step: None,
        }
    }

    /// Says that the state of this run, and the frozen matrices if it names any, lie in the output directory already.
    pub fn set_on_disk(&mut self, state: &LoopState, spec: &TrainSpec) {
        self.last_state_step = Some(state.step);
        if state.phase == Phase::LowRank {
            self.frozen_on_disk.insert(state.restart);
            self.frozen_on_disk.extend(spec.method.rank_threshold().map(|_| 0));
        }
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
        let mut files = vec![
            (MODEL_FILE.into(), Content::Tensors(weights.merged())),
            ("config.json".into(), Content::Json(layout::model_config(&spec.model, self.eos_token_id))),
            ("generation_config.json".into(), Content::Json(layout::generation_config(self.eos_token_id))),
        ];
        for name in TOKENIZER_FILES {
            let source = self.data_dir.join(name);
            if source.exists() {
                files.push((name.into(), Content::Copy(source)));
            }
        }
        let folders = vec![Folder { path: folder(kind, at.step), files }];
        self.submit(kind, at, Files { folders, ..Files::default() }, started)
    }

    /// The factors as they were merged, and the values of everything else after the restart, as `peft` loads them.
    pub fn save_restart(
        &mut self,
        at: &LoopState,
        weights: &Weights,
        spec: &TrainSpec,
        merged_factors: Vec<(String, Tensor)>,
        update_norms: BTreeMap<Linear, f64>,
    ) -> Result<(), TrainError> {
        let started = Instant::now();
        let Some(factors) = spec.method.factors() else { return Ok(()) };
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
            (ADAPTER_CONFIG_FILE.into(), Content::Json(layout::adapter_config(&spec.model, factors))),
        ];
        let folders = vec![Folder { path: folder(NodeKind::Restart, at.restart), files }];
        let files = Files { folders, update_norms, ..Files::default() };
        self.submit(NodeKind::Restart, at, files, started)
    }

    pub fn state_is_due(&self, spec: &TrainSpec) -> bool {
        self.last_state.elapsed().as_secs() as i64 >= spec.state_every_s
    }

    /// The first state of a cycle brings the frozen matrices along. A step has one state: batches that are skipped after
    /// it are skipped again by whoever goes on from it.
    pub fn save_state(
        &mut self,
        at: &LoopState,
        weights: &Weights,
        ranks: Option<&RankReporter>,
        spec: &TrainSpec,
    ) -> Result<(), TrainError> {
        if self.last_state_step.replace(at.step) == Some(at.step) {
            return Ok(());
        }
        let started = Instant::now();
        let json = serde_json::to_value(StateFile::new(at, weights, &self.fingerprint, spec))
            .map_err(|error| TrainError::new(FailureKind::Internal, format!("write {STATE_JSON}: {error}")))?;
        let mut files = Files::default();
        if let Some(low_rank) = weights.low_rank.as_ref().filter(|low_rank| !low_rank.frozen.is_empty()) {
            self.add_frozen(&mut files, FROZEN_FILE, at.restart, || state::frozen_tensors(low_rank));
            if let Some(ranks) = ranks.filter(|_| at.restart > 0) {
                self.add_frozen(&mut files, START_FILE, 0, || at_warm_start(low_rank, ranks));
            }
        }
        let own = vec![
            (STATE_TENSORS.into(), Content::Tensors(state::state_tensors(weights))),
            (STATE_JSON.into(), Content::Json(json)),
        ];
        files.folders.push(Folder { path: folder(NodeKind::State, at.step), files: own });
        self.last_state = Instant::now();
        self.submit(NodeKind::State, at, files, started)
    }

    /// Names the frozen matrices after a restart as a file of the state, and writes them if they are not on disk.
    fn add_frozen(
        &mut self,
        files: &mut Files,
        name: &str,
        restart: i64,
        tensors: impl FnOnce() -> Vec<(String, Tensor)>,
    ) {
        files.shared_files.push(NodeFile { name: name.into(), path: lineage::frozen_path(restart) });
        if self.frozen_on_disk.insert(restart) {
            let content = vec![(FROZEN_FILE.into(), Content::Tensors(tensors()))];
            files.shared_folders.push(Folder { path: format!("frozen/{restart}"), files: content });
        }
    }

    fn submit(&mut self, kind: NodeKind, at: &LoopState, files: Files, started: Instant) -> Result<(), TrainError> {
        let stall_ms = Arc::new(AtomicI64::default());
        let node = Node { kind, step: at.step, restart: at.restart, files, stall_ms: Arc::clone(&stall_ms) };
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

/// The frozen matrices as they were at the warm start. What is not wrapped has not changed since.
fn at_warm_start(low_rank: &LowRankWeights, ranks: &RankReporter) -> Vec<(String, Tensor)> {
    let mut tensors = state::frozen_tensors(low_rank);
    for ((_, tensor), start) in tensors.iter_mut().zip(ranks.start_matrices()) {
        *tensor = start.shallow_clone();
    }
    tensors
}

fn folder(kind: NodeKind, number: i64) -> String {
    format!("{}/{number}", kind.folder())
}
