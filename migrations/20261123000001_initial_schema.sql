-- Everything belongs to a project; an object of another project does not exist.
create table projects (
    id text primary key,
    name text not null,
    created_at timestamptz not null default now(),
    constraint projects_name_unique unique (name)
);

-- A key is shown once, when it is made; only its SHA-256 is kept.
create table api_keys (
    id text primary key,
    project_id text not null references projects (id),
    name text not null,
    key_sha256 bytea not null,
    scopes text[] not null, -- read, write
    created_at timestamptz not null default now(),
    revoked_at timestamptz,
    constraint api_keys_key_sha256_unique unique (key_sha256),
    constraint api_keys_scopes_known check (scopes <@ array['read', 'write'])
);

-- Raw text, kept as it was uploaded.
create table datasets (
    id text primary key,
    project_id text not null references projects (id),
    name text not null,
    state text not null default 'empty', -- empty -> uploading -> ready | failed; failed may be uploaded again
    format text, -- text: one document; jsonl: an object with "text" per line, a document each
    object_key text, -- set when ready
    size_bytes bigint,
    sha256 text,
    num_documents bigint,
    upload_token text, -- which upload may finish: a later one takes over
    error text, -- why the last upload failed
    created_at timestamptz not null default now(),
    constraint datasets_state_known check (state in ('empty', 'uploading', 'ready', 'failed')),
    constraint datasets_format_known check (format in ('text', 'jsonl')),
    constraint datasets_ready_is_complete check (
        state <> 'ready'
        or (object_key is not null and size_bytes is not null and sha256 is not null
            and num_documents is not null and format is not null)
    )
);
-- Identifiers sort by the time when they were made, so lists page by them.
create index datasets_by_project on datasets (project_id, id);

-- The one queue: whatever a worker does is an item here.
create table work_items (
    id text primary key,
    project_id text not null references projects (id),
    kind text not null,
    state text not null default 'queued', -- queued <-> leased -> done
    priority bigint not null default 0, -- higher first
    device text not null default 'auto', -- what a worker must offer
    num_gpus bigint not null default 0,
    format_version bigint not null default 1, -- of the trainer contract; a worker claims what it understands
    lease_epoch bigint not null default 0, -- only ever rises; is not the number of attempts
    infra_failures bigint not null default 0, -- since the last progress
    eligible_at timestamptz not null default now(), -- not claimed before
    desired text not null default 'run', -- what the holder of the lease is told by its heartbeat
    created_at timestamptz not null default now(),
    constraint work_items_kind_known check (kind in ('train', 'ingest', 'verify', 'materialize', 'import', 'collect')),
    constraint work_items_state_known check (state in ('queued', 'leased', 'done')),
    constraint work_items_device_known check (device in ('auto', 'cpu', 'cuda')),
    constraint work_items_desired_known check (desired in ('run', 'save', 'pause', 'cancel', 'drain'))
);
-- For the claim: what is queued, in the order in which it is taken.
create index work_items_queued on work_items (priority desc, created_at, id) where state = 'queued';

-- One process that takes work. A restarted worker is another row.
create table workers (
    id text primary key,
    name text not null,
    version text not null,
    device text not null, -- cpu or cuda
    num_gpus bigint not null,
    started_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    constraint workers_device_known check (device in ('cpu', 'cuda'))
);

-- Who holds a work item, until when. Narrow, because every heartbeat rewrites it, and without an
-- index on expires_at, so that the rewrite stays within its page.
create table leases (
    work_item_id text primary key references work_items (id) on delete cascade,
    lease_epoch bigint not null,
    worker_id text not null references workers (id),
    expires_at timestamptz not null -- on the database's clock alone
) with (fillfactor = 50);

-- Every time that a work item was taken up, and how that ended.
create table attempts (
    work_item_id text not null references work_items (id) on delete cascade,
    lease_epoch bigint not null,
    worker_id text not null references workers (id),
    started_at timestamptz not null default now(),
    ended_at timestamptz,
    outcome text, -- succeeded, failed, released, cancelled, lease_expired
    start_step bigint not null default 0, -- the step of the state that it goes on from
    log_key text,
    log_bytes bigint,
    primary key (work_item_id, lease_epoch),
    constraint attempts_outcome_known
        check (outcome in ('succeeded', 'failed', 'released', 'cancelled', 'lease_expired')),
    constraint attempts_ended_with_outcome check ((ended_at is null) = (outcome is null))
);

