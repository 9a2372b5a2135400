//! Matrices that share an input, multiplied as one: x ↦ x Wᵀ, where the rows of W are those of one matrix after the
//! other, each trained, or frozen with low-rank factors, or the product of its factors alone.
//!
//! Without dropout the factors are added to their matrix, W + sBA, and the product is that of one matrix; the gradients
//! of A and B come from products with r columns and never from that of W (RunLoRA, arXiv 2312.03415). With dropout the
//! factors' branch sees another input and is computed beside.
//!
//! In shapes: n tokens, i inputs, o outputs of one matrix, O of all together, r rank, R of all together.

use tch::{Kind, Tensor};

use super::{
    quantised::Quantised,
    shared::{Shared, add_product, copy, multiply},
};
use crate::{
    domain::spec::{FrozenWeights, MergedPlan},
    train::{
        native::kernels::MaskPlace,
        weights::{Factors, Matrix, Place},
    },
};

/// One matrix among those of a projection.
struct Member {
    /// Where its rows begin among the padded rows of all, and how many they are without and with padding.
    start: i64,
    rows: i64,
    padded_rows: i64,
    columns: i64,
    base: Base,
    factors: Option<MemberFactors>,
    /// Its number among all of the model, which its dropout masks depend on.
    number: i64,
}

enum Base {
    Trained(Place),
    Frozen {
        master: Tensor,
        quantised: Option<Quantised>,
    },
    /// The factors stand in its place.
    Absent,
}

struct MemberFactors {
    factors: Factors,
    /// Where its rows begin among those of all A.
    start: i64,
    rank: i64,
    /// B in the kind of products (o, r).
    b: Tensor,
}

pub struct Projection {
    members: Vec<Member>,
    /// Padded.
    pub inputs: i64,
    pub outputs: i64,
    /// Rows of the weight: all outputs, but for the padding of a matrix that is alone, which lies between the rows of
    /// what it is multiplied to and costs no copy of it.
    weight_rows: i64,
    /// What forward multiplies with (O, i): the parameters themselves, or a copy that follows them. None where it is
    /// made anew for every product.
    weight: Option<Tensor>,
    is_alias: bool,
    /// All A, one below the other, in the kind of products (R, i).
    a: Option<Tensor>,
}

/// The sizes of matrices with padding: products are quicker where rows begin at round addresses.
#[derive(Debug, Clone, Copy)]
pub struct Padded {
    /// Of each matrix; as it is if None.
    pub rows: Option<i64>,
    pub inputs: i64,
}

impl Member {
    /// Whether it is kept in few bits: the matrices that the factors update are.
    fn is_quantised(&self, shared: &Shared) -> bool {
        let is_frozen = matches!(self.base, Base::Frozen { .. }) && self.factors.is_some();
        is_frozen && shared.frozen_weights != FrozenWeights::Full
    }
}

impl Projection {
    /// Of matrices with the same number of inputs, numbered from `number` on. Nothing is computed before `refresh`.
    pub fn new(matrices: Vec<Matrix>, number: i64, padded: Padded, shared: &Shared) -> Self {
        let inputs = padded.inputs;
        let (mut outputs, mut ranks) = (0, 0);
        let members: Vec<_> = matrices
            .into_iter()
            .zip(number..)
            .map(|(matrix, number)| {
                let (start, padded_rows) = (outputs, padded.rows.unwrap_or(matrix.rows));
                outputs += padded_rows;
                let factors = matrix.factors.map(|factors| {
                    let rank = factors.a.value.size()[0];
                    let start = ranks;
                    ranks += rank;
                    let b = in_kind(&factors.b.value, shared.product_kind);
                    MemberFactors { factors, start, rank, b }
                });
                let base = match (matrix.place, matrix.master) {
                    (Some(place), _) => Base::Trained(place),
                    (None, Some(master)) => Base::Frozen { master, quantised: None },
                    (None, None) => Base::Absent,
                };
                Member { start, rows: matrix.rows, padded_rows, columns: matrix.columns, base, factors, number }
            })
            .collect();
        let mut projection = Self { members, inputs, outputs, weight_rows: 0, weight: None, is_alias: false, a: None };
        projection.weight_rows = match projection.members.as_slice() {
            [alone] => alone.rows,
            _ => outputs,
        };
        if ranks > 0 {
            projection.a = Some(Tensor::zeros([ranks, inputs], shared.products()));
        }
        projection.weight = projection.alias(shared);
        projection.is_alias = projection.weight.is_some();
        let is_quantised = projection.members.iter().any(|member| member.is_quantised(shared));
        if projection.has_dense() && !projection.is_alias && shared.plan == MergedPlan::Resident && !is_quantised {
            projection.weight = Some(Tensor::zeros([projection.weight_rows, inputs], shared.products()));
        }
        projection
    }

