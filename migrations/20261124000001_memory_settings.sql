-- A spec says how memory is spent. `auto` stays in it: the trainer chooses, and what it chose is kept beside the spec.
update jobs
set spec = spec || '{"memory": {"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"}}';

-- The trainer's contract and its states changed with the spec: an older worker must not take what is queued here, and
-- what it left in the middle of a run begins again.
alter table work_items alter column format_version set default 3;
update work_items set format_version = 3;
update nodes set superseded = true where kind = 'state';

-- What the first attempt chose: its micro-batch, and where it kept merged weights.
alter table jobs add column choices jsonb;

-- What a worker's trainer found of its device; null where it found nothing.
alter table workers
    add column memory_bytes bigint,
    add column bf16_speedup double precision; -- rate of matrix products in bf16, as a multiple of that in fp32
