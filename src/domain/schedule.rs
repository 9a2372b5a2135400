//! What happens at which step: learning rate, wrap, restarts, resets. Pure functions of the step.
//!
//! A *step* is one optimizer update. `learning_rate(t)` is the rate of the update with the 0-based
//! index `t`; everything else is asked "after `done` updates".

use std::f64::consts::PI;

use super::spec::{ReloraSpec, RestartLr, RestartSchedule, TrainSpec};

/// The schedule of one job.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    pub num_steps: i64,
    /// Updates of the first phase, before the model is wrapped; `num_steps` if it never is.
    pub first_phase_steps: i64,
    first_lr: f64,
    first_warmup_steps: i64,
    min_lr_frac: f64,
    low_rank_lr: f64,
    low_rank_warmup_steps: i64,
    restarts: Option<Restarts>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Restarts {
    every_steps: i64,
    reset_every_steps: i64,
    warmup_steps: i64,
    schedule: RestartSchedule,
    lr: RestartLr,
}

impl Restarts {
    fn of(relora: &ReloraSpec) -> Self {
        Self {
            every_steps: relora.restart_every_steps,
            reset_every_steps: relora.reset_every_steps,
            warmup_steps: relora.restart_warmup_steps,
            schedule: relora.restart_schedule,
            lr: relora.restart_lr,
        }
    }

    /// The learning rate of the low-rank phase, as a share of its peak.
    fn factor(self, t: i64, total: i64, first_warmup_steps: i64, min_lr_frac: f64) -> f64 {
        match self.schedule {
            RestartSchedule::Jagged => jagged_cosine(t, total, first_warmup_steps, self, min_lr_frac),
            RestartSchedule::Cyclical => cyclical_cosine(t, self.reset_every_steps, first_warmup_steps, min_lr_frac),
            RestartSchedule::Plain => cosine_with_warmup(t, total, first_warmup_steps, min_lr_frac),
        }
    }
}

impl Schedule {
    pub fn new(spec: &TrainSpec) -> Self {
        let num_steps = spec.schedule.num_steps;
        let lora = spec.method.lora();
        Self {
            num_steps,
            first_phase_steps: lora.map_or(num_steps, |lora| lora.warm_start_steps),
            first_lr: match lora {
                Some(_) => spec.optimizer.warm_start_learning_rate,
                None => spec.optimizer.learning_rate,
            },
            first_warmup_steps: spec.schedule.warmup_steps,
            min_lr_frac: spec.schedule.min_lr_frac,
            low_rank_lr: spec.optimizer.learning_rate,
            low_rank_warmup_steps: lora.map_or(0, |lora| lora.relora_warmup_steps),
            restarts: spec.method.relora().map(Restarts::of),
        }
    }

    /// Learning rate of the update with index `t`, 0-based.
    ///
    /// The warm start follows the cosine of the whole run and is stopped high on it; the low-rank
    /// phase has a clock of its own, from 0, and a cosine over what remains, as in the paper's code.
    pub fn learning_rate(&self, t: i64) -> f64 {
        if t < self.first_phase_steps {
            return self.first_lr * cosine_with_warmup(t, self.num_steps, self.first_warmup_steps, self.min_lr_frac);
        }
        let (t, total) = (t - self.first_phase_steps, self.num_steps - self.first_phase_steps);
        let factor = match self.restarts {
            None => cosine_with_warmup(t, total, self.low_rank_warmup_steps, self.min_lr_frac),
            Some(restarts) => restarts.factor(t, total, self.low_rank_warmup_steps, self.min_lr_frac),
        };
        self.low_rank_lr * factor
    }

    /// Whether the model is wrapped with LoRA factors after `done` updates, before the next one.
    pub fn wraps_after(&self, done: i64) -> bool {
        done == self.first_phase_steps && done < self.num_steps
    }

    /// The number (from 1) of the restart that falls after `done` updates, if one does. The last
    /// cycle ends with one too: K cycles give K restarts.
    pub fn restart_after(&self, done: i64) -> Option<i64> {
        let every_steps = self.restarts?.every_steps;
        let low_rank_done = done - self.first_phase_steps;
        let falls_here = low_rank_done > 0 && (low_rank_done % every_steps == 0 || done == self.num_steps);
        falls_here.then(|| (low_rank_done + every_steps - 1) / every_steps)
    }

