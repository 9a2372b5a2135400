//! The measured values of a job, step by step.

use sqlx::PgPool;

use crate::domain::ids::{JobId, ProjectId};

#[derive(Debug)]
pub struct MetricRow {
    pub step: i64,
    pub name: String,
    pub value: f64,
}

/// The values of up to `limit_steps` steps after `after_step`, of one name or all.
///
/// Attempts overlap where one went on from an earlier step than the last one reached. A value survives
/// if no later attempt began before its step; of two that survive the later one counts.
pub async fn list(
    pool: &PgPool,
    project: &ProjectId,
    job: &JobId,
    name: Option<&str>,
    after_step: i64,
    limit_steps: i64,
) -> sqlx::Result<Vec<MetricRow>> {
    sqlx::query_as!(
        MetricRow,
        r#"
        -- db::metrics::list
        with surviving as (
            select m.step, m.name, m.value, m.lease_epoch
            from job_metrics m
            join jobs j on j.id = m.job_id
            where j.project_id = $1 and j.id = $2 and m.step > $4 and ($3::text is null or m.name = $3)
                and not exists (
                    select 1
                    from attempts later
                    where later.work_item_id = j.work_item_id and later.lease_epoch > m.lease_epoch
                        and later.start_step < m.step
                )
        ), page as (
            select distinct step from surviving order by step limit $5
        )
        select distinct on (s.step, s.name) s.step, s.name, s.value
        from surviving s
        join page on page.step = s.step
        order by s.step, s.name, s.lease_epoch desc
        "#,
        project.as_str(),
        job.as_str(),
        name,
        after_step,
        limit_steps,
    )
    .fetch_all(pool)
    .await
}
