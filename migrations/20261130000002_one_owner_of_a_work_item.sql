-- A work item is done for one job, one tokenization or one task. The planner must know it: without statistics it took a
-- work item to have many jobs, and looked in every claim through all jobs of a tokenization, once for each that waited.
drop index jobs_by_work_item, tokenizations_by_work_item, lineage_tasks_by_work_item;
create unique index jobs_by_work_item on jobs (work_item_id);
create unique index tokenizations_by_work_item on tokenizations (work_item_id);
create unique index lineage_tasks_by_work_item on lineage_tasks (work_item_id);
