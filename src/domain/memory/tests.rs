//! The estimate against numbers that were computed by hand, for a model small enough for that.

use serde_json::{Value, json};

use super::{choose::least_bytes, *};

/// 1,160 parameters: 960 in the matrices, 160 in embeddings and head, 40 in norms. Changed as the JSON merge patch says.
fn spec(changes: &[(&str, Value)]) -> TrainSpec {
    let mut spec = json!({
        "spec_version": 1, "name": "test", "dataset": "ds_1", "tokenization": "tz_1",
        "model": {
            "preset": null, "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "initializer_range": 0.1, "tie_word_embeddings": false
        },
        "method": {
            "type": "lora", "rank": 2, "scale": 2.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"],
            "train_embeddings": true, "train_head": false, "warm_start_steps": 0, "relora_warmup_steps": 0
        },
        "optimizer": {
            "learning_rate": 0.01, "warm_start_learning_rate": 0.005, "betas": [0.9, 0.99], "eps": 1e-8,
            "weight_decay": 0.01, "clip_norm": 1.0
        },
        "schedule": {"num_steps": 14, "warmup_steps": 2, "min_lr_frac": 0.1},
        "batch": {"num_seqs": 1000, "sequence_length": 16, "micro_batch_seqs": "auto", "skip_seqs": 0},
        "memory": {"recompute": "cheap", "frozen_weights": "full", "merged_weights": "auto"},
        "precision": "fp32", "deterministic": true, "seed": 11,
        "eval": {"every_steps": 100, "max_tokens": 90, "prompts": []},
        "checkpoints": {"every_steps": 100}, "state_every_s": 3600,
        "resources": {"device": "auto", "num_gpus": 1}, "priority": 0, "labels": {}, "max_runtime_s": null,
        "max_stall_s": 900, "retries": {"infrastructure": 5, "user": 0}
    });
    for (pointer, value) in changes {
        *spec.pointer_mut(pointer).expect("a field of a spec") = value.clone();
    }
    serde_json::from_value(spec).expect("a spec")
}

fn full(precision: &str) -> TrainSpec {
    spec(&[("/method", json!({"type": "full"})), ("/precision", json!(precision))])
}

fn choices(micro_batch_seqs: i64, merged_weights: MergedPlan) -> Choices {
    Choices { micro_batch_seqs, merged_weights }
}

fn low_rank(changes: &[(&str, Value)], plan: MergedPlan) -> WeightBytes {
    MemoryNeeds::of(&spec(changes), &choices(1, plan), Device::Cpu).low_rank
}

#[test]
fn a_full_rank_phase_holds_sixteen_bytes_for_each_parameter() {
    let needs = |spec: &TrainSpec| MemoryNeeds::of(spec, &choices(1, MergedPlan::Resident), Device::Cpu);
    let fp32 = needs(&full("fp32"));
    assert_eq!(fp32.full_rank, WeightBytes { parameters: 16 * 1_160, ..WeightBytes::default() });
    assert_eq!(fp32.low_rank, WeightBytes::default());
    assert_eq!(needs(&full("bf16")).full_rank.bf16_copies, 2 * (960 + 80 + 96), "matrices, head, gate's gradient");
    let many_words =
        spec(&[("/method", json!({"type": "full"})), ("/precision", json!("bf16")), ("/model/vocab_size", json!(20))]);
    assert_eq!(needs(&many_words).full_rank.bf16_copies, 2 * (960 + 160 + 160), "matrices, head and its gradient");
    let warm_start = |steps: i64| needs(&spec(&[("/method/warm_start_steps", json!(steps))])).full_rank;
    assert_eq!(warm_start(1), fp32.full_rank);
    assert_eq!(warm_start(0), WeightBytes::default());
}

