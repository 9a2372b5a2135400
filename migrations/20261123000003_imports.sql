-- Checkpoints from outside are roots of lineages: nodes without a job and its lease.
alter table nodes
    alter column job_id drop not null,
    alter column lease_epoch drop not null,
    add column name text, -- given at an import
    add column model jsonb, -- of an import; a job's is in its spec
    add constraint nodes_imported_is_a_root check (
        case
            when job_id is null
                then kind = 'checkpoint' and model is not null and parent_id is null and lease_epoch is null
                    and step = 0 and restart = 0 and not superseded
            else model is null and lease_epoch is not null
        end
    );

-- The checkpoint that a job begins with, and the parent of its first nodes.
alter table jobs
    add column init_node_id text references nodes (id);
create index jobs_by_init_node on jobs (init_node_id);

-- The checkpoint whose tokenizer is used; null for one that is learned from the text.
alter table tokenizations
    add column tokenizer_node_id text references nodes (id);
create index tokenizations_by_tokenizer_node on tokenizations (tokenizer_node_id);
