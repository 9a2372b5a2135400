//! From the request's method to a [`MethodSpec`].

use super::{
    ControlSpec, FactorsSpec, Linear, LoraSpec, MethodPreset, MethodSpec, ModelSpec, OptimizerReset, ReloraSpec,
    RestartLr, RestartSchedule, ScheduleSpec,
    check::{Bounds, Check, MAX_STEPS},
    request::{MethodRequest, MethodType, OptimizerResetRequest, OptimizerResetType},
};

pub fn fill_in_method(
    check: &mut Check,
    request: Option<&MethodRequest>,
    model: &ModelSpec,
    schedule: &ScheduleSpec,
) -> MethodSpec {
    let Some((request, kind)) = request.and_then(|request| request.kind.map(|kind| (request, kind))) else {
        check.problem("/method/type", "is required: full, control, factorized, lora or relora");
        return MethodSpec::Full {};
    };
    refuse_foreign_fields(check, request, kind);
    match kind {
        MethodType::Full => MethodSpec::Full {},
        MethodType::Control => MethodSpec::Control(fill_in_control(check, request, model)),
        MethodType::Factorized => MethodSpec::Factorized(fill_in_factors(check, request, model)),
        MethodType::Lora => MethodSpec::Lora(fill_in_lora(check, request, model, schedule)),
        MethodType::Relora => MethodSpec::Relora(fill_in_relora(check, request, model, schedule)),
    }
}

fn fill_in_control(check: &mut Check, request: &MethodRequest, model: &ModelSpec) -> ControlSpec {
    let rank = fill_in_rank(check, request, model.linear_shapes().into_iter());
    let fitting = ControlSpec::of(rank, model);
    let hidden_size = request.hidden_size.unwrap_or(fitting.hidden_size);
    check.integer("/method/hidden_size", hidden_size, 1, 65_536);
    if hidden_size % (2 * model.num_attention_heads) != 0 {
        let heads = model.num_attention_heads;
        check.problem("/method/hidden_size", format!("{hidden_size} does not give {heads} heads of an even size"));
    }
    let intermediate_size = request.intermediate_size.unwrap_or(fitting.intermediate_size);
    check.integer("/method/intermediate_size", intermediate_size, 1, 262_144);
    ControlSpec { rank, hidden_size, intermediate_size }
}

fn fill_in_factors(check: &mut Check, request: &MethodRequest, model: &ModelSpec) -> FactorsSpec {
    let target_modules = fill_in_target_modules(check, request);
    let wrapped = Linear::ALL.into_iter().zip(model.linear_shapes());
    let rank = fill_in_rank(check, request, wrapped.filter(|(l, _)| target_modules.contains(l)).map(|(_, s)| s));
    if request.alpha.is_some() && request.scale.is_some() {
        check.problem("/method/scale", "excludes alpha: scale is alpha / rank");
    }
    let alpha = request.alpha.unwrap_or(32.0);
    check.number("/method/alpha", alpha, Bounds::OpenClosed(0.0, 1e6));
    let scale = request.scale.unwrap_or(alpha / rank.max(1) as f64);
    check.number("/method/scale", scale, Bounds::OpenClosed(0.0, 1e6));
    let dropout = request.dropout.unwrap_or(match request.preset.unwrap_or_default() {
        MethodPreset::Recommended => 0.0,
        MethodPreset::Published => 0.1,
    });
    check.number("/method/dropout", dropout, Bounds::ClosedOpen(0.0, 1.0));
    let train_embeddings = request.train_embeddings.unwrap_or(true);
    let train_head = request.train_head.unwrap_or(train_embeddings || !model.tie_word_embeddings);
    if model.tie_word_embeddings && train_embeddings != train_head {
        check.problem("/method/train_head", "must equal train_embeddings: the model ties the two");
    }
    FactorsSpec { rank, scale, dropout, target_modules, train_embeddings, train_head }
}

/// In the order of a layer, whatever the order of the request.
fn fill_in_target_modules(check: &mut Check, request: &MethodRequest) -> Vec<Linear> {
    let Some(given) = &request.target_modules else { return Linear::ALL.to_vec() };
    let modules: Vec<_> = Linear::ALL.into_iter().filter(|linear| given.contains(linear)).collect();
    if modules.is_empty() || modules.len() != given.len() {
        check.problem("/method/target_modules", "must name at least one module, and none of them twice");
    }
    modules
}