#[test]
fn a_low_rank_phase_holds_factors_and_frozen_matrices() {
    // Of a layer's 480 elements 64 are in q_proj, 8 x 8, and 96 in down_proj, 8 x 12: wrapped 320 in two layers. Their
    // factors have 2 x (16 + 20) a layer, 144 together. The head, 80, is not trained.
    let fp32 = low_rank(&[], MergedPlan::Resident);
    let parameters = 16 * (1_160 - 320 - 80 + 144) + 4 * 80;
    let in_fp32 = WeightBytes { parameters, master: 4 * 320, merged: 4 * 320, ..WeightBytes::default() };
    assert_eq!(fp32, in_fp32);
    assert_eq!(low_rank(&[], MergedPlan::Scratch), WeightBytes { merged: 4 * 160, ..in_fp32 });

    let bf16 = low_rank(&[("/precision", json!("bf16"))], MergedPlan::Scratch);
    assert_eq!(bf16, WeightBytes { merged: 2 * 160, bf16_copies: 2 * (640 + 80 + 144 + 96), ..in_fp32 });

    let frozen = |form: &str| low_rank(&[("/memory/frozen_weights", json!(form))], MergedPlan::Scratch);
    // A scale for each of the 8 + 8 rows of a layer.
    assert_eq!(frozen("int8"), WeightBytes { quantised: 320 + 4 * 32, merged: 4 * 160, ..in_fp32 });
    // A scale for each of the 1 + 2 blocks of a layer.
    assert_eq!(frozen("nf4"), WeightBytes { quantised: 160 + 4 * 6, merged: 4 * 160, ..in_fp32 });
}

#[test]
fn what_is_frozen_beside_the_matrices_is_counted_once() {
    let of = |tied: bool, embeddings: bool, head: bool| {
        let changes = [
            ("/model/tie_word_embeddings", json!(tied)),
            ("/method/train_embeddings", json!(embeddings)),
            ("/method/train_head", json!(head)),
        ];
        low_rank(&changes, MergedPlan::Scratch).parameters
    };
    assert_eq!(of(false, true, true), 16 * (1_160 - 320 + 144));
    assert_eq!(of(false, false, false), 16 * (1_160 - 320 - 160 + 144) + 4 * 160);
    assert_eq!(of(true, true, true), 16 * (1_080 - 320 + 144));
    assert_eq!(of(true, false, false), 16 * (1_080 - 320 - 80 + 144) + 4 * 80);
}

#[test]
fn factors_that_stand_in_the_place_of_matrices_freeze_nothing() {
    let method = json!({
        "type": "factorized", "rank": 2, "scale": 2.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"],
        "train_embeddings": true, "train_head": true
    });
    let needs = MemoryNeeds::of(&spec(&[("/method", method)]), &choices(1, MergedPlan::Resident), Device::Cpu);
    assert_eq!(needs.full_rank, WeightBytes::default());
    assert_eq!(needs.low_rank, WeightBytes { parameters: 16 * (1_160 - 320 + 144), ..WeightBytes::default() });
}

#[test]
fn a_control_is_as_large_as_it_is_trained() {
    let method = json!({"type": "control", "rank": 2, "hidden_size": 4, "intermediate_size": 6});
    let needs = MemoryNeeds::of(&spec(&[("/method", method)]), &choices(1, MergedPlan::Resident), Device::Cpu);
    // A layer of 4x4 + 2x(2x4) + 4x4 + 3x(6x4) = 120, embeddings and head of 40, five norms of 4.
    assert_eq!(needs.full_rank.parameters, 16 * (2 * 120 + 80 + 20));
}

#[test]
fn activations_grow_with_the_micro_batch_and_with_what_is_kept() {
    let on = |device, precision: &str, recompute: &str| {
        let spec = spec(&[("/precision", json!(precision)), ("/memory/recompute", json!(recompute))]);
        MemoryNeeds::of(&spec, &choices(3, MergedPlan::Scratch), device)
    };
    let activations =
        |precision: &str| ["none", "cheap", "layers"].map(|kept| on(Device::Cpu, precision, kept).activations);
    // A layer keeps of a token, in fp32: residuals 64, queries, keys and values 64, attention 32 + 8, gate and up 96.
    assert_eq!(activations("fp32"), [48 * 2 * (264 + 64 + 48), 48 * 2 * 264, 48 * (2 * 32 + 264)]);
    assert_eq!(activations("bf16"), [48 * 2 * (168 + 32 + 24), 48 * 2 * 168, 48 * (2 * 32 + 168)]);
    // Two heads have 16 probabilities for a token, in each layer, and scores with gradients in one.
    let probabilities = |precision: &str, recompute: &str| on(Device::Cuda, precision, recompute).probabilities;
    assert_eq!(probabilities("fp32", "cheap"), 48 * 32 * (2 * 4 + 4 + 4));
    assert_eq!(probabilities("bf16", "layers"), 48 * 32 * (2 + 4 + 2));
    let fp32 = on(Device::Cpu, "fp32", "none");
    assert_eq!((fp32.transient, fp32.logits, fp32.probabilities), (48 * (96 + 4 * 44), 4 * 48 * 10, 0));
    let many = MemoryNeeds::of(&spec(&[]), &choices(1_000, MergedPlan::Scratch), Device::Cpu);
    assert_eq!(many.logits, 4 * 1_024 * 10, "in chunks");
}

