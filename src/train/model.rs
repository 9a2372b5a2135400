//! The LLaMA family, in the order in which its parts depend on each other. Parameter names equal those of
//! `transformers` checkpoints.
//!
//! In shapes: b sequences, t positions, h hidden, n query heads, g key and value heads, d elements of a head,
//! f intermediate, v vocabulary, r rank. Matrix products run in the model's kind; norms, rotations, the residual stream
//! and the loss in fp32.

use tch::{Device, Kind, Reduction, Tensor};

use super::{
    random::{Draws, Purpose},
    weights::{Parameter, Weights},
};
pub use crate::domain::checkpoint::{EMBEDDING, HEAD, linear_path};
use crate::domain::{
    checkpoint::{TensorShape, tensors},
    spec::{Linear, ModelSpec, Precision, TrainSpec},
};

/// Every parameter of the model, without LoRA factors, in the order in which initial weights are drawn.
pub fn parameters(spec: &ModelSpec) -> Vec<Parameter> {
    // Weight decay acts on matrices, and on no embedding.
    let decays = |tensor: &TensorShape| tensor.shape.len() > 1 && tensor.name != EMBEDDING;
    let parameter = |tensor: TensorShape| Parameter { decays: decays(&tensor), name: tensor.name, shape: tensor.shape };
    tensors(spec).into_iter().map(parameter).collect()
}

/// What dropout masks depend on: the place of a micro-batch in the whole run's sequence of training rows.
#[derive(Debug, Clone, Copy)]
pub struct DropoutPlace {
    pub seed: i64,
    pub first_seq: i64,
}

struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        let mean_square = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
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

    /// Columns of the dropout mask.
    fn mask_width(&self) -> i64 {
        self.branch.as_ref().map_or(0, |branch| branch.a.size()[1])
    }
}

/// Rotary position embedding in the half-split form: element i is rotated together with element i + d/2.
struct Rotary {
    cos: Tensor, // (t, d)
    sin: Tensor, // (t, d)
}

impl Rotary {
    fn new(spec: &ModelSpec, device: Device) -> Self {
        let dim = spec.head_dim();
        let frequencies: Vec<_> =
            (0..dim / 2).map(|i| spec.rope_theta.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
        let positions = Tensor::arange(spec.max_position_embeddings, (Kind::Float, device));
        let angles = positions.outer(&Tensor::from_slice(&frequencies).to_device(device));
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

/// The model over a set of weights. It shares their storage, so it follows every update in place.
pub struct Llama {
    embed_tokens: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Projection,
    rotary: Rotary,
    kind: Kind,
    dropout: f64,
}

impl Llama {
    /// The model of a run.
    pub fn of(spec: &TrainSpec, weights: &Weights) -> Self {
        let dropout = spec.method.factors().map_or(0.0, |factors| factors.dropout);
        Self { dropout, ..Self::new(&spec.model, weights, spec.precision) }
    }

    /// A model without dropout.
    ///
    /// # Panics
    /// If a tensor is missing: weights are made from the same spec.
    pub fn new(spec: &ModelSpec, weights: &Weights, precision: Precision) -> Self {
        let tensor = |name: &str| weights.find(name).unwrap_or_else(|| panic!("the model has no parameter {name}"));
        let norm = |name: String| RmsNorm { weight: tensor(&name), eps: spec.rms_norm_eps };
        let branch = |path: &str| {
            Some(Branch {
                a: weights.find(&format!("{path}.lora_A.weight"))?,
                b: weights.find(&format!("{path}.lora_B.weight"))?,
                scale: weights.low_rank.as_ref()?.scale,
            })
        };
        let linear = |path: &str| Projection { weight: weights.find(&format!("{path}.weight")), branch: branch(path) };
        let layers = (0..spec.num_hidden_layers).map(|layer| Layer {
            input_norm: norm(format!("model.layers.{layer}.input_layernorm.weight")),
            post_attention_norm: norm(format!("model.layers.{layer}.post_attention_layernorm.weight")),
            linears: Linear::ALL.map(|kind| linear(&linear_path(layer, kind))),
            num_heads: spec.num_attention_heads,
            num_kv_heads: spec.num_key_value_heads,
        });
        let head = if spec.tie_word_embeddings { EMBEDDING } else { HEAD };
        Self {
            embed_tokens: tensor(EMBEDDING),
            layers: layers.collect(),
            norm: norm("model.norm.weight".into()),
            lm_head: Projection { weight: Some(tensor(head)), branch: None },
            rotary: Rotary::new(spec, weights.full_rank.values.device()),
            kind: match precision {
                Precision::Fp32 => Kind::Float,
                Precision::Bf16 => Kind::BFloat16,
            },
            dropout: 0.0,
        }
    }

    /// Logits (b, t, v) in fp32 for tokens (b, t). Dropout is on where its place is given.
    pub fn forward(&self, tokens: &Tensor, place: Option<DropoutPlace>) -> Tensor {
        let mut x = Tensor::embedding(&self.embed_tokens, tokens, -1, false, false); // (b, t, h)
        for (index, layer) in self.layers.iter().enumerate() {
            let masks = place
                .filter(|_| self.dropout > 0.0 && layer.linears.iter().any(|linear| linear.branch.is_some()))
                .map(|place| self.dropout_masks(layer, index as i64, &x, place));
            x = layer.forward(&x, &self.rotary, self.kind, masks.as_deref());
        }
        self.lm_head.forward(&self.norm.forward(&x).to_kind(self.kind), None).to_kind(Kind::Float)
    }

    /// The summed cross-entropy of rows (b, t + 1): each gives t targets.
    pub fn summed_loss(&self, rows: &Tensor, place: Option<DropoutPlace>) -> Tensor {
        let num_targets = rows.size()[1] - 1;
        let logits = self.forward(&rows.narrow(1, 0, num_targets), place);
        let targets = rows.narrow(1, 1, num_targets).reshape([-1]);
        let logits = logits.view([-1, logits.size()[2]]);
        logits.cross_entropy_loss(&targets, None::<Tensor>, Reduction::Sum, -100, 0.0)
    }

    /// One mask per linear of the layer, scaled so that means stay; of no width where there is no branch. Each sequence's masks are drawn on their own, from
    /// libtorch's generator under a seed of that sequence and layer: micro-batches do not matter.
    fn dropout_masks(&self, layer: &Layer, layer_index: i64, x: &Tensor, place: DropoutPlace) -> Vec<Tensor> {
        let (b, t) = (x.size()[0], x.size()[1]);
        let widths = layer.linears.each_ref().map(Projection::mask_width);
        let keep = 1.0 - self.dropout;
        let masks: Vec<_> = (0..b)
            .map(|row| {
                let draws = Draws::new(place.seed, Purpose::Dropout, [place.first_seq + row, layer_index]);
                let [low, high, ..] = draws.block(0);
                tch::manual_seed((i64::from(high) << 31) ^ i64::from(low));
                Tensor::empty([t, widths.iter().sum()], (Kind::Float, x.device())).bernoulli_float_(keep)
            })
            .collect();
        let masks = (Tensor::stack(&masks, 0) / keep).to_kind(self.kind); // (b, t, sum of widths)
        masks.split_with_sizes(widths, -1)
    }
}
