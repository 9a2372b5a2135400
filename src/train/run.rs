//! The training loop: one function, read from top to bottom. What happens at a step is decided by pure functions of the
//! step in `domain::schedule`.

use std::{
    sync::mpsc::{Receiver, TryRecvError},
    time::Instant,
};

use tch::Tensor;

use super::{
    data::Dataset,
    engine::{DropoutPlace, Engine},
    error::TrainError,
    eval,
    events::Events,
    nodes::Nodes,
    ops::OpsChoice,
    profile::Profile,
    ranks::{RankReporter, wrapped_matrices},
    relora::Wrapping,
    state::{LoopState, Phase},
    weights::Weights,
};
use crate::domain::{
    contract::{Command, Event, StepReport},
    job::FailureKind,
    schedule::Schedule,
    spec::{Choices, OptimizerReset, TrainSpec},
};

/// Batches in a row whose loss or gradient is not finite, after which the run has diverged.
const MAX_SKIPPED_IN_A_ROW: i64 = 10;

/// A run between two steps.
pub struct Run {
    pub spec: TrainSpec,
    /// What the run goes by where the spec says `auto`.
    pub choices: Choices,
    pub schedule: Schedule,
    pub device: tch::Device,
    pub dataset: Dataset,
    pub weights: Weights,
    pub engine: Engine,
    pub ops: OpsChoice,
    pub profile: Profile,
    pub state: LoopState,
    /// Whether everything that falls between the last update and the next one is behind it, as in every state.
    pub is_settled: bool,
    pub nodes: Nodes,
    /// Present once the model is wrapped, where ranks are asked for.
    pub ranks: Option<RankReporter>,
    pub events: Events,
    pub inbox: Inbox,
}

/// What the worker has asked for.
pub struct Inbox {
    commands: Receiver<Command>,
    is_stopping: bool,
    is_checkpoint_wanted: bool,
    is_state_wanted: bool,
}

impl Inbox {
    pub fn new(commands: Receiver<Command>) -> Self {
        Self { commands, is_stopping: false, is_checkpoint_wanted: false, is_state_wanted: false }
    }

    /// Whether a stop has been asked for.
    pub fn is_stopping(&mut self) -> bool {
        self.read().is_stopping
    }