#[test]
fn the_larger_phase_counts_and_a_master_beside_a_gpu_does_not() {
    let of_batch = 16 * (2 * 264 + 272 + 40);
    assert_eq!(bytes(&full("fp32"), &choices(1, MergedPlan::Scratch), Device::Cpu), 18_560 + of_batch);
    assert_eq!(least_bytes(&full("fp32"), Device::Cpu), 18_560 + 16 * (2 * 32 + 264 + 272 + 40));
    let warm_start = spec(&[("/method/warm_start_steps", json!(1))]);
    assert_eq!(bytes(&warm_start, &choices(1, MergedPlan::Resident), Device::Cpu), 18_560 + of_batch);

    // 14,784 for the parameters, 1,280 for the master, 640 for a layer that is merged, 448 or 184 quantised.
    let low_rank = |form: &str, device| {
        // A GPU keeps probabilities.
        let of_batch = of_batch + if device == Device::Cuda { 16 * 512 } else { 0 };
        bytes(&spec(&[("/memory/frozen_weights", json!(form))]), &choices(1, MergedPlan::Scratch), device) - of_batch
    };
    for device in [Device::Cpu, Device::Cuda] {
        assert_eq!(low_rank("full", device), 14_784 + 1_280 + 640);
    }
    assert_eq!(low_rank("int8", Device::Cpu), 14_784 + 1_280 + 640 + 448);
    assert_eq!(low_rank("int8", Device::Cuda), 14_784 + 640 + 448);
    assert_eq!(low_rank("nf4", Device::Cuda), 14_784 + 640 + 184);
}

#[test]
fn no_size_that_a_spec_may_have_is_too_large_to_be_added_up() {
    let sizes = [
        ("/model/hidden_size", 65_536),
        ("/model/intermediate_size", 262_144),
        ("/model/num_hidden_layers", 512),
        ("/model/vocab_size", 1 << 20),
        ("/batch/num_seqs", 1 << 20),
        ("/batch/sequence_length", 1 << 20),
    ];
    let spec = spec(&sizes.map(|(pointer, size)| (pointer, json!(size))));
    assert_eq!(bytes(&spec, &choices(1 << 20, MergedPlan::Resident), Device::Cpu), i64::MAX);
    assert!(least_bytes(&spec, Device::Cpu) < i64::MAX);
    assert!(too_large(&spec, Device::Cpu, Some(1 << 34)).contains("does not fit"));
}

#[test]
fn a_micro_batch_is_as_large_as_helps_where_memory_is_not_known() {
    let seqs = |device, num_seqs: i64| choose(&spec(&[("/batch/num_seqs", json!(num_seqs))]), device, None);
    assert_eq!(seqs(Device::Cpu, 1_000), choices(256, MergedPlan::Resident));
    assert_eq!(seqs(Device::Cpu, 100).micro_batch_seqs, 100);
    assert_eq!(seqs(Device::Cuda, 1_000_000).micro_batch_seqs, 4_096);
    let long = spec(&[("/batch/sequence_length", json!(5_000))]);
    assert_eq!(choose(&long, Device::Cpu, None).micro_batch_seqs, 1);
}

#[test]
fn what_is_chosen_is_the_most_that_fits() {
    let spec = spec(&[("/batch/sequence_length", json!(64))]);
    for memory in [300_000, 500_000, 1_000_000, 5_000_000] {
        let chosen = choose(&spec, Device::Cpu, Some(memory));
        assert!(bytes(&spec, &chosen, Device::Cpu) <= memory / 100 * 80);
        let more = Choices { micro_batch_seqs: chosen.micro_batch_seqs + 1, ..chosen };
        assert!(chosen.micro_batch_seqs == 64 || bytes(&spec, &more, Device::Cpu) > memory / 100 * 80, "{chosen:?}");
    }
    assert_eq!(choose(&spec, Device::Cpu, Some(1)).micro_batch_seqs, 1);
}