    /// Whether the factors are added to their matrices.
    fn merges(shared: &Shared) -> bool {
        shared.dropout == 0.0
    }

    /// Whether there is a product of all inputs with all outputs: not where the factors are all there is.
    fn has_dense(&self) -> bool {
        self.members.iter().any(|member| !matches!(member.base, Base::Absent))
    }

    /// Rows without padding.
    fn num_rows(&self) -> i64 {
        self.members.iter().map(|member| member.rows).sum()
    }

    /// The parameters themselves, where they can be multiplied with as they lie.
    fn alias(&self, shared: &Shared) -> Option<Tensor> {
        if self.inputs != self.members[0].columns {
            return None;
        }
        let mut end = None;
        for member in &self.members {
            let matrix = match &member.base {
                Base::Trained(place) => &place.value,
                Base::Frozen { master, .. }
                    if !(member.is_quantised(shared) || member.factors.is_some() && Self::merges(shared)) =>
                {
                    master
                }
                _ => return None,
            };
            let is_next = end.is_none_or(|end| end == matrix.data_ptr());
            let is_padded = member.padded_rows != member.rows && self.members.len() > 1;
            if !is_next || matrix.kind() != shared.product_kind || is_padded {
                return None;
            }
            end = Some(matrix.data_ptr().wrapping_byte_add(matrix.numel() * matrix.kind().elt_size_in_bytes()));
        }
        let first = match &self.members[0].base {
            Base::Trained(place) => &place.value,
            Base::Frozen { master, .. } => master,
            Base::Absent => return None,
        };
        Some(first.as_strided([self.weight_rows, self.inputs], [self.inputs, 1], None))
    }

    /// Brings the copies in step with the parameters, after these have changed.
    pub fn refresh(&mut self, shared: &mut Shared) {
        for member in &mut self.members {
            if let Some(MemberFactors { factors, start, rank, b }) = &member.factors {
                let a = self.a.as_ref().map(|a| a.narrow(0, *start, *rank).narrow(1, 0, member.columns));
                a.into_iter().for_each(|mut a| a.copy_(&factors.a.value));
                if b.data_ptr() != factors.b.value.data_ptr() {
                    b.shallow_clone().copy_(&factors.b.value);
                }
            }
        }
        if let (Some(weight), false) = (&self.weight, self.is_alias) {
            self.write_weight(weight, shared);
        }
    }

    /// Quantises the frozen matrices, after these have changed.
    pub fn refresh_frozen(&mut self, shared: &Shared) {
        for member in self.members.iter_mut().filter(|member| member.is_quantised(shared)) {
            if let Base::Frozen { master, quantised } = &mut member.base {
                *quantised = Quantised::of(master, shared.frozen_weights, shared.device);
            }
        }
    }

    /// The matrix to multiply with.
    fn weight(&self, shared: &mut Shared) -> Tensor {
        if let Some(weight) = &self.weight {
            return weight.shallow_clone();
        }
        let weight = shared.weight.take(&[self.weight_rows, self.inputs]);
        if (self.weight_rows, self.inputs) != (self.num_rows(), self.members[0].columns) {
            let _ = weight.shallow_clone().zero_();
        }
        self.write_weight(&weight, shared);
        weight
    }