    /// The updates done when a restart falls.
    pub fn restart_step(&self, restart: i64) -> i64 {
        let every_steps = self.restarts.map_or(0, |restarts| restarts.every_steps);
        (self.first_phase_steps + restart * every_steps).min(self.num_steps)
    }

    /// The number (from 1) of the optimizer reset that falls after `done` updates, if one does. The end of the run
    /// has none: nothing would come of it.
    pub fn reset_after(&self, done: i64) -> Option<i64> {
        let every_steps = self.restarts?.reset_every_steps;
        let low_rank_done = done - self.first_phase_steps;
        let falls_here = low_rank_done > 0 && low_rank_done % every_steps == 0 && done < self.num_steps;
        falls_here.then_some(low_rank_done / every_steps)
    }

    /// Restarts in the whole run.
    pub fn num_restarts(&self) -> i64 {
        self.restart_after(self.num_steps).unwrap_or(0)
    }
}

/// Cosine from 1 at `q = 0` down to `min_lr_frac` at `q = 1`.
fn cosine(q: f64, min_lr_frac: f64) -> f64 {
    min_lr_frac + (1.0 - min_lr_frac) * 0.5 * (1.0 + (PI * q).cos())
}

/// Progress along the cosine, which begins where the warm-up ends.
fn progress(t: i64, total: i64, warmup_steps: i64) -> f64 {
    // A short last cycle may end before its warm-up would join the cosine.
    ((t - warmup_steps) as f64 / (total - warmup_steps).max(1) as f64).min(1.0)
}

fn cosine_with_warmup(t: i64, total: i64, warmup_steps: i64, min_lr_frac: f64) -> f64 {
    if t < warmup_steps {
        return t as f64 / warmup_steps as f64;
    }
    cosine(progress(t, total, warmup_steps), min_lr_frac)
}

/// The jagged cosine (Lialin et al. 2023, section 3): at every reset the rate falls and climbs back, over
/// `warmup_steps` updates, to the value where it joins the cosine again.
fn jagged_cosine(t: i64, total: i64, first_warmup_steps: i64, restarts: Restarts, min_lr_frac: f64) -> f64 {
    let cycle_steps = restarts.reset_every_steps;
    let (cycle_start, since_reset) = (t - t % cycle_steps, t % cycle_steps);
    if t < cycle_steps || since_reset >= restarts.warmup_steps {
        return cosine_with_warmup(t, total, first_warmup_steps, min_lr_frac);
    }
    let joining = cosine(progress(cycle_start + restarts.warmup_steps, total, first_warmup_steps), min_lr_frac);
    let climbed_steps = match restarts.lr {
        RestartLr::Zero => since_reset,
        RestartLr::OneOverW => since_reset + 1,
    };
    joining * climbed_steps as f64 / restarts.warmup_steps as f64
}