#[test]
fn merged_weights_are_resident_where_they_fit_and_are_not_quantised() {
    let plan = |changes: &[(&str, Value)], memory| choose(&spec(changes), Device::Cpu, memory).merged_weights;
    let resident = bytes(&spec(&[]), &choices(1, MergedPlan::Resident), Device::Cpu);
    assert_eq!(plan(&[], Some(resident * 100 / 80 + 100)), MergedPlan::Resident);
    assert_eq!(plan(&[], Some(resident * 100 / 80 - 100)), MergedPlan::Scratch);
    assert_eq!(plan(&[("/memory/frozen_weights", json!("nf4"))], None), MergedPlan::Scratch);
    assert_eq!(plan(&[("/memory/merged_weights", json!("resident"))], Some(1)), MergedPlan::Resident);
    assert_eq!(plan(&[("/memory/merged_weights", json!("scratch"))], None), MergedPlan::Scratch);
}

#[test]
fn a_number_that_is_given_is_not_chosen_again() {
    let given = spec(&[("/batch/micro_batch_seqs", json!(999))]);
    assert_eq!(choose(&given, Device::Cpu, Some(1)).micro_batch_seqs, 999);
}

/// What is said of a run whose estimate is `share` of what may be planned with, in per cent.
fn advice(changes: &[(&str, Value)], share: i64) -> String {
    let spec = spec(changes);
    let settled = choose(&spec, Device::Cuda, None);
    let memory = bytes(&spec, &settled, Device::Cuda) * 100 / share * 100 / 80;
    let message = too_large(&spec.with_choices(&settled), Device::Cuda, Some(memory));
    message.split_once(" at once. ").expect("an estimate, and then advice").1.to_owned()
}

#[test]
fn a_shortage_is_of_what_is_given_and_not_of_what_may_be_chosen() {
    let long = ("/batch/sequence_length", json!(64));
    let given = [long.clone(), ("/batch/micro_batch_seqs", json!(100))];
    let needed = bytes(&spec(&given), &choices(100, MergedPlan::Scratch), Device::Cpu);
    assert_eq!(shortage(&spec(&given), Device::Cpu, needed), None);
    let Shortage { pointer, message } = shortage(&spec(&given), Device::Cpu, needed - 1).expect("too few bytes");
    assert_eq!(pointer, "/batch/micro_batch_seqs");
    assert!(message.contains("a micro-batch of 100 x 64 tokens"), "{message}");
    assert_eq!(shortage(&spec(&[long]), Device::Cpu, needed / 2), None, "fewer sequences are chosen");
}

#[test]
fn a_run_is_short_of_memory_where_there_is_less_than_it_needs() {
    let auto = [("/batch/sequence_length", json!(64))];
    let given = [auto[0].clone(), ("/batch/micro_batch_seqs", json!(3)), ("/memory/merged_weights", json!("resident"))];
    let quantised = [auto[0].clone(), ("/memory/frozen_weights", json!("nf4"))];
    for changes in [&auto[..], &given, &quantised] {
        for device in [Device::Cpu, Device::Cuda] {
            let needed = needed_bytes(&spec(changes), 0, device);
            assert_eq!(shortage(&spec(changes), device, needed), None, "{changes:?}");
            assert!(shortage(&spec(changes), device, needed - 1).is_some(), "{changes:?}");
        }
    }
}

#[test]
fn a_warm_start_that_is_over_needs_no_memory() {
    let with = |warm_start_steps: i64| spec(&[("/method/warm_start_steps", json!(warm_start_steps))]);
    let needed = |spec: &TrainSpec, step| needed_bytes(spec, step, Device::Cpu);
    assert_eq!(needed(&with(10), 10), needed(&with(10), 0));
    assert_eq!(needed(&with(10), 11), needed(&with(0), 0));
    assert!(needed(&with(10), 11) < needed(&with(10), 10));
    assert_eq!(needed(&full("fp32"), 100), needed(&full("fp32"), 0));
}