    fn write_weight(&self, weight: &Tensor, shared: &mut Shared) {
        let _span = shared.profile.span("weights", "W + sBA");
        for member in &self.members {
            let to = weight.narrow(0, member.start, member.rows).narrow(1, 0, member.columns);
            let merged = member.factors.as_ref().filter(|_| Self::merges(shared));
            match (&member.base, merged) {
                (Base::Trained(place), _) => copy(&place.value, &to),
                (Base::Frozen { master, quantised: None }, None) => copy(master, &to),
                (Base::Absent, None) => {
                    let _ = to.shallow_clone().zero_();
                }
                (Base::Absent, Some(factors)) => {
                    let product = shared.delta.take(&[member.rows, member.columns]);
                    multiply(&factors.b, &self.a_of(factors, member.columns), &product);
                    copy(&product.shallow_clone().g_mul_scalar_(factors.factors.scale), &to);
                }
                (Base::Frozen { master, quantised }, merged) => {
                    let delta = shared.delta.take(&[member.rows, member.columns]);
                    let scale = match merged {
                        Some(factors) => {
                            multiply(&factors.b, &self.a_of(factors, member.columns), &delta);
                            factors.factors.scale
                        }
                        None => {
                            let _ = delta.shallow_clone().zero_();
                            0.0
                        }
                    };
                    // Kernels write whole rows: beside padding the sum goes into delta's place first.
                    let sum = if to.is_contiguous() { to.shallow_clone() } else { delta.shallow_clone() };
                    match quantised {
                        Some(quantised) => quantised.add_scaled(&shared.ops, &delta, scale, &sum),
                        None => shared.ops.add_scaled(master, &delta, scale, &sum),
                    }
                    if !to.is_contiguous() {
                        copy(&sum, &to);
                    }
                }
            }
        }
    }

    /// A of one matrix (r, i), without padding.
    fn a_of(&self, factors: &MemberFactors, columns: i64) -> Tensor {
        let a = self.a.as_ref().expect("matrices with factors have an A");
        a.narrow(0, factors.start, factors.rank).narrow(1, 0, columns)
    }

    /// y (n, O) = x Wᵀ of x (n, i).
    pub fn forward(&self, x: &Tensor, y: &Tensor, place: Option<MaskPlace>, shared: &mut Shared) {
        if self.has_dense() {
            multiply(x, &self.weight(shared).tr(), &y.narrow(1, 0, self.weight_rows));
        } else if self.outputs != self.num_rows() {
            let _ = y.shallow_clone().zero_();
        }
        for (member, factors) in self.branches(shared) {
            let x = Self::masked_input(member, x, place, shared);
            let low = shared.low.take(&[x.size()[0], factors.rank]);
            multiply(&x, &self.a_of(factors, self.inputs).tr(), &low);
            let _ = low.shallow_clone().g_mul_scalar_(factors.factors.scale);
            let y = y.narrow(1, member.start, member.rows);
            let write = if matches!(member.base, Base::Absent) { multiply } else { add_product };
            write(&low, &factors.b.tr(), &y);
        }
    }

    /// From dy (n, O): adds the gradients of the parameters, and sets dx (n, i).
    pub fn backward(&self, x: &Tensor, dy: &Tensor, dx: &Tensor, place: Option<MaskPlace>, shared: &mut Shared) {
        let span = shared.profile.span("backward", "dx = dy W");
        if self.has_dense() {
            multiply(&dy.narrow(1, 0, self.weight_rows), &self.weight(shared), dx);
        } else {
            let _ = dx.shallow_clone().zero_();
        }
        drop(span);
        let _span = shared.profile.span("backward", "gradients of parameters");
        for member in &self.members {
            if let Base::Trained(Place { gradient, .. }) = &member.base {
                let (dy, x) = (dy.narrow(1, member.start, member.rows), x.narrow(1, 0, member.columns));
                shared.add_product(&dy.tr(), &x, gradient);
            }
        }
        if Self::merges(shared) && self.has_dense() {
            self.merged_factors_backward(x, dy, shared);
        } else {
            self.branches_backward(x, dy, dx, place, shared);
        }
    }

