//! How much rank the merged updates have: the singular values of W - W(warm start) above a threshold, counted per kind
//! of matrix (the paper's figure of singular values). On a thread of its own, from copies: training does not wait.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tch::{Kind, Tensor};

use super::{error::TrainError, events::Events, host_copy::copy_to_host, relora::Wrapped, weights::LowRankWeights};
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

/// Reports that may be under way at once: one that is counted, and one that waits with its copy of the matrices.
const MAX_UNDER_WAY: usize = 2;

const POLL: Duration = Duration::from_millis(10);

pub struct RankReporter {
    events: Events,
    /// The matrices at the warm start.
    start: Vec<Tensor>,
    merged: Sender<Merged>,
    num_under_way: Arc<AtomicUsize>,
    is_abandoned: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl RankReporter {
    pub fn start(events: Events, wrapped: Vec<Wrapped>, start: Vec<Tensor>, threshold: f64) -> Self {
        let (merged, queue) = mpsc::channel::<Merged>();
        let (is_abandoned, num_under_way) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let thread = {
            let (events, is_abandoned, num_under_way) =
                (events.clone(), Arc::clone(&is_abandoned), Arc::clone(&num_under_way));
            let start: Vec<_> = start.iter().map(Tensor::shallow_clone).collect();
            thread::spawn(move || {
                for Merged { step, restart, matrices } in queue {
                    let kinds = count(&wrapped, &start, &matrices, threshold, &is_abandoned);
                    if is_abandoned.load(Ordering::Relaxed) {
                        break;
                    }
                    events.emit(&Event::Ranks { step, restart, threshold, kinds });
                    num_under_way.fetch_sub(1, Ordering::Relaxed);
                }
            })
        };
        Self { events, start, merged, num_under_way, is_abandoned, thread }
    }

    /// The wrapped matrices at the warm start.
    pub fn start_matrices(&self) -> &[Tensor] {
        &self.start
    }

    /// Has the ranks after a restart counted. Where counting cannot keep up, or has failed, a report is left out: it is
    /// no reason to stop training.
    pub fn submit(&self, step: i64, restart: i64, low_rank: &LowRankWeights) {
        if self.thread.is_finished() || self.num_under_way.load(Ordering::Relaxed) >= MAX_UNDER_WAY {
            let message = format!("the ranks after restart {restart} are not reported: counting them cannot keep up");
            return self.events.emit(&Event::Warning { step, message });
        }
        self.num_under_way.fetch_add(1, Ordering::Relaxed);
        // Who has ended meanwhile has failed, which is said at the end.
        let _ = self.merged.send(Merged { step, restart, matrices: wrapped_matrices(low_rank) });
    }

    /// Waits until everything is reported, or until a stop is asked for.
    pub fn finish(self, step: i64, mut is_stopping: impl FnMut() -> bool) {
        let Self { events, merged, is_abandoned, thread, .. } = self;
        drop(merged);
        while !thread.is_finished() {
            if is_stopping() {
                is_abandoned.store(true, Ordering::Relaxed);
            }
            thread::sleep(POLL);
        }
        if let Err(panic) = thread.join() {
            let message = format!("ranks are not reported: {}", TrainError::from_panic(&*panic));
            events.emit(&Event::Warning { step, message });
        }
    }

    /// Leaves out what is not reported yet. Whoever goes on from here counts the last restart again.
    pub fn abandon(self, step: i64) {
        self.finish(step, || true);
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