    /// Takes note of what came since the last time. A sender that is gone has asked for a stop.
    fn read(&mut self) -> &mut Self {
        loop {
            match self.commands.try_recv() {
                Ok(Command::SaveState) => self.is_state_wanted = true,
                Ok(Command::Finish) => (self.is_stopping, self.is_checkpoint_wanted) = (true, true),
                Ok(Command::Stop) => self.is_stopping = true,
                Err(TryRecvError::Disconnected) => {
                    self.is_stopping = true;
                    return self;
                }
                Err(TryRecvError::Empty) => return self,
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Done,
    Stopped,
}

impl Run {
    /// Trains until the end or a stop.
    ///
    /// An update moves the step on; what falls between two updates happens once, before the next one, in a fixed
    /// order, so that a state written last holds all of it.
    pub fn train(mut self) -> Result<(Self, Ending), TrainError> {
        let mut report = None;
        loop {
            let step = self.state.step;
            let is_last = step == self.schedule.num_steps;

            if !self.is_settled {
                // The wrap and the restart: the function stays, what is trained changes.
                let wraps = self.schedule.wraps_after(step);
                if wraps {
                    self = self.wrap();
                }
                if let Some(restart) = self.schedule.restart_after(step) {
                    self.restart(restart)?;
                }
                if let Some(reset) = self.schedule.reset_after(step) {
                    self.reset_optimizer(reset);
                }
                if let Some(report) = report.take() {
                    self.events.emit(&Event::Step(StepReport { num_restarts: self.state.restart, ..report }));
                }
                if step % self.spec.eval.every_steps == 0 || wraps || is_last {
                    self.evaluate()?;
                }
                if wraps {
                    self.nodes.save_base(&self.state, &self.weights, &self.spec)?;
                }
                if (step > 0 && step % self.spec.checkpoints.every_steps == 0) || wraps || is_last {
                    self.save_checkpoint()?;
                }
                self.is_settled = true;
            }
            if is_last && !self.state.evaluation_due {
                self.sample()?;
                return Ok((self, Ending::Done));
            }

            let Inbox { is_stopping, is_checkpoint_wanted, is_state_wanted, .. } = self.inbox.read();
            let (is_stopping, is_checkpoint_wanted) = (*is_stopping, *is_checkpoint_wanted);
            let is_state_wanted = std::mem::take(is_state_wanted);
            if is_checkpoint_wanted && self.state.last_checkpoint_step != Some(step) {
                self.save_checkpoint()?;
            }
            if is_stopping || is_state_wanted || self.nodes.state_is_due(&self.spec) {
                self.nodes.save_state(&self.state, &self.weights, self.ranks.as_ref(), &self.spec)?;
            }
            if is_stopping {
                return Ok((self, Ending::Stopped));
            }
            self.nodes.check()?;
            if self.state.evaluation_due {
                self.evaluate()?;
                continue;
            }

            let started = Instant::now();
            let learning_rate = self.schedule.learning_rate(step);
            let span = self.profile.span("update", self.state.phase.name());
            let loss = self.accumulate_gradients();
            let (loss, grad_norm) = self.read(&loss, &self.gradient_square_sum());
            if !(loss.is_finite() && grad_norm.is_finite()) {
                self.skip(loss, grad_norm)?;
                continue;
            }
            self.state.last_good_checkpoint_step = self.state.last_checkpoint_step;
            let clip_factor = self.clip_factor(grad_norm);
            let adamw_span = self.profile.span("optimizer", "AdamW");
            for group in self.weights.groups_mut() {
                group.adamw_update(self.engine.ops(), &self.spec.optimizer, learning_rate, clip_factor);
            }
            self.engine.weights_changed();
            drop((adamw_span, span));
            self.profile.end_update()?;
            self.state.step += 1;
            self.state.num_skipped_in_a_row = 0;
            self.is_settled = false;
            report = Some(StepReport {
                step: self.state.step,
                loss,
                grad_norm,
                learning_rate,
                tokens_per_s: self.tokens_per_batch() as f64 / started.elapsed().as_secs_f64(),
                num_tokens: self.state.num_tokens,
                num_restarts: self.state.restart,
            });
        }
    }

    fn save_checkpoint(&mut self) -> Result<(), TrainError> {
        self.nodes.save_checkpoint(&self.state, &self.weights, &self.spec)?;
        self.state.last_checkpoint_step = Some(self.state.step);
        Ok(())
    }

    /// Freezes the matrices and puts factors beside them.
    fn wrap(mut self) -> Self {
        let Some(wrapping) = Wrapping::of(&self.spec) else { return self };
        tracing::info!(step = self.state.step, "wrap");
        // Without a warm start they are wrapped from the start.
        if self.weights.low_rank.is_none() {
            // Its memory first: it holds gradients and copies of what is replaced.
            drop(self.engine);
            wrapping.wrap(&mut self.weights);
            self.engine = Engine::of(&self.spec, &self.weights, self.ops);
        }
        self.profile.begin_phase();
        self.engine.profile(self.profile.clone());
        self.state.phase = Phase::LowRank;
        let wants_ranks = self.spec.method.rank_threshold().is_some();
        let start = self.weights.low_rank.as_ref().filter(|_| wants_ranks).map(wrapped_matrices);
        self.ranks = start.and_then(|start| self.rank_reporter(start));
        self
    }

    /// None where nobody asks for ranks. `start` are the wrapped matrices at the warm start.
    pub fn rank_reporter(&self, start: Vec<Tensor>) -> Option<RankReporter> {
        let threshold = self.spec.method.rank_threshold()?;
        let wrapped = self.weights.low_rank.as_ref()?.wrapped.clone();
        Some(RankReporter::start(self.events.clone(), wrapped, start, threshold))
    }

    /// After a stop: the ranks of the last restart may not have been reported. The matrices are those that it left.
    pub fn report_ranks_again(&self) {
        if let (Some(ranks), Some(low_rank), 1..) = (&self.ranks, &self.weights.low_rank, self.state.restart) {
            let restart = self.state.restart;
            ranks.submit(self.schedule.restart_step(restart), restart, low_rank);
        }
    }

    /// Merges the factors, saves what was merged, and begins the next cycle if there is one.
    fn restart(&mut self, restart: i64) -> Result<(), TrainError> {
        let Some(low_rank) = &mut self.weights.low_rank else { return Ok(()) };
        let step = self.state.step;
        let merged_factors = low_rank.factor_values();
        let update_norms = low_rank.merge();
        if update_norms.values().any(|norm| !norm.is_finite()) {
            let message = format!(
                "restart {restart} after step {step} merged an update that is not finite; lower the learning rate"
            );
            return Err(self.diverged(&message));
        }
        if step < self.schedule.num_steps {
            low_rank.draw_factors(self.spec.seed, restart);
        } else {
            low_rank.zero_b();
        }
        self.engine.frozen_changed();
        if let Some(ranks) = &self.ranks {
            ranks.submit(step, restart, low_rank);
        }
        self.state.restart = restart;
        tracing::info!(step, restart, ?update_norms, "restart");
        self.nodes.save_restart(&self.state, &self.weights, &self.spec, merged_factors, update_norms)
    }

    /// Resets the optimizer state of the factors, and of nothing else.
    fn reset_optimizer(&mut self, reset: i64) {
        let (Some(low_rank), Some(relora)) = (&mut self.weights.low_rank, self.spec.method.relora()) else { return };
        if relora.optimizer_reset == (OptimizerReset::None {}) {
            return;
        }
        let cleared_frac = low_rank.factors.reset_optimizer(relora.optimizer_reset, self.spec.seed, reset);
        tracing::info!(self.state.step, reset, cleared_frac, "optimizer reset");
        self.events.emit(&Event::OptimizerReset { step: self.state.step, reset, cleared_frac });
    }

    /// Reports the validation loss. A stop does not wait for it: the evaluation is then due to whoever goes on.
    fn evaluate(&mut self) -> Result<(), TrainError> {
        let Self { engine, dataset, spec, device, inbox, events, state, .. } = self;
        let is_interrupted = || {
            events.alive(state.step);
            inbox.is_stopping()
        };
        let evaluation = eval::evaluate(engine, &dataset.valid, spec, *device, is_interrupted);
        self.state.evaluation_due = evaluation.is_none();
        let Some(evaluation) = evaluation else { return Ok(()) };
        let (step, perplexity) = (self.state.step, evaluation.loss.exp());
        if !perplexity.is_finite() {
            let loss = evaluation.loss;
            return Err(
                self.diverged(&format!("the validation loss is {loss} after step {step}; lower the learning rate"))
            );
        }
        let num_tokens = evaluation.num_tokens;
        self.events.emit(&Event::Eval { step, loss: evaluation.loss, perplexity, num_tokens });
        Ok(())
    }

    fn sample(&mut self) -> Result<(), TrainError> {
        let Self { engine, dataset, spec, device, events, state, .. } = self;
        for (prompt, text) in eval::sample(engine, dataset, spec, *device, || events.alive(state.step))? {
            events.emit(&Event::Sample { step: state.step, prompt, text });
        }
        Ok(())
    }

    /// Forward and backward over the next global batch, in micro-batches. Returns the mean loss over all its targets.
    fn accumulate_gradients(&mut self) -> Tensor {
        let batch = &self.spec.batch;
        let num_targets = (batch.num_seqs * (batch.sequence_length - 1)) as f64;
        let first_seq = batch.skip_seqs + self.state.num_batches * batch.num_seqs;
        let span = self.profile.span("optimizer", "gradients to zero");
        for group in self.weights.groups_mut() {
            let _ = group.gradients.zero_();
        }
        drop(span);
        let mut loss = Tensor::zeros([], (tch::Kind::Double, self.device));
        self.dataset.prefetch(first_seq + batch.num_seqs, batch.num_seqs);
        let mut done_seqs = 0;
        while done_seqs < batch.num_seqs {
            let num_seqs = self.choices.micro_batch_seqs.min(batch.num_seqs - done_seqs);
            let span = self.profile.span("data", "read rows");
            let rows = self.dataset.training_rows(first_seq + done_seqs, num_seqs, self.device);
            drop(span);
            let place = DropoutPlace { seed: self.spec.seed, first_seq: first_seq + done_seqs };
            loss += self.engine.forward_backward(&rows, 1.0 / num_targets, place);
            done_seqs += num_seqs;
            self.events.alive(self.state.step);
        }
        self.state.num_batches += 1;
        self.state.num_tokens += self.tokens_per_batch();
        loss / num_targets
    }

    /// Over all trained parameters together, on the device.
    fn gradient_square_sum(&self) -> Tensor {
        let _span = self.profile.span("optimizer", "gradient norm");
        self.weights.groups().map(|group| group.gradient_square_sum(self.engine.ops())).sum()
    }

    /// The loss, and the root of the sum of squares. The one time in an update that the device is waited for: whether
    /// the update is made at all depends on them.
    fn read(&self, loss: &Tensor, square_sum: &Tensor) -> (f64, f64) {
        let _span = self.profile.span("optimizer", "wait for the device");
        let both = Tensor::stack(&[loss, square_sum], 0).to_device(tch::Device::Cpu);
        (both.double_value(&[0]), both.double_value(&[1]).sqrt())
    }

    /// What the gradients are multiplied with, so that their norm is within the spec's bound.
    fn clip_factor(&self, grad_norm: f64) -> f64 {
        match self.spec.optimizer.clip_norm {
            0.0 => 1.0,
            clip_norm => (clip_norm / (grad_norm + 1e-6)).min(1.0),
        }
    }

    /// Goes on with the next batch at the same step, so that schedule and step count stay together.
    fn skip(&mut self, loss: f64, grad_norm: f64) -> Result<(), TrainError> {
        self.state.num_skipped_in_a_row += 1;
        let message = format!("batch skipped: its loss is {loss}, its gradient norm {grad_norm}");
        if self.state.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            let advice = "lower the learning rate, clip harder, or lengthen the warm-up";
            let message = format!("{MAX_SKIPPED_IN_A_ROW} batches in a row were skipped; last {message}; {advice}");
            return Err(self.diverged(&message));
        }
        self.events.emit(&Event::Warning { step: self.state.step, message });
        Ok(())
    }

    fn diverged(&self, message: &str) -> TrainError {
        let last_good = match self.state.last_good_checkpoint_step {
            Some(step) => format!("the last good checkpoint is that of step {step}"),
            None => "there is no good checkpoint yet".into(),
        };
        TrainError::new(FailureKind::Diverged, format!("{message}; {last_good}"))
    }

    fn tokens_per_batch(&self) -> i64 {
        self.spec.batch.num_seqs * self.spec.batch.sequence_length
    }
}
