//! The parts of a model, each over the weights that it has.

use tch::{Device, Kind, Tensor};

use super::{
    layer::{Layer, Norm},
    projection::{Padded, Projection},
    shared::Shared,
};
use crate::{
    domain::spec::{Linear, ModelSpec},
    train::{
        model::{EMBEDDING, HEAD, linear_path},
        native,
        weights::{Place, Weights},
    },
};

pub struct Embedding {
    pub value: Tensor, // (v, h)
    pub gradient: Option<Tensor>,
}

pub fn layer(spec: &ModelSpec, weights: &Weights, index: i64, shared: &Shared) -> Layer {
    let norm = |name: &str| {
        let place = weights.place(&format!("model.layers.{index}.{name}.weight"));
        Norm::new(place.expect("a norm trains"), spec.rms_norm_eps)
    };
    let shapes = spec.linear_shapes();
    let intermediate = shared.padded(spec.intermediate_size);
    let projection = |linears: &[usize], padded: Padded| {
        let matrix = |&linear: &usize| weights.matrix(&linear_path(index, Linear::ALL[linear]), shapes[linear]);
        Projection::new(linears.iter().map(matrix).collect(), 7 * index + linears[0] as i64, padded, shared)
    };
    let as_they_are = Padded { rows: None, inputs: spec.hidden_size };
    Layer {
        input_norm: norm("input_layernorm"),
        post_attention_norm: norm("post_attention_layernorm"),
        qkv: projection(&[0, 1, 2], as_they_are),
        output: projection(&[3], as_they_are),
        gate_up: projection(&[4, 5], Padded { rows: Some(intermediate), ..as_they_are }),
        down: projection(&[6], Padded { rows: None, inputs: intermediate }),
    }
}

pub fn head(spec: &ModelSpec, weights: &Weights, shared: &Shared) -> Projection {
    let name = if spec.tie_word_embeddings { EMBEDDING } else { HEAD };
    let shape = (spec.vocab_size, spec.hidden_size);
    let matrix = weights.matrix(name.trim_end_matches(".weight"), shape);
    // oneDNN takes logits only without padding, and is as quick with them.
    let (kind, device) = shared.products();
    let rows = (!native::multiplies_by_onednn(kind, device)).then(|| shared.padded(spec.vocab_size));
    let padded = Padded { rows, inputs: spec.hidden_size };
    Projection::new(vec![matrix], 7 * spec.num_hidden_layers, padded, shared)
}

pub fn embedding(weights: &Weights) -> Embedding {
    match weights.place(EMBEDDING) {
        Some(Place { value, gradient }) => Embedding { value, gradient: Some(gradient) },
        None => Embedding { value: weights.master(EMBEDDING).expect("a model has an embedding"), gradient: None },
    }
}

/// Cosines and sines of rotary position embedding in the half-split form: element i is turned together with element
/// i + d/2. Both (positions, d/2).
pub fn rotary(spec: &ModelSpec, sums: (Kind, Device)) -> (Tensor, Tensor) {
    let dim = spec.head_dim();
    let frequencies: Vec<_> = (0..dim / 2).map(|i| spec.rope_theta.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
    let positions = Tensor::arange(spec.max_position_embeddings, sums);
    let angles = positions.outer(&Tensor::from_slice(&frequencies).to_kind(sums.0).to_device(sums.1));
    (angles.cos(), angles.sin())
}
