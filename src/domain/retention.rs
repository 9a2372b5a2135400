//! Which checkpoints of a job go by the policy of its spec, and what keeps a node from being deleted.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ids::NodeId, spec::CheckpointsSpec};

/// A checkpoint of a job, as far as its retention depends on it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredCheckpoint {
    pub id: NodeId,
    pub step: i64,
    pub age_s: f64,
    /// At its step, if there was an evaluation.
    pub eval_loss: Option<f64>,
    pub pinned: bool,
    /// A later attempt went on from an earlier state.
    pub superseded: bool,
}

/// Why a checkpoint goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The later attempt has got as far.
    Replaced,
    /// It is older than `ttl_s`.
    Expired,
    /// It is none of those that the policy keeps.
    NotKept,
}

/// The checkpoints of a job that its policy lets go. Never those that are pinned, and never the newest of the lineage,
/// which is the last one of a job that is finished. While a run that began again has none, the newest of all stays.
pub fn expendable(policy: &CheckpointsSpec, checkpoints: &[StoredCheckpoint]) -> Vec<(NodeId, Reason)> {
    let mut lineage: Vec<_> = checkpoints.iter().filter(|checkpoint| !checkpoint.superseded).collect();
    lineage.sort_by(|a, b| (b.step, &b.id).cmp(&(a.step, &a.id)));
    let reached = lineage.first().map(|newest| newest.step);
    let newest = lineage.first().copied().or_else(|| checkpoints.iter().max_by_key(|checkpoint| checkpoint.step));
    let kept = kept(policy, &lineage);

    let reason = |checkpoint: &StoredCheckpoint| {
        let is_newest = newest.is_some_and(|newest| newest.id == checkpoint.id);
        if checkpoint.pinned || is_newest {
            None
        } else if policy.ttl_s.is_some_and(|ttl_s| checkpoint.age_s > ttl_s as f64) {
            Some(Reason::Expired)
        } else if policy.keep_last.is_none() {
            None
        } else if checkpoint.superseded {
            reached.is_some_and(|step| step >= checkpoint.step).then_some(Reason::Replaced)
        } else {
            (!kept.contains(&&checkpoint.id)).then_some(Reason::NotKept)
        }
    };
    checkpoints.iter().filter_map(|checkpoint| Some((checkpoint.id.clone(), reason(checkpoint)?))).collect()
}

/// Those of a lineage, the newest first, that the policy keeps by their number, their step or their loss.
fn kept<'a>(policy: &CheckpointsSpec, lineage: &[&'a StoredCheckpoint]) -> Vec<&'a NodeId> {
    let count = |count: Option<i64>| count.map_or(0, |count| usize::try_from(count).unwrap_or(0));
    let last = lineage.iter().take(count(policy.keep_last));
    let is_kept_step = |step: i64| policy.keep_every_steps.is_some_and(|every_steps| step % every_steps == 0);
    let by_step = lineage.iter().filter(|checkpoint| is_kept_step(checkpoint.step));
    let mut evaluated: Vec<_> =
        lineage.iter().filter_map(|checkpoint| Some((checkpoint.eval_loss?, *checkpoint))).collect();
    // The sort is stable: of two that are equally good the newer one counts.
    evaluated.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let best = evaluated.iter().take(count(policy.keep_best)).map(|(_, checkpoint)| checkpoint);
    last.chain(by_step).chain(best).map(|checkpoint| &checkpoint.id).collect()
}

/// Why a node is not deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum BlockReason {
    /// There is no such checkpoint in the project.
    NotFound,
    /// It is pinned.
    Pinned,
    /// The job begins with it and is not finished.
    BeginsJob,
    /// The tokenization uses its tokenizer and is not done.
    Tokenizes,
    /// The task verifies or materializes it and is not done.
    HasTask,
    /// The node of another job has it as its parent.
    HasDescendant,
}