fn fill_in_rank(check: &mut Check, request: &MethodRequest, shapes: impl Iterator<Item = (i64, i64)>) -> i64 {
    let rank = request.rank.unwrap_or(128);
    let smallest_side = shapes.map(|(o, i)| o.min(i)).min().unwrap_or(i64::MAX);
    if rank < 1 || rank >= smallest_side {
        check.problem(
            "/method/rank",
            format!(
                "{rank} is out of range: the smallest wrapped matrix has a side of {smallest_side}, the rank must be \
                 from 1 to {}",
                smallest_side - 1
            ),
        );
    }
    rank.clamp(1, (smallest_side - 1).max(1))
}

fn fill_in_lora(check: &mut Check, request: &MethodRequest, model: &ModelSpec, schedule: &ScheduleSpec) -> LoraSpec {
    let num_steps = schedule.num_steps;
    let warm_start_steps =
        check.integer("/method/warm_start_steps", request.warm_start_steps.unwrap_or(0), 0, num_steps - 1);
    let low_rank_steps = num_steps - warm_start_steps;
    let relora_warmup_steps =
        request.relora_warmup_steps.unwrap_or_else(|| schedule.warmup_steps.min(low_rank_steps - 1));
    check.integer("/method/relora_warmup_steps", relora_warmup_steps, 0, low_rank_steps - 1);
    LoraSpec { factors: fill_in_factors(check, request, model), warm_start_steps, relora_warmup_steps }
}

fn fill_in_relora(
    check: &mut Check,
    request: &MethodRequest,
    model: &ModelSpec,
    schedule: &ScheduleSpec,
) -> ReloraSpec {
    let lora = fill_in_lora(check, request, model, schedule);
    let low_rank_steps = schedule.num_steps - lora.warm_start_steps;
    let restart_every_steps =
        check.required("/method/restart_every_steps", request.restart_every_steps, 1, low_rank_steps);
    let reset_every_steps = request.reset_every_steps.unwrap_or(restart_every_steps);
    check.integer("/method/reset_every_steps", reset_every_steps, 1, low_rank_steps);
    let allow_short_last_cycle = request.allow_short_last_cycle.unwrap_or(false);
    let mut periods = vec![("restart_every_steps", restart_every_steps)];
    if reset_every_steps != restart_every_steps {
        periods.push(("reset_every_steps", reset_every_steps));
    }
    for (field, period) in periods {
        if period >= 1 && low_rank_steps % period != 0 && !allow_short_last_cycle {
            check.problem(
                format!("/method/{field}"),
                format!(
                    "{period} does not divide the {low_rank_steps} steps after the warm start; \
                     change it, schedule.num_steps or warm_start_steps, or set allow_short_last_cycle"
                ),
            );
        }
    }
    let restart_schedule = request.restart_schedule.unwrap_or(RestartSchedule::Jagged);
    let restart_warmup_steps = request.restart_warmup_steps.unwrap_or((reset_every_steps / 10).clamp(1, 100));
    check.integer("/method/restart_warmup_steps", restart_warmup_steps, 1, MAX_STEPS);
    check_cycle(check, restart_schedule, lora.relora_warmup_steps, restart_warmup_steps, reset_every_steps);
    if let Some(threshold) = request.rank_threshold {
        check.number("/method/rank_threshold", threshold, Bounds::OpenClosed(0.0, 1e6));
    }
    ReloraSpec {
        lora,
        restart_every_steps,
        reset_every_steps,
        restart_warmup_steps,
        restart_schedule,
        restart_lr: request.restart_lr.unwrap_or(match request.preset.unwrap_or_default() {
            MethodPreset::Recommended => RestartLr::OneOverW,
            MethodPreset::Published => RestartLr::Zero,
        }),
        optimizer_reset: fill_in_reset(check, request),
        allow_short_last_cycle,
        rank_threshold: request.rank_threshold,
    }
}

/// What the schedules need of their lengths (`domain::schedule`).
fn check_cycle(check: &mut Check, schedule: RestartSchedule, first_warmup: i64, restart_warmup: i64, cycle: i64) {
    let is_too_long = match schedule {
        RestartSchedule::Jagged => first_warmup > cycle,
        RestartSchedule::Cyclical => first_warmup >= cycle,
        RestartSchedule::Plain => false,
    };
    if is_too_long {
        check
            .problem("/method/relora_warmup_steps", format!("{first_warmup} is too long for a cycle of {cycle} steps"));
    }
    if schedule == RestartSchedule::Jagged && restart_warmup >= cycle {
        check.problem(
            "/method/restart_warmup_steps",
            format!("{restart_warmup} is not less than the cycle of {cycle} steps"),
        );
    }
}

