//! The model in plain autograd: what the engine's passes, written by hand, are compared with. Nothing here is fast.
//!
//! In shapes: b sequences, t positions, h hidden, n query heads, g key and value heads, d elements of a head,
//! f intermediate, v vocabulary, r rank.

use std::collections::BTreeMap;

use tch::{Kind, Reduction, Tensor};

use super::{
    engine::DropoutPlace,
    model::{EMBEDDING, HEAD, linear_path},
    native::kernels::{Kernels, MaskPlace},
    ops::sum_kind,
    weights::Weights,
};
use crate::domain::spec::{Linear, ModelSpec};

struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        let mean_square = x.square().mean_dim([-1i64].as_slice(), true, x.kind());
        x * (mean_square + self.eps).rsqrt() * &self.weight
    }
}

/// The low-rank branch beside a frozen matrix.
struct Branch {
    a: Tensor, // (r, in)
    b: Tensor, // (out, r)
    scale: f64,
}

/// x ↦ x (W + sBA)ᵀ, with or without either part.
struct Projection {
    weight: Option<Tensor>, // (out, in)
    branch: Option<Branch>,
}

impl Projection {
    /// `mask` is the dropout on the branch's input.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let product = |x: &Tensor, weight: &Tensor| x.linear(&weight.to_kind(x.kind()), None::<Tensor>);
        let of_branch = |branch: &Branch| {
            let x = mask.map_or_else(|| x.shallow_clone(), |mask| x * mask);
            product(&product(&x, &branch.a), &branch.b) * branch.scale
        };
        match (&self.weight, &self.branch) {
            (Some(weight), Some(branch)) => product(x, weight) + of_branch(branch),
            (Some(weight), None) => product(x, weight),
            (None, Some(branch)) => of_branch(branch),
            (None, None) => unreachable!("a model has every matrix or its factors"),
        }
    }
}

/// Rotary position embedding in the half-split form: element i is rotated together with element i + d/2.
struct Rotary {
    cos: Tensor, // (t, d)
    sin: Tensor, // (t, d)
}

impl Rotary {
    fn new(spec: &ModelSpec, kind: Kind) -> Self {
        let dim = spec.head_dim();
        let frequencies: Vec<_> =
            (0..dim / 2).map(|i| spec.rope_theta.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
        let positions = Tensor::arange(spec.max_position_embeddings, (kind, tch::Device::Cpu));
        let angles = positions.outer(&Tensor::from_slice(&frequencies).to_kind(kind));
        let angles = Tensor::cat(&[&angles, &angles], -1);
        Self { cos: angles.cos(), sin: angles.sin() }
    }

    /// x: (b, heads, t, d).
    fn rotate(&self, x: &Tensor) -> Tensor {
        let (num_positions, half) = (x.size()[2], x.size()[3] / 2);
        let (cos, sin) = (self.cos.narrow(0, 0, num_positions), self.sin.narrow(0, 0, num_positions));
        let turned = Tensor::cat(&[&-x.narrow(-1, half, half), &x.narrow(-1, 0, half)], -1);
        (x * cos + turned * sin).to_kind(x.kind())
    }
}

struct Layer {
    input_norm: RmsNorm,
    post_attention_norm: RmsNorm,
    linears: [Projection; 7],
    num_heads: i64,
    num_kv_heads: i64,
}

impl Layer {
    /// x: (b, t, h), the fp32 residual stream. `masks` has one mask per linear.
    fn forward(&self, x: &Tensor, rotary: &Rotary, kind: Kind, masks: Option<&[Tensor]>) -> Tensor {
        let mask = |linear: usize| masks.map(|masks| &masks[linear]);
        let [q, k, v, o, gate, up, down] = &self.linears;
        let (b, t, h) = (x.size()[0], x.size()[1], x.size()[2]);

        let normed = self.input_norm.forward(x).to_kind(kind);
        let heads = |y: Tensor, num_heads: i64| y.view([b, t, num_heads, h / self.num_heads]).transpose(1, 2);
        let q = rotary.rotate(&heads(q.forward(&normed, mask(0)), self.num_heads)); // (b, n, t, d)
        let k = rotary.rotate(&heads(k.forward(&normed, mask(1)), self.num_kv_heads)); // (b, g, t, d)
        let v = heads(v.forward(&normed, mask(2)), self.num_kv_heads); // (b, g, t, d)
        let is_grouped = self.num_kv_heads != self.num_heads;
        let mixed = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None, is_grouped);
        let mixed = mixed.transpose(1, 2).reshape([b, t, h]);
        let x = x + o.forward(&mixed, mask(3));

        let normed = self.post_attention_norm.forward(&x).to_kind(kind);
        let gated = gate.forward(&normed, mask(4)).silu() * up.forward(&normed, mask(5)); // (b, t, f)
        x + down.forward(&gated, mask(6))
    }
}