    /// With h = s·x Aᵀ and g = s·dy B: dB += dyᵀ h and dA += gᵀ x.
    fn merged_factors_backward(&self, x: &Tensor, dy: &Tensor, shared: &mut Shared) {
        let Some(a) = &self.a else { return };
        let num_tokens = x.size()[0];
        let low = shared.low.take(&[num_tokens, a.size()[0]]);
        multiply(x, &a.tr(), &low);
        for member in &self.members {
            let Some(MemberFactors { factors, start, rank, b }) = &member.factors else { continue };
            let dy = dy.narrow(1, member.start, member.rows);
            let mut low = low.narrow(1, *start, *rank);
            let _ = low.g_mul_scalar_(factors.scale);
            shared.add_product(&dy.tr(), &low, &factors.b.gradient);
            let dlow = shared.dlow.take(&[num_tokens, *rank]);
            multiply(&dy, b, &dlow);
            let _ = dlow.shallow_clone().g_mul_scalar_(factors.scale);
            shared.add_product(&dlow.tr(), &x.narrow(1, 0, member.columns), &factors.a.gradient);
        }
    }

    /// The same where the branch sees an input of its own, and dx has its part from there.
    fn branches_backward(&self, x: &Tensor, dy: &Tensor, dx: &Tensor, place: Option<MaskPlace>, shared: &mut Shared) {
        let num_tokens = x.size()[0];
        for (member, factors) in self.branches(shared) {
            let MemberFactors { factors, rank, b, .. } = factors;
            let a = self.a_of(member.factors.as_ref().expect("a branch has factors"), self.inputs);
            let dy = dy.narrow(1, member.start, member.rows);
            let input = Self::masked_input(member, x, place, shared);
            let low = shared.low.take(&[num_tokens, *rank]);
            multiply(&input, &a.tr(), &low);
            let _ = low.shallow_clone().g_mul_scalar_(factors.scale);
            shared.add_product(&dy.tr(), &low, &factors.b.gradient);
            let dlow = shared.dlow.take(&[num_tokens, *rank]);
            multiply(&dy, b, &dlow);
            let _ = dlow.shallow_clone().g_mul_scalar_(factors.scale);
            shared.add_product(&dlow.tr(), &input.narrow(1, 0, member.columns), &factors.a.gradient);
            match place.filter(|_| shared.dropout > 0.0) {
                Some(place) => {
                    multiply(&dlow, &a, &input);
                    let place = MaskPlace { matrix: member.number, ..place };
                    shared.ops.dropout((&input, member.columns), 1.0 - shared.dropout, place, true, dx);
                }
                None => add_product(&dlow, &a, dx),
            }
        }
    }

    /// The matrices whose factors are computed beside them.
    fn branches<'a>(&'a self, shared: &Shared) -> impl Iterator<Item = (&'a Member, &'a MemberFactors)> + use<'a> {
        let is_merged = Self::merges(shared) && self.has_dense();
        let members = self.members.iter().filter(move |_| !is_merged);
        members.filter_map(|member| Some((member, member.factors.as_ref()?)))
    }

    /// What the branch of a matrix sees: x, or x with some elements dropped out.
    fn masked_input(member: &Member, x: &Tensor, place: Option<MaskPlace>, shared: &mut Shared) -> Tensor {
        match place.filter(|_| shared.dropout > 0.0) {
            Some(place) => {
                let masked = shared.masked.take(&x.size());
                let place = MaskPlace { matrix: member.number, ..place };
                shared.ops.dropout((x, member.columns), 1.0 - shared.dropout, place, false, &masked);
                masked
            }
            None => x.shallow_clone(),
        }
    }
}

/// The tensor itself, or one like it in another kind.
fn in_kind(tensor: &Tensor, kind: Kind) -> Tensor {
    if tensor.kind() == kind { tensor.shallow_clone() } else { tensor.to_kind(kind) }
}
