//! Checkpoints that jobs begin with: those that came from outside, and what is known of any.

use serde_json::json;
use sqlx::{PgConnection, PgPool, types::Json};

use super::nodes::{self, StoredFile};
use crate::domain::{
    data::TOKENIZER_FILE,
    ids::{NodeId, ProjectId},
    spec::{InitFacts, ModelSpec, TrainSpec},
};

/// A checkpoint from outside whose files are stored and checked.
#[derive(Debug)]
pub struct NewImport {
    pub id: NodeId,
    pub name: Option<String>,
    pub model: ModelSpec,
    pub files: Vec<StoredFile>,
}

/// Makes an imported checkpoint visible, as the root of a lineage.
pub async fn create(pool: &PgPool, project: &ProjectId, import: &NewImport) -> sqlx::Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query!(
        r#"
        -- db::imports::create
        insert into nodes (id, project_id, kind, step, restart, name, model)
        values ($1, $2, 'checkpoint', 0, 0, $3, $4)
        "#,
        import.id.as_str(),
        project.as_str(),
        import.name,
        json!(import.model),
    )
    .execute(&mut *tx)
    .await?;
    nodes::insert_files(&mut tx, &import.id, &import.files).await?;
    tx.commit().await
}

/// What a job or a tokenization that names this checkpoint or base has to know. One that was superseded or deleted is
/// none. Until the transaction ends it cannot be deleted.
pub async fn find_facts(
    connection: &mut PgConnection,
    project: &ProjectId,
    id: &NodeId,
) -> sqlx::Result<Option<InitFacts>> {
    let row = sqlx::query!(
        r#"
        -- db::imports::find_facts
        select n.model as "model: Json<ModelSpec>", j.spec as "spec?: Json<TrainSpec>", f.sha256 as "tokenizer_sha256?"
        from nodes n
        left join jobs j on j.id = n.job_id
        left join node_files f on f.node_id = n.id and f.name = $3
        where n.project_id = $1 and n.id = $2 and n.kind in ('base', 'checkpoint') and not n.superseded
            and n.deleted_at is null
        for key share of n
        "#,
        project.as_str(),
        id.as_str(),
        TOKENIZER_FILE,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.and_then(|row| {
        let of_import = row.model.map(|model| model.0);
        let model = of_import.or_else(|| row.spec.map(|spec| spec.0.trained_model()))?;
        Some(InitFacts { model, tokenizer_sha256: row.tokenizer_sha256 })
    }))
}