/// The model over a set of weights, whose values it shares.
pub struct Oracle {
    embed_tokens: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Tensor,
    rotary: Rotary,
    product_kind: Kind,
    dropout: f64,
    /// Everything that is trained, by name.
    leaves: BTreeMap<String, Tensor>,
}

impl Oracle {
    pub fn new(spec: &ModelSpec, weights: &Weights, product_kind: Kind, dropout: f64) -> Self {
        let leaves: BTreeMap<_, _> = weights
            .groups()
            .flat_map(|group| group.names().zip(&group.leaves))
            .map(|(name, value)| (name.to_owned(), value.detach().set_requires_grad(true)))
            .collect();
        let find = |name: &str| leaves.get(name).map(Tensor::shallow_clone).or_else(|| weights.master(name));
        let tensor = |name: &str| find(name).unwrap_or_else(|| panic!("the model has no parameter {name}"));
        let norm = |name: String| RmsNorm { weight: tensor(&name), eps: spec.rms_norm_eps };
        let branch = |path: &str| {
            Some(Branch {
                a: find(&format!("{path}.lora_A.weight"))?,
                b: find(&format!("{path}.lora_B.weight"))?,
                scale: weights.low_rank.as_ref()?.scale,
            })
        };
        let linear = |path: &str| Projection { weight: find(&format!("{path}.weight")), branch: branch(path) };
        let layers = (0..spec.num_hidden_layers).map(|layer| Layer {
            input_norm: norm(format!("model.layers.{layer}.input_layernorm.weight")),
            post_attention_norm: norm(format!("model.layers.{layer}.post_attention_layernorm.weight")),
            linears: Linear::ALL.map(|kind| linear(&linear_path(layer, kind))),
            num_heads: spec.num_attention_heads,
            num_kv_heads: spec.num_key_value_heads,
        });
        Self {
            embed_tokens: tensor(EMBEDDING),
            layers: layers.collect(),
            norm: norm("model.norm.weight".into()),
            lm_head: tensor(if spec.tie_word_embeddings { EMBEDDING } else { HEAD }),
            rotary: Rotary::new(spec, sum_kind(product_kind)),
            product_kind,
            dropout,
            leaves,
        }
    }

    /// Logits (b, t, v) for tokens (b, t). Dropout is on where its place is given.
    pub fn logits(&self, tokens: &Tensor, place: Option<DropoutPlace>) -> Tensor {
        let mut x = Tensor::embedding(&self.embed_tokens, tokens, -1, false, false); // (b, t, h)
        for (index, layer) in self.layers.iter().enumerate() {
            let place = place.filter(|_| self.dropout > 0.0);
            let masks = place.map(|place| self.dropout_masks(layer, index as i64, tokens, place));
            x = layer.forward(&x, &self.rotary, self.product_kind, masks.as_deref());
        }
        let normed = self.norm.forward(&x).to_kind(self.product_kind);
        normed.linear(&self.lm_head.to_kind(self.product_kind), None::<Tensor>).to_kind(sum_kind(self.product_kind))
    }

    /// The summed cross-entropy of rows (b, t + 1), and the gradients of `scale` times it by name.
    pub fn loss_and_gradients(
        &self,
        rows: &Tensor,
        scale: f64,
        place: DropoutPlace,
    ) -> (f64, BTreeMap<String, Tensor>) {
        let num_targets = rows.size()[1] - 1;
        let logits = self.logits(&rows.narrow(1, 0, num_targets), Some(place));
        let targets = rows.narrow(1, 1, num_targets).reshape([-1]);
        let logits = logits.view([-1, logits.size()[2]]);
        let loss = logits.cross_entropy_loss(&targets, None::<Tensor>, Reduction::Sum, -100, 0.0);
        let leaves: Vec<_> = self.leaves.values().collect();
        let gradients = Tensor::run_backward(&[&loss * scale], &leaves, false, false);
        (loss.double_value(&[]), self.leaves.keys().cloned().zip(gradients).collect())
    }

    /// One mask per linear of the layer, scaled so that means stay: those that the engine draws.
    fn dropout_masks(&self, layer: &Layer, index: i64, tokens: &Tensor, place: DropoutPlace) -> Vec<Tensor> {
        let (b, t) = tokens.size2().expect("rows of tokens");
        let kernels = Kernels::new(self.product_kind, 1);
        let mask = |(linear, projection): (usize, &Projection)| {
            let width = projection.branch.as_ref().map_or(1, |branch| branch.a.size()[1]);
            let ones = Tensor::ones([b * t, width], (self.product_kind, tch::Device::Cpu));
            let mask = ones.empty_like();
            let matrix = 7 * index + linear as i64;
            let DropoutPlace { seed, first_seq } = place;
            let place = MaskPlace { seed, first_seq, matrix, sequence_length: t };
            kernels.dropout((&ones, width), 1.0 - self.dropout, place, false, &mask);
            mask.view([b, t, width])
        };
        layer.linears.iter().enumerate().map(mask).collect()
    }
}
