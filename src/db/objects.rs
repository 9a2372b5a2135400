//! Objects in the store that no row names: queued when the last row that names them goes, or found in a listing.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};

/// An object that a row named.
#[derive(Debug, Clone)]
pub struct Unnamed {
    pub key: String,
    pub size_bytes: i64,
}

/// Queues for deletion those of these objects that nothing names any more, and returns them, each once.
pub(super) async fn queue(connection: &mut PgConnection, objects: Vec<Unnamed>) -> sqlx::Result<Vec<Unnamed>> {
    let sizes: BTreeMap<_, _> = objects.into_iter().map(|object| (object.key, object.size_bytes)).collect();
    let keys: Vec<_> = sizes.keys().cloned().collect();
    let queued = sqlx::query_scalar!(
        r#"
        -- db::objects::queue
        insert into deleted_objects (object_key)
        select key from unnest($1::text[]) as forgotten (key)
        where not exists (select 1 from node_files where object_key = key)
        on conflict (object_key) do update set deleted_at = now()
        returning object_key
        "#,
        &keys,
    )
    .fetch_all(connection)
    .await?;
    let size_bytes = |key: &str| sizes.get(key).copied().unwrap_or(0);
    Ok(queued.into_iter().map(|key| Unnamed { size_bytes: size_bytes(&key), key }).collect())
}

/// Up to `limit` objects that are to be deleted, the oldest first.
pub async fn list_queued(pool: &PgPool, limit: i64) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        -- db::objects::list_queued
        select object_key
        from deleted_objects
        where not exists (select 1 from node_files f where f.object_key = deleted_objects.object_key)
        order by deleted_at, object_key
        limit $1
        "#,
        limit,
    )
    .fetch_all(pool)
    .await
}

/// Takes out of the queue what the store has confirmed to be gone.
pub async fn mark_gone(pool: &PgPool, keys: &[String]) -> sqlx::Result<()> {
    sqlx::query!("-- db::objects::mark_gone\ndelete from deleted_objects where object_key = any($1)", keys)
        .execute(pool)
        .await?;
    Ok(())
}

/// Puts objects that the store keeps at the end of the queue.
pub async fn put_last(pool: &PgPool, keys: &[String]) -> sqlx::Result<()> {
    sqlx::query!(
        "-- db::objects::put_last\nupdate deleted_objects set deleted_at = now() where object_key = any($1)",
        keys
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// The clock by which it is decided what is old: that of a worker may be wrong.
pub async fn now(pool: &PgPool) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar!(
        r#"-- db::objects::now
        select now() as "now!""#
    )
    .fetch_one(pool)
    .await
}

/// An object of a listing that no row names, and that nobody who holds a lease may still be going to name.
#[derive(Debug)]
pub struct Orphan {
    pub key: String,
    /// Whether the job is known below whose identifier it lies. Jobs are never forgotten: what lies below another
    /// identifier is not this database's. Always true of objects that are not of jobs.
    pub is_known: bool,
}

/// Those of the listed objects that no row names, whose second segment and third segment are not those of a lease that
/// somebody holds. An expired lease is one as long as nobody has taken it back: its holder may still renew it.
pub async fn find_orphans(pool: &PgPool, keys: &[String]) -> sqlx::Result<Vec<Orphan>> {
    sqlx::query_as!(
        Orphan,
        r#"
        -- db::objects::find_orphans
        with listed as (
            select key, split_part(key, '/', 1) as collection, split_part(key, '/', 2) as owner,
                split_part(key, '/', 3) as lease_epoch
            from unnest($1::text[]) as listed (key)
        )
        select key as "key!",
            (collection <> 'j' or exists (select 1 from jobs where id = owner)) as "is_known!"
        from listed
        where not exists (select 1 from node_files where object_key = key)
            and not exists (select 1 from tokenization_files where object_key = key)
            and not exists (select 1 from datasets where object_key = key)
            and not exists (select 1 from attempts where log_key = key)
            and not exists (
                select 1
                from leases l
                left join jobs j on j.work_item_id = l.work_item_id
                left join tokenizations t on t.work_item_id = l.work_item_id
                left join lineage_tasks k on k.work_item_id = l.work_item_id
                where l.lease_epoch::text = listed.lease_epoch and owner in (j.id, t.id, k.id)
            )
        order by key
        "#,
        keys,
    )
    .fetch_all(pool)
    .await
}

/// A part of the collector's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum CollectorPart {
    Retention,
    Sweep,
}

/// Takes a part of the collector's work if it is due, and says when it is due again. Of all workers one gets it.
pub async fn take_turn(pool: &PgPool, part: CollectorPart, again_after_s: f64) -> sqlx::Result<bool> {
    let result = sqlx::query!(
        r#"
        -- db::objects::take_turn
        update collector_turns set due_at = now() + make_interval(secs => $2) where part = $1 and due_at <= now()
        "#,
        part as CollectorPart,
        again_after_s,
    )
    .execute(pool)
    .await?;
    Ok(result.rows_affected() == 1)
}
