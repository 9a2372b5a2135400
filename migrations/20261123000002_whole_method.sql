-- A spec names every choice of the method: the factors' scale in the place of alpha, the wrapped matrices, what trains
-- beside them, the period and the kind of resets.
update jobs
set spec = jsonb_set(spec, '{method}',
    (spec -> 'method') - 'alpha' || jsonb_build_object(
        'scale', (spec #>> '{method,alpha}')::double precision / (spec #>> '{method,rank}')::double precision,
        'target_modules', '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'::jsonb,
        'train_embeddings', true,
        'train_head', true
    ))
where spec #>> '{method,type}' in ('lora', 'relora');

update jobs
set spec = jsonb_set(spec, '{method}',
    (spec -> 'method') || jsonb_build_object(
        'reset_every_steps', spec #> '{method,restart_every_steps}',
        'restart_schedule', 'jagged',
        'rank_threshold', null,
        'optimizer_reset', case spec #>> '{method,optimizer_reset,type}'
            when 'zero' then '{"type": "zero", "reset_step_count": true}'::jsonb
            else '{"type": "none"}'::jsonb
        end
    ))
where spec #>> '{method,type}' = 'relora';

update jobs set spec = jsonb_set(spec, '{batch,skip_seqs}', '0');

-- The trainer's contract and its states changed with the spec: an older worker must not take what is queued here, and
-- what it left in the middle of a run begins again.
alter table work_items alter column format_version set default 2;
update work_items set format_version = 2;
update nodes set superseded = true where kind = 'state';

-- What a restart merged: the norm of the update, by kind of matrix.
alter table nodes add column update_norms jsonb;
