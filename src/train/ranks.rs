//! How much rank the merged updates have: the singular values of W - W(warm start) above a threshold, counted per kind
//! of matrix (the paper's figure of singular values). On a thread of its own, from copies: training does not wait.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::{self, JoinHandle},
};

use tch::{Kind, Tensor};

use super::{
    error::TrainError,
    events::Events,
    relora::{Wrapped, copy_to_host},
    weights::LowRankWeights,
};
use crate::domain::{
    contract::{Event, RankCount},
    spec::Linear,
};

/// Wrapped matrices after a restart, in host memory.
struct Merged {
    step: i64,
    restart: i64,
    matrices: Vec<Tensor>,
}

pub struct RankReporter {
    events: Events,
    /// The matrices at the warm start.
    start: Vec<Tensor>,
    merged: SyncSender<Merged>,
    is_abandoned: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl RankReporter {
    pub fn start(events: Events, wrapped: Vec<Wrapped>, start: Vec<Tensor>, threshold: f64) -> Self {
        // One may wait while another is counted.
        let (merged, queue) = mpsc::sync_channel::<Merged>(1);
        let is_abandoned = Arc::new(AtomicBool::new(false));
        let thread = {
            let (events, is_abandoned) = (events.clone(), Arc::clone(&is_abandoned));
            let start: Vec<_> = start.iter().map(Tensor::shallow_clone).collect();
            thread::spawn(move || {
                for Merged { step, restart, matrices } in queue {
                    let kinds = count(&wrapped, &start, &matrices, threshold, &is_abandoned);
                    if !is_abandoned.load(Ordering::Relaxed) {
                        events.emit(&Event::Ranks { step, restart, threshold, kinds });
                    }
                }
            })
        };
        Self { events, start, merged, is_abandoned, thread }
    }

    /// The wrapped matrices at the warm start.
    pub fn start_matrices(&self) -> &[Tensor] {
        &self.start
    }

    /// Has the ranks after a restart counted. Where counting cannot keep up, a report is left out: it is no reason to
    /// stop training.
    pub fn submit(&self, step: i64, restart: i64, low_rank: &LowRankWeights) {
        let merged = Merged { step, restart, matrices: wrapped_matrices(low_rank) };
        if let Err(TrySendError::Full(_)) = self.merged.try_send(merged) {
            let message = format!("the ranks after restart {restart} are not reported: counting them takes too long");
            self.events.emit(&Event::Warning { step, message });
        }
    }

    /// Waits until everything is reported.
    pub fn finish(self) -> Result<(), TrainError> {
        drop(self.merged);
        self.thread.join().map_err(|panic| TrainError::from_panic(&*panic))
    }

    /// Leaves out what is not reported yet: whoever goes on from here counts again.
    pub fn abandon(self) -> Result<(), TrainError> {
        self.is_abandoned.store(true, Ordering::Relaxed);
        self.finish()
    }
}

/// Copies of the wrapped matrices in host memory, in their order.
pub fn wrapped_matrices(low_rank: &LowRankWeights) -> Vec<Tensor> {
    low_rank.wrapped.iter().zip(&low_rank.frozen).map(|(_, frozen)| copy_to_host(&frozen.master)).collect()
}

fn count(
    wrapped: &[Wrapped],
    start: &[Tensor],
    now: &[Tensor],
    threshold: f64,
    is_abandoned: &AtomicBool,
) -> BTreeMap<Linear, RankCount> {
    let _guard = tch::no_grad_guard();
    let mut kinds: BTreeMap<Linear, RankCount> = BTreeMap::new();
    for ((wrapped, start), now) in wrapped.iter().zip(start).zip(now) {
        if is_abandoned.load(Ordering::Relaxed) {
            break;
        }
        let (_, values, _) = (now - start).svd(true, false);
        let kind = kinds.entry(wrapped.linear).or_default();
        kind.num_above += values.gt(threshold).sum(Kind::Int64).int64_value(&[]);
        kind.num_values += values.numel() as i64;
    }
    kinds
}
