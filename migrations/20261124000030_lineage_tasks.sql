-- What a user asked to be done with the lineage of weights: rebuild the full weights after a restart, or check one.
create table lineage_tasks (
    id text primary key,
    project_id text not null references projects (id),
    kind text not null,
    restart_id text not null references nodes (id) on delete cascade,
    work_item_id text references work_items (id), -- null where nothing was left to do
    state text not null default 'queued',
    checkpoint_id text references nodes (id) on delete set null, -- what a materialization gave
    verification jsonb, -- what a check found
    failure jsonb,
    created_at timestamptz not null default now(),
    finished_at timestamptz,
    constraint lineage_tasks_kind_known check (kind in ('verify', 'materialize')),
    constraint lineage_tasks_state_known check (state in ('queued', 'running', 'succeeded', 'failed')),
    constraint lineage_tasks_final_is_finished check ((state in ('succeeded', 'failed')) = (finished_at is not null)),
    constraint lineage_tasks_failed_with_failure check ((state = 'failed') = (failure is not null)),
    constraint lineage_tasks_open_has_work check (state in ('succeeded', 'failed') or work_item_id is not null)
);
create index lineage_tasks_by_project on lineage_tasks (project_id, id);
create index lineage_tasks_by_restart on lineage_tasks (restart_id, id);
create index lineage_tasks_by_work_item on lineage_tasks (work_item_id);
create index lineage_tasks_by_checkpoint on lineage_tasks (checkpoint_id);
-- Whoever asks for what is being done gets the task that does it.
create unique index lineage_tasks_open on lineage_tasks (restart_id, kind) where state in ('queued', 'running');

-- A materialized checkpoint belongs to the job of its restart, and no attempt on the job made it.
alter table nodes
    add column materialized boolean not null default false,
    drop constraint nodes_imported_is_a_root,
    add constraint nodes_imported_is_a_root check (
        case
            when job_id is null
                then kind = 'checkpoint' and model is not null and parent_id is null and lease_epoch is null
                    and step = 0 and restart = 0 and not superseded and not materialized
            else model is null and (lease_epoch is null) = materialized
        end
    ),
    add constraint nodes_materialized_is_a_checkpoint
        check (not materialized or (kind = 'checkpoint' and parent_id is not null));
