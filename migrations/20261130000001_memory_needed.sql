-- The least memory that a job needs on either device, by the estimate of its spec and of what its trainer chose; null
-- where nothing is known. A worker claims no job that needs more than it has.
alter table work_items
    add column cpu_bytes bigint,
    add column gpu_bytes bigint;