#[test]
fn a_shortage_points_at_what_its_advice_changes() {
    let given = |seqs: i64| spec(&[("/batch/sequence_length", json!(64)), ("/batch/micro_batch_seqs", json!(seqs))]);
    let of = |seqs: i64, memory: i64| {
        let Shortage { pointer, message } = shortage(&given(seqs), Device::Cpu, memory).expect("too few bytes");
        (pointer, message.split_once(" at once. ").expect("an estimate, and then advice").1.to_owned())
    };
    let least = least_bytes(&given(1), Device::Cpu);
    // One sequence may be planned with if every layer is computed again, and not as the spec has it.
    let cheapest = bytes(&given(1), &choices(1, MergedPlan::Scratch), Device::Cpu);
    let memory = least * 100 / 80 + 200;
    assert!(cheapest > memory / 100 * 80);
    let (pointer, advice) = of(2, memory);
    assert!(pointer == "/memory" && advice.contains("memory.recompute layers"), "{pointer}: {advice}");
    for memory in [least - 1, least] {
        let (pointer, advice) = of(2, memory);
        assert!(pointer == "/model" && advice.contains("take a smaller one"), "{pointer}: {advice}");
    }
    let (pointer, advice) = of(100, cheapest * 2);
    assert!(pointer == "/batch/micro_batch_seqs" && advice.contains("micro_batch_seqs of"), "{pointer}: {advice}");
}

#[test]
fn whoever_ran_out_of_memory_learns_what_would_fit() {
    let seqs = |seqs: i64| ("/batch/micro_batch_seqs", json!(seqs));
    // Of 100 sequences weights are less than a fiftieth.
    let fewer = advice(&[seqs(100)], 200);
    assert!(fewer.ends_with("for which a batch.micro_batch_seqs of 49 would do"), "{fewer}");
    let other = advice(&[seqs(100)], 90);
    assert!(other.ends_with("for which a batch.micro_batch_seqs of 50 would do"), "{other}: it should have fitted");

    let long = ("/batch/sequence_length", json!(64));
    let layers = advice(&[seqs(1), long.clone()], 110);
    let settings = "memory.recompute layers, memory.merged_weights scratch and a batch.micro_batch_seqs of 1 would do";
    assert!(layers.ends_with(settings), "{layers}");
    let nothing = advice(&[seqs(1), long.clone()], 300);
    assert!(nothing.starts_with("The model does not fit: 0.00 GiB are there"), "{nothing}");

    let alone = advice(&[seqs(1)], 90);
    assert!(alone.ends_with("something else uses them"), "{alone}");
    assert!(too_large(&spec(&[]), Device::Cuda, None).contains("lower batch.micro_batch_seqs"));
}

#[test]
fn quantised_weights_are_advised_where_frozen_ones_are_too_large() {
    // 393,216 elements in a layer's three matrices, and little else.
    let frozen = |form: &str| {
        [
            ("/model/intermediate_size", json!(1 << 14)),
            ("/model/num_hidden_layers", json!(24)),
            ("/method/target_modules", json!(["gate_proj", "up_proj", "down_proj"])),
            ("/method/rank", json!(1)),
            ("/batch/micro_batch_seqs", json!(1)),
            ("/batch/sequence_length", json!(2)),
            ("/memory/recompute", json!("layers")),
            ("/memory/merged_weights", json!("scratch")),
            ("/memory/frozen_weights", json!(form)),
        ]
    };
    let int8 = advice(&frozen("full"), 120);
    assert!(int8.contains("for which memory.frozen_weights int8 and a batch.micro_batch_seqs of 1"), "{int8}");
    let nf4 = advice(&frozen("int8"), 104);
    assert!(nf4.contains("for which memory.frozen_weights nf4 and"), "{nf4}");
    let nothing = advice(&frozen("nf4"), 104);
    assert!(nothing.contains("does not fit"), "{nothing}");
}

#[test]
fn the_estimate_names_its_parts() {
    let changes = [
        ("/model/hidden_size", json!(4_096)),
        ("/model/intermediate_size", json!(11_008)),
        ("/memory/frozen_weights", json!("int8")),
        ("/method/warm_start_steps", json!(1)),
    ];
    let on = |device| MemoryNeeds::of(&spec(&changes), &choices(4, MergedPlan::Scratch), device).to_string();
    let text = on(Device::Cpu);
    for part in [
        "at full rank the run holds",
        "at low rank the run holds",
        "of weights, gradients and moments",
        "of frozen matrices",
        "of quantised ones",
        "of merged ones",
        "a micro-batch of 4 x 16 tokens takes",
        "of activations",
        "of logits",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("bf16") && !text.contains("probabilities"), "{text}");
    let on_a_gpu = on(Device::Cuda);
    assert!(on_a_gpu.contains("of attention's probabilities") && !on_a_gpu.contains("frozen"), "{on_a_gpu}");
}
