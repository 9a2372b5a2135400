-- A spec says which of its checkpoints are kept. Jobs that exist keep all, as they did.
update jobs
set spec = jsonb_set(spec, '{checkpoints}',
    spec -> 'checkpoints' || '{"keep_last": null, "keep_every_steps": null, "keep_best": null, "ttl_s": null}');

alter table nodes
    add column pinned boolean not null default false, -- not deleted until it is unpinned
    -- Its files are gone. The row stays: children name it as their parent, jobs as what they began with, and a commit
    -- that is repeated finds it.
    add column deleted_at timestamptz,
    add constraint nodes_deleted_is_not_pinned check (deleted_at is null or not pinned),
    add constraint nodes_pinned_is_a_checkpoint check (not pinned or kind = 'checkpoint');

-- Objects that no row names any more. Entered in the transaction that forgot them, and taken out once the store has
-- confirmed that they are gone.
create table deleted_objects (
    object_key text primary key,
    deleted_at timestamptz not null default now()
);

-- When each part of the collector's work is due. Whoever moves the time on does the work: one worker of all.
create table collector_turns (
    part text primary key,
    due_at timestamptz not null default now(),
    constraint collector_turns_part_known check (part in ('retention', 'sweep'))
);
insert into collector_turns (part) values ('retention'), ('sweep');