/// The cyclical cosine of the paper's 130M runs: every cycle warms up to the full peak and falls to the floor. The rate of the
/// first two updates of a later cycle is next to nothing.
fn cyclical_cosine(t: i64, cycle_steps: i64, warmup_steps: i64, min_lr_frac: f64) -> f64 {
    const NEXT_TO_NOTHING: f64 = 1e-7;
    let since_start = t % cycle_steps;
    if t >= cycle_steps && since_start < warmup_steps.min(2) {
        return NEXT_TO_NOTHING;
    }
    cosine_with_warmup(since_start, cycle_steps, warmup_steps, min_lr_frac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restarts(every_steps: i64, warmup_steps: i64, lr: RestartLr) -> Restarts {
        Restarts { every_steps, reset_every_steps: every_steps, warmup_steps, schedule: RestartSchedule::Jagged, lr }
    }

    fn assert_close(got: f64, want: f64, at: i64) {
        assert!((got - want).abs() < 6e-6, "at {at}: got {got}, want {want}");
    }

    #[test]
    fn jagged_cosine_follows_the_published_vector() {
        // The schedule of the paper's code: T = 40, w0 = 4, w = 3, R = 10, m = 0.1.
        #[rustfmt::skip]
        let want = [
            0.0, 0.25, 0.5, 0.75, 1.0, 0.99829, 0.99316, 0.98467, 0.97286, 0.95784,
            0.0, 0.28940, 0.57880, 0.86820, 0.83925, 0.80811, 0.77500, 0.74018, 0.70391, 0.66647,
            0.0, 0.17026, 0.34052, 0.51078, 0.47186, 0.43353, 0.39609, 0.35982, 0.32500, 0.29189,
            0.0, 0.06046, 0.12092, 0.18138, 0.16029, 0.14216, 0.12714, 0.11533, 0.10684, 0.10171,
        ];
        for (t, want) in (0..).zip(want) {
            assert_close(jagged_cosine(t, 40, 4, restarts(10, 3, RestartLr::Zero), 0.1), want, t);
        }
    }

    #[test]
    fn jagged_cosine_of_a_long_run_follows_the_published_points() {
        #[rustfmt::skip]
        let want = [
            (4_999, 0.802615), (5_000, 0.0), (5_001, 0.007944), (5_050, 0.397203), (5_099, 0.786462),
            (5_100, 0.794406), (9_999, 0.339302), (10_000, 0.0), (10_100, 0.330652), (14_999, 0.1),
        ];
        for (t, want) in want {
            assert_close(jagged_cosine(t, 15_000, 500, restarts(5_000, 100, RestartLr::Zero), 0.1), want, t);
        }
    }

    #[test]
    fn cyclical_cosine_follows_the_published_vector() {
        // The schedule of the paper's code: w = 3, L = 10, m = 0.1.
        let want = [
            0.0, 0.33333, 0.66667, 1.0, 0.95544, 0.83057, 0.65013, 0.44987, 0.26943, 0.14456, 1e-7, 1e-7, 0.66667, 1.0,
        ];
        for (t, want) in (0..).zip(want) {
            assert_close(cyclical_cosine(t, 10, 3, 0.1), want, t);
        }
    }

    #[test]
    fn recommended_restart_begins_at_one_over_w_of_the_joining_value() {
        for (t, want) in (10..).zip([0.28940, 0.57880, 0.86820, 0.86820]) {
            assert_close(jagged_cosine(t, 40, 4, restarts(10, 3, RestartLr::OneOverW), 0.1), want, t);
        }
    }

    #[test]
    fn restarts_fall_between_cycles_and_at_the_end() {
        let schedule = Schedule {
            num_steps: 45,
            first_phase_steps: 10,
            first_lr: 1e-3,
            first_warmup_steps: 2,
            min_lr_frac: 0.1,
            low_rank_lr: 2e-3,
            low_rank_warmup_steps: 2,
            restarts: Some(restarts(10, 3, RestartLr::OneOverW)),
        };
        let falls: Vec<_> = (0..=45).filter_map(|done| schedule.restart_after(done).map(|n| (done, n))).collect();
        assert_eq!(falls, [(20, 1), (30, 2), (40, 3), (45, 4)]);
        assert_eq!((0..=45).filter(|&done| schedule.wraps_after(done)).collect::<Vec<_>>(), [10]);
        assert_eq!(schedule.num_restarts(), 4);
        let resets =
            |schedule: &Schedule| (0..=45).filter(|&done| schedule.reset_after(done).is_some()).collect::<Vec<_>>();
        assert_eq!(resets(&schedule), [20, 30, 40]);

        // Merges every 5 updates, resets every 15: "online" ReLoRA.
        let restarts = Restarts { every_steps: 5, reset_every_steps: 15, ..restarts(5, 3, RestartLr::OneOverW) };
        let online = Schedule { restarts: Some(restarts), ..schedule };
        assert_eq!(online.num_restarts(), 7);
        assert_eq!(resets(&online), [25, 40]);
        assert!(online.learning_rate(24) > 2.0 * online.learning_rate(25));
        assert!(online.learning_rate(30) > 0.9 * online.learning_rate(29), "a merge alone leaves the rate");
    }

    #[test]
    fn the_warm_start_is_stopped_high_on_the_cosine_of_the_whole_run() {
        let warm = cosine_with_warmup(249, 1_000, 50, 0.1);
        assert!(warm > 0.85, "{warm}");
        assert_eq!(cosine_with_warmup(0, 1_000, 50, 0.1), 0.0);
        assert_close(cosine_with_warmup(50, 1_000, 50, 0.1), 1.0, 50);
    }
}
