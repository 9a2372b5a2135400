-- What users and operators ask of work that exists: pause, resume, retry, forced cancellation, drain.
alter table work_items
    drop constraint work_items_state_known,
    drop constraint work_items_desired_known,
    add constraint work_items_state_known check (state in ('queued', 'leased', 'paused', 'done')),
    add constraint work_items_desired_known
        check (desired in ('run', 'save', 'pause', 'cancel', 'kill', 'drain')),
    -- Failures that are not the infrastructure's. They have a budget of their own, which progress does not refill.
    add column user_failures bigint not null default 0;
alter table attempts
    drop constraint attempts_outcome_known,
    add constraint attempts_outcome_known
        check (outcome in ('succeeded', 'failed', 'released', 'paused', 'cancelled', 'lease_expired'));

alter table workers
    -- A draining worker is given no more work.
    add column is_draining boolean not null default false,
    -- What must be equal for two workers to compute the same bits; null where it is not known.
    add column numerics jsonb;

alter table jobs
    -- Whether the result is to the bit that of a run without interruption.
    add column is_exact boolean not null default true,
    -- The clock of max_runtime_s begins anew here.
    add column retried_at timestamptz;

update jobs set spec = spec || '{"retries": {"infrastructure": 5, "user": 0}, "max_stall_s": 900}';

-- Whoever waits for work looks at once when an item can be claimed. A hint, never the truth: everybody also polls.
create function notify_work_queued() returns trigger language plpgsql as $$
begin
    perform pg_notify('work_queued', new.kind);
    return null;
end
$$;
create trigger work_items_queued after insert or update of state, eligible_at on work_items
    for each row when (new.state = 'queued') execute function notify_work_queued();

-- Jobs wait for their tokens.
create function notify_tokens_ready() returns trigger language plpgsql as $$
begin
    perform pg_notify('work_queued', 'train');
    return null;
end
$$;
create trigger tokenizations_ready after update of state on tokenizations
    for each row when (new.state = 'ready') execute function notify_tokens_ready();

-- The trainer's contract changed with the spec: an older worker must not take what is queued here, and what it left in
-- the middle of a run begins again.
alter table work_items alter column format_version set default 4;
update work_items set format_version = 4;
update nodes set superseded = true where kind = 'state';