fn fill_in_reset(check: &mut Check, request: &MethodRequest) -> OptimizerReset {
    let is_recommended = request.preset.unwrap_or_default() == MethodPreset::Recommended;
    let reset = request.optimizer_reset.clone().unwrap_or_default();
    let kind = reset.kind.unwrap_or(OptimizerResetType::Zero);
    refuse_foreign_reset_fields(check, &reset, kind);
    let reset_step_count = reset.reset_step_count.unwrap_or(is_recommended);
    let joint_mask = reset.joint_mask.unwrap_or(is_recommended);
    let mut frac = || {
        let Some(frac) = reset.frac else {
            check.problem("/method/optimizer_reset/frac", "is required: the share that is cleared");
            return 0.0;
        };
        check.number("/method/optimizer_reset/frac", frac, Bounds::Closed(0.0, 1.0));
        frac
    };
    match kind {
        OptimizerResetType::Zero => OptimizerReset::Zero { reset_step_count },
        OptimizerResetType::Magnitude => OptimizerReset::Magnitude { frac: frac(), reset_step_count, joint_mask },
        OptimizerResetType::Random => OptimizerReset::Random { frac: frac(), reset_step_count, joint_mask },
        OptimizerResetType::None => OptimizerReset::None {},
    }
}

/// A field that the reset does not read would be a silent misunderstanding.
fn refuse_foreign_reset_fields(check: &mut Check, reset: &OptimizerResetRequest, kind: OptimizerResetType) {
    let prunes = matches!(kind, OptimizerResetType::Magnitude | OptimizerResetType::Random);
    let foreign = [
        ("frac", reset.frac.is_some() && !prunes),
        ("joint_mask", reset.joint_mask.is_some() && !prunes),
        ("reset_step_count", reset.reset_step_count.is_some() && kind == OptimizerResetType::None),
    ];
    for (field, _) in foreign.into_iter().filter(|(_, is_foreign)| *is_foreign) {
        check.problem(format!("/method/optimizer_reset/{field}"), "does not belong to this type of reset");
    }
}

/// A field that the method does not read would be a silent misunderstanding.
fn refuse_foreign_fields(check: &mut Check, request: &MethodRequest, kind: MethodType) {
    use MethodType::{Control, Factorized, Lora, Relora};
    let fields: [(&str, bool, &[MethodType]); 20] = [
        ("rank", request.rank.is_some(), &[Control, Factorized, Lora, Relora]),
        ("alpha", request.alpha.is_some(), &[Factorized, Lora, Relora]),
        ("scale", request.scale.is_some(), &[Factorized, Lora, Relora]),
        ("dropout", request.dropout.is_some(), &[Factorized, Lora, Relora]),
        ("target_modules", request.target_modules.is_some(), &[Factorized, Lora, Relora]),
        ("train_embeddings", request.train_embeddings.is_some(), &[Factorized, Lora, Relora]),
        ("train_head", request.train_head.is_some(), &[Factorized, Lora, Relora]),
        ("preset", request.preset.is_some(), &[Lora, Relora]),
        ("warm_start_steps", request.warm_start_steps.is_some(), &[Lora, Relora]),
        ("relora_warmup_steps", request.relora_warmup_steps.is_some(), &[Lora, Relora]),
        ("restart_every_steps", request.restart_every_steps.is_some(), &[Relora]),
        ("reset_every_steps", request.reset_every_steps.is_some(), &[Relora]),
        ("restart_warmup_steps", request.restart_warmup_steps.is_some(), &[Relora]),
        ("restart_schedule", request.restart_schedule.is_some(), &[Relora]),
        ("restart_lr", request.restart_lr.is_some(), &[Relora]),
        ("optimizer_reset", request.optimizer_reset.is_some(), &[Relora]),
        ("allow_short_last_cycle", request.allow_short_last_cycle.is_some(), &[Relora]),
        ("rank_threshold", request.rank_threshold.is_some(), &[Relora]),
        ("hidden_size", request.hidden_size.is_some(), &[Control]),
        ("intermediate_size", request.intermediate_size.is_some(), &[Control]),
    ];
    for (field, ..) in fields.into_iter().filter(|(_, is_given, of)| *is_given && !of.contains(&kind)) {
        check.problem(format!("/method/{field}"), format!("does not belong to the method {}", kind.name()));
    }
}
