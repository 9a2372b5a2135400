//! What a migration does to data that is there already.

use relora::{
    db::MIGRATOR,
    domain::contract::FORMAT_VERSION,
    domain::spec::{
        CheckpointsSpec, FrozenWeights, MemorySpec, MergedWeights, MethodSpec, MicroBatch, OptimizerReset, Recompute,
        RetriesSpec, TrainSpec,
    },
};
use serde_json::{Value, json};
use sqlx::PgPool;

/// A spec as it was stored before the whole method could be set.
fn old_spec(method: Value) -> Value {
    json!({
        "spec_version": 1, "name": "old", "dataset": "ds_1", "tokenization": "tz_1",
        "model": {
            "preset": null, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": false
        },
        "method": method,
        "optimizer": {
            "learning_rate": 1e-3, "warm_start_learning_rate": 5e-4, "betas": [0.9, 0.999], "eps": 1e-8,
            "weight_decay": 0.0, "clip_norm": 1.0
        },
        "schedule": {"num_steps": 100, "warmup_steps": 5, "min_lr_frac": 0.1},
        "batch": {"num_seqs": 8, "sequence_length": 64, "micro_batch_seqs": 8},
        "precision": "fp32", "deterministic": true, "seed": 0,
        "eval": {"every_steps": 100, "max_tokens": 1000, "prompts": []},
        "checkpoints": {"every_steps": 100}, "state_every_s": 60,
        "resources": {"device": "auto", "num_gpus": 1}, "priority": 0, "labels": {}, "max_runtime_s": null
    })
}

#[sqlx::test(migrations = false)]
async fn specs_of_the_first_version_gain_the_settings_that_came_later(pool: PgPool) {
    MIGRATOR.run_to(20_261_123_000_001, &pool).await.unwrap();
    sqlx::raw_sql(
        "insert into projects (id, name) values ('p', 'p');
         insert into datasets (id, project_id, name) values ('ds_1', 'p', 'd');
         insert into work_items (id, project_id, kind) values ('w', 'p', 'train');
         insert into tokenizations (id, project_id, dataset_id, work_item_id, vocab_size, validation_frac)
         values ('tz_1', 'p', 'ds_1', 'w', 300, 0.1)",
    )
    .execute(&pool)
    .await
    .unwrap();
    let low_rank = |more: Value| {
        let mut method =
            json!({"rank": 8, "alpha": 32.0, "dropout": 0.0, "warm_start_steps": 20, "relora_warmup_steps": 5});
        more.as_object().unwrap().iter().for_each(|(key, value)| method[key] = value.clone());
        method
    };
    let relora = |reset: &str| {
        low_rank(json!({
            "type": "relora", "restart_every_steps": 20, "restart_warmup_steps": 2, "restart_lr": "one_over_w",
            "optimizer_reset": {"type": reset}, "allow_short_last_cycle": false
        }))
    };
    let methods = [json!({"type": "full"}), low_rank(json!({"type": "lora"})), relora("zero"), relora("none")];
    for (index, method) in methods.iter().enumerate() {
        sqlx::query(
            "with item as (insert into work_items (id, project_id, kind) values ($1, 'p', 'train') returning id)
             insert into jobs (id, project_id, work_item_id, dataset_id, tokenization_id, name, spec)
             select $1, 'p', id, 'ds_1', 'tz_1', 'old', $2 from item",
        )
        .bind(index.to_string())
        .bind(old_spec(method.clone()))
        .execute(&pool)
        .await
        .unwrap();
    }

    MIGRATOR.run(&pool).await.unwrap();

    let specs: Vec<Value> = sqlx::query_scalar("select spec from jobs order by id").fetch_all(&pool).await.unwrap();
    let specs: Vec<TrainSpec> = specs.into_iter().map(|spec| serde_json::from_value(spec).unwrap()).collect();
    assert_eq!(specs[0].method, MethodSpec::Full {});
    assert_eq!(specs[1].method.factors().unwrap().scale, 4.0);
    let reset = |spec: &TrainSpec| spec.method.relora().unwrap().optimizer_reset;
    assert_eq!(reset(&specs[2]), OptimizerReset::Zero { reset_step_count: true });
    assert_eq!(reset(&specs[3]), OptimizerReset::None {});
    assert_eq!(specs[2].method.relora().unwrap().reset_every_steps, 20);
    for spec in specs {
        let memory = MemorySpec {
            recompute: Recompute::Cheap,
            frozen_weights: FrozenWeights::Full,
            merged_weights: MergedWeights::Auto,
        };
        assert_eq!((spec.memory, spec.batch.micro_batch_seqs), (memory, MicroBatch::Seqs(8)));
        let keep_all =
            CheckpointsSpec { every_steps: 100, keep_last: None, keep_every_steps: None, keep_best: None, ttl_s: None };
        assert_eq!(spec.checkpoints, keep_all);
        assert_eq!((spec.max_stall_s, spec.retries), (900, RetriesSpec { infrastructure: 5, user: 0 }));
    }
    let versions: Vec<i64> =
        sqlx::query_scalar("select distinct format_version from work_items").fetch_all(&pool).await.unwrap();
    assert_eq!(versions, [FORMAT_VERSION]);
}