-- A dataset turned into tokens by one tokenizer.
create table tokenizations (
    id text primary key,
    project_id text not null references projects (id),
    dataset_id text not null references datasets (id),
    work_item_id text not null references work_items (id),
    state text not null default 'queued',
    vocab_size bigint not null, -- asked for; a model's vocabulary by default
    validation_frac double precision not null, -- share of the documents that is held out
    tokenizer_vocab_size bigint, -- what the text had room for
    train_tokens bigint,
    valid_tokens bigint,
    train_documents bigint,
    valid_documents bigint,
    failure jsonb,
    created_at timestamptz not null default now(),
    constraint tokenizations_state_known check (state in ('queued', 'running', 'ready', 'failed')),
    constraint tokenizations_ready_is_complete check (
        state <> 'ready' or (train_tokens is not null and valid_tokens is not null)
    )
);
create index tokenizations_by_project on tokenizations (project_id, id);
create index tokenizations_by_dataset on tokenizations (dataset_id, id);
create index tokenizations_by_work_item on tokenizations (work_item_id);

create table tokenization_files (
    tokenization_id text not null references tokenizations (id) on delete cascade,
    name text not null,
    object_key text not null,
    size_bytes bigint not null,
    sha256 text not null,
    primary key (tokenization_id, name)
);

create table jobs (
    id text primary key,
    project_id text not null references projects (id),
    work_item_id text not null references work_items (id),
    dataset_id text not null references datasets (id),
    tokenization_id text not null references tokenizations (id),
    name text not null,
    state text not null default 'queued',
    spec jsonb not null, -- normalised: a later default changes nothing for a job that exists
    warnings text[] not null default '{}',
    failure jsonb, -- kind, message, retryable, log_tail
    numerics jsonb, -- fingerprint of the first attempt
    last_event_seq bigint not null default 0,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    finished_at timestamptz,
    constraint jobs_state_known check (
        state in ('queued', 'starting', 'running', 'pausing', 'paused', 'cancelling',
                  'succeeded', 'failed', 'cancelled')
    ),
    constraint jobs_failed_with_failure check (state <> 'failed' or failure is not null),
    constraint jobs_final_is_finished
        check ((state in ('succeeded', 'failed', 'cancelled')) = (finished_at is not null))
);
create index jobs_by_project on jobs (project_id, id);
create index jobs_by_work_item on jobs (work_item_id);
create index jobs_by_dataset on jobs (dataset_id);
create index jobs_by_tokenization on jobs (tokenization_id);

-- The latest report of the running attempt. Apart from jobs, because it is rewritten every second.
create table job_progress (
    job_id text primary key references jobs (id) on delete cascade,
    lease_epoch bigint not null,
    step bigint not null,
    loss double precision,
    learning_rate double precision,
    tokens_per_s double precision,
    num_tokens bigint not null,
    num_restarts bigint not null,
    updated_at timestamptz not null default now()
) with (fillfactor = 50);

-- What happened to a job, in order. seq has no gaps and becomes visible in order, because it is drawn
-- from the job's row within the transaction that it tells of.
create table job_events (
    job_id text not null references jobs (id) on delete cascade,
    seq bigint not null,
    at timestamptz not null default now(),
    type text not null,
    lease_epoch bigint, -- null for what a user did
    message text not null,
    data jsonb not null default '{}',
    primary key (job_id, seq)
);

-- Append-only. Attempts overlap where one went on from an earlier state than the last one reached; a
-- read takes each step's value from the line that survived.
create table job_metrics (
    job_id text not null references jobs (id) on delete cascade,
    lease_epoch bigint not null,
    step bigint not null,
    name text not null,
    value double precision not null,
    primary key (job_id, name, step, lease_epoch)
);

-- Bases, restarts, checkpoints and states. The row is the commit: it is written when every file is
-- durable and its hash is known.
create table nodes (
    id text primary key,
    project_id text not null references projects (id),
    job_id text not null references jobs (id),
    parent_id text references nodes (id), -- may belong to another job
    kind text not null,
    lease_epoch bigint not null,
    step bigint not null,
    restart bigint not null, -- for a restart its number from 1, else the restarts before the node
    superseded boolean not null default false, -- a later attempt went on from an earlier state
    created_at timestamptz not null default now(),
    constraint nodes_kind_known check (kind in ('base', 'restart', 'checkpoint', 'state')),
    -- A repeated commit finds the node that is there already.
    constraint nodes_once_per_attempt unique (job_id, lease_epoch, kind, step)
);
create index nodes_by_project on nodes (project_id, kind, id);
create index nodes_by_job on nodes (job_id, kind, step desc);
create index nodes_by_parent on nodes (parent_id);

-- Nodes may share an object: all states of one cycle name the same frozen weights.
create table node_files (
    node_id text not null references nodes (id) on delete cascade,
    name text not null,
    object_key text not null,
    size_bytes bigint not null,
    sha256 text not null,
    primary key (node_id, name)
);
create index node_files_by_object on node_files (object_key);
