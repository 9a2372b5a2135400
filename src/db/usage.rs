//! How much of the store a project uses, from what the rows say. Objects that several nodes name count once.

use sqlx::PgPool;

use crate::domain::ids::ProjectId;

/// Bytes in the store, by what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub datasets_bytes: i64,
    pub tokenizations_bytes: i64,
    pub bases_bytes: i64,
    pub restarts_bytes: i64,
    pub checkpoints_bytes: i64,
    pub states_bytes: i64,
    pub logs_bytes: i64,
}

pub async fn find(pool: &PgPool, project: &ProjectId) -> sqlx::Result<Usage> {
    sqlx::query_as!(
        Usage,
        r#"
        -- db::usage::find
        with of_nodes as (
            select distinct on (f.object_key) n.kind, f.size_bytes
            from nodes n
            join node_files f on f.node_id = n.id
            where n.project_id = $1
        )
        select
            (select coalesce(sum(size_bytes), 0)::bigint from datasets
             where project_id = $1 and object_key is not null) as "datasets_bytes!",
            (select coalesce(sum(f.size_bytes), 0)::bigint from tokenizations t
             join tokenization_files f on f.tokenization_id = t.id where t.project_id = $1) as "tokenizations_bytes!",
            coalesce(sum(size_bytes) filter (where kind = 'base'), 0)::bigint as "bases_bytes!",
            coalesce(sum(size_bytes) filter (where kind = 'restart'), 0)::bigint as "restarts_bytes!",
            coalesce(sum(size_bytes) filter (where kind = 'checkpoint'), 0)::bigint as "checkpoints_bytes!",
            coalesce(sum(size_bytes) filter (where kind = 'state'), 0)::bigint as "states_bytes!",
            (select coalesce(sum(a.log_bytes), 0)::bigint from attempts a
             join work_items w on w.id = a.work_item_id where w.project_id = $1) as "logs_bytes!"
        from of_nodes
        "#,
        project.as_str(),
    )
    .fetch_one(pool)
    .await
}