/// Something that keeps a node from being deleted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blocker {
    /// The node that is not deleted.
    pub node: NodeId,
    pub reason: BlockReason,
    /// The job, tokenization or node that the reason speaks of.
    pub user: Option<String>,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, reason, user } = self;
        let user = user.as_deref().unwrap_or("something");
        match reason {
            BlockReason::NotFound => write!(f, "there is no checkpoint {node}"),
            BlockReason::Pinned => write!(f, "{node} is pinned; unpin it first"),
            BlockReason::BeginsJob => write!(f, "{user} begins with {node} and is not finished"),
            BlockReason::Tokenizes => write!(f, "{user} uses the tokenizer of {node} and is not done"),
            BlockReason::HasTask => write!(f, "{user} works on {node} and is not done"),
            BlockReason::HasDescendant => write!(f, "{user}, of another job, has {node} as its parent"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP_ALL: CheckpointsSpec =
        CheckpointsSpec { every_steps: 10, keep_last: None, keep_every_steps: None, keep_best: None, ttl_s: None };

    /// Checkpoints after every ten steps, the oldest first, with these losses; each is 100 s older than the next.
    fn checkpoints(losses: &[Option<f64>]) -> Vec<StoredCheckpoint> {
        let num = losses.len();
        let checkpoint = |(index, eval_loss): (usize, &Option<f64>)| StoredCheckpoint {
            id: NodeId::from(format!("n{index:03}")),
            step: 10 * (index as i64 + 1),
            age_s: 100.0 * (num - index) as f64,
            eval_loss: *eval_loss,
            pinned: false,
            superseded: false,
        };
        losses.iter().enumerate().map(checkpoint).collect()
    }

    fn left_steps(policy: &CheckpointsSpec, checkpoints: &[StoredCheckpoint]) -> Vec<i64> {
        let gone = expendable(policy, checkpoints);
        let is_left = |checkpoint: &&StoredCheckpoint| !gone.iter().any(|(id, _)| *id == checkpoint.id);
        checkpoints.iter().filter(is_left).map(|checkpoint| checkpoint.step).collect()
    }

    #[test]
    fn without_a_policy_everything_stays() {
        let mut all = checkpoints(&[None; 5]);
        all[3].superseded = true;
        assert_eq!(expendable(&KEEP_ALL, &all), []);
        assert_eq!(expendable(&CheckpointsSpec { keep_last: Some(1), ..KEEP_ALL }, &[]), []);
    }

    #[test]
    fn the_newest_are_kept_and_beside_them_round_steps_and_the_best() {
        let all = checkpoints(&[Some(3.0), Some(1.0), None, Some(2.0), Some(1.0), Some(4.0), Some(5.0)]);
        let last = CheckpointsSpec { keep_last: Some(2), ..KEEP_ALL };
        assert_eq!(left_steps(&last, &all), [60, 70]);
        assert_eq!(left_steps(&CheckpointsSpec { keep_every_steps: Some(30), ..last.clone() }, &all), [30, 60, 70]);
        // Of the two that are equally good the newer one.
        assert_eq!(left_steps(&CheckpointsSpec { keep_best: Some(1), ..last.clone() }, &all), [50, 60, 70]);
        assert_eq!(left_steps(&CheckpointsSpec { keep_best: Some(3), ..last.clone() }, &all), [20, 40, 50, 60, 70]);
        // What was not evaluated is not among the best, however many are asked for.
        assert_eq!(left_steps(&CheckpointsSpec { keep_best: Some(99), ..last }, &all), [10, 20, 40, 50, 60, 70]);
    }

    #[test]
    fn age_outweighs_everything_but_a_pin_and_being_the_newest() {
        let mut all = checkpoints(&[Some(1.0), None, None, None]);
        all[1].pinned = true;
        let policy = CheckpointsSpec { ttl_s: Some(250), keep_last: Some(4), keep_best: Some(1), ..KEEP_ALL };
        assert_eq!(expendable(&policy, &all), [(all[0].id.clone(), Reason::Expired)]);
        assert_eq!(left_steps(&CheckpointsSpec { ttl_s: Some(10), ..KEEP_ALL }, &all), [20, 40]);
    }

    #[test]
    fn of_a_run_that_began_again_the_newest_stays_until_there_is_another() {
        let policy = CheckpointsSpec { ttl_s: Some(10), ..KEEP_ALL };
        let mut all = checkpoints(&[None; 3]);
        all.iter_mut().for_each(|checkpoint| checkpoint.superseded = true);
        assert_eq!(left_steps(&policy, &all), [30]);
        all.push(StoredCheckpoint { id: NodeId::from("n9".to_owned()), superseded: false, ..all[0].clone() });
        assert_eq!(left_steps(&policy, &all), [10]);
    }

    #[test]
    fn a_superseded_one_stays_until_the_later_attempt_has_got_as_far() {
        let policy = CheckpointsSpec { keep_last: Some(9), ..KEEP_ALL };
        let mut all = checkpoints(&[None; 4]);
        all[1].superseded = true;
        all[3].superseded = true;
        assert_eq!(expendable(&policy, &all), [(all[1].id.clone(), Reason::Replaced)]);
        all[1].pinned = true;
        all.push(StoredCheckpoint { id: NodeId::from("n9".to_owned()), superseded: false, ..all[3].clone() });
        assert_eq!(expendable(&policy, &all), [(all[3].id.clone(), Reason::Replaced)]);
    }

    /// Numbers that look drawn, and are the same every time.
    struct Draws(u64);

    impl Draws {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % end
        }

        fn perhaps(&mut self, end: u64) -> Option<i64> {
            (self.below(3) > 0).then(|| 1 + self.below(end) as i64)
        }
    }

    #[test]
    fn for_any_policy_pins_and_the_newest_stay_and_what_is_left_stays_when_asked_again() {
        let mut draws = Draws(7);
        for _ in 0..5_000 {
            let losses: Vec<_> = (0..draws.below(9)).map(|_| draws.perhaps(4).map(|loss| loss as f64)).collect();
            let mut all = checkpoints(&losses);
            for checkpoint in &mut all {
                checkpoint.pinned = draws.below(5) == 0;
                checkpoint.superseded = draws.below(4) == 0;
            }
            let policy = CheckpointsSpec {
                every_steps: 10,
                keep_last: draws.perhaps(4),
                keep_every_steps: draws.perhaps(4).map(|n| 10 * n),
                keep_best: draws.perhaps(4),
                ttl_s: draws.perhaps(900),
            };
            let gone = expendable(&policy, &all);
            let newest = all.iter().rev().find(|checkpoint| !checkpoint.superseded).or(all.last());
            let is_gone = |checkpoint: &StoredCheckpoint| gone.iter().any(|(id, _)| *id == checkpoint.id);
            assert!(newest.is_none_or(|newest| !is_gone(newest)), "{policy:?} {all:?}");
            assert!(!all.iter().any(|checkpoint| checkpoint.pinned && is_gone(checkpoint)), "{policy:?} {all:?}");

            let left: Vec<_> = all.iter().filter(|checkpoint| !is_gone(checkpoint)).cloned().collect();
            assert_eq!(expendable(&policy, &left), [], "{policy:?} {all:?}");
            // A policy that keeps more lets nothing go that the other keeps.
            let more = CheckpointsSpec { keep_last: policy.keep_last.map(|n| n + 1), ..policy.clone() };
            assert!(expendable(&more, &all).iter().all(|(id, _)| gone.iter().any(|(other, _)| other == id)));
        }
    }
}
