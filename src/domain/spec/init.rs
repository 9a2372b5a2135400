//! A run that begins with the weights of a stored checkpoint: its model is the checkpoint's.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    DataFacts, ModelSpec, TrainSpecRequest, presets,
    request::{MethodType, ModelRequest},
};
use crate::domain::problem::Problem;

/// What is known of the checkpoint that a spec names.
#[derive(Debug, Clone)]
pub struct InitFacts {
    pub model: ModelSpec,
    /// The SHA-256 of its `tokenizer.json`, if it has one.
    pub tokenizer_sha256: Option<String>,
}

impl TrainSpecRequest {
    /// Takes the model from the checkpoint that the request names, so that it can be normalised. Returns every problem
    /// that the request has with it.
    pub fn begin_with(&mut self, init: &InitFacts, data: Option<&DataFacts>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(kind) = self.method.as_ref().and_then(|method| method.kind)
            && !goes_on_from_weights(kind)
        {
            problems.push(Problem::new(
                "/method/type",
                "trains other matrices than a checkpoint has: choose another method, or leave out init_checkpoint",
            ));
        }
        let given = self.model.take().unwrap_or_default();
        problems.extend(given.problems_beside(&init.model));
        self.model = Some(ModelRequest { preset: given.preset, ..ModelRequest::of(&init.model) });
        if let Some(data) = data.filter(|data| data.vocab_size > init.model.vocab_size) {
            let (needs, has) = (data.vocab_size, init.model.vocab_size);
            let message = format!(
                "{} needs a vocabulary of {needs}, the checkpoint has {has}: tokenize the dataset with the checkpoint's \
                 tokenizer",
                data.tokenization
            );
            problems.push(Problem::new("/tokenization", message));
            // Said above, and not to be said once more of a size that nobody gave.
            self.model = self.model.take().map(|model| ModelRequest { vocab_size: None, ..model });
        }
        let max_length = init.model.max_position_embeddings;
        let sequence_length = self.batch.as_ref().and_then(|batch| batch.sequence_length);
        if let Some(sequence_length) = sequence_length.filter(|&length| length > max_length) {
            let message = format!(
                "{sequence_length} is longer than the checkpoint's sequences, whose max_position_embeddings is {max_length}"
            );
            problems.push(Problem::new("/batch/sequence_length", message));
            self.model = self.model.take().map(|model| ModelRequest { max_position_embeddings: None, ..model });
        }
        problems
    }
}

impl InitFacts {
    /// Tokens of another tokenizer mean something else to the model than those that it was trained on.
    pub fn tokenizer_warning(&self, of_tokens: Option<&str>) -> Option<String> {
        match &self.tokenizer_sha256 {
            None => Some("/tokenization: the checkpoint has no tokenizer, so that nobody can tell whether the tokens are its own".into()),
            Some(own) if of_tokens == Some(own) => None,
            Some(_) => Some(
                "/tokenization: the tokens are those of another tokenizer than the checkpoint's, which has to learn them \
                 anew"
                    .into(),
            ),
        }
    }
}

/// Whether the method trains the model's own matrices, so that it can go on from any weights of them.
fn goes_on_from_weights(kind: MethodType) -> bool {
    match kind {
        MethodType::Full | MethodType::Lora | MethodType::Relora => true,
        MethodType::Control | MethodType::Factorized => false,
    }
}

impl ModelRequest {
    /// The sizes of a model, without its preset.
    fn of(model: &ModelSpec) -> Self {
        Self {
            preset: None,
            vocab_size: Some(model.vocab_size),
            hidden_size: Some(model.hidden_size),
            intermediate_size: Some(model.intermediate_size),
            num_hidden_layers: Some(model.num_hidden_layers),
            num_attention_heads: Some(model.num_attention_heads),
            num_key_value_heads: Some(model.num_key_value_heads),
            max_position_embeddings: Some(model.max_position_embeddings),
            rms_norm_eps: Some(model.rms_norm_eps),
            rope_theta: Some(model.rope_theta),
            initializer_range: Some(model.initializer_range),
            tie_word_embeddings: Some(model.tie_word_embeddings),
        }
    }

    /// What is given here and is not so in the model. A preset stands for the sizes that are not given beside it.
    fn problems_beside(&self, model: &ModelSpec) -> Vec<Problem> {
        let differs =
            |name: &str, has: &Value| format!("differs from the checkpoint, whose {name} is {has}: leave it out");
        let mut problems: Vec<_> = model
            .differences(self)
            .into_iter()
            .map(|(name, has)| Problem::at(&["model", &name], differs(&name, &has)))
            .collect();
        if let Some(preset) = self.preset.as_deref().and_then(presets::find) {
            let of_preset = Self {
                hidden_size: self.hidden_size.is_none().then_some(preset.hidden_size),
                intermediate_size: self.intermediate_size.is_none().then_some(preset.intermediate_size),
                num_hidden_layers: self.num_hidden_layers.is_none().then_some(preset.num_hidden_layers),
                num_attention_heads: self.num_attention_heads.is_none().then_some(preset.num_attention_heads),
                ..Self::default()
            };
            if let Some((name, has)) = model.differences(&of_preset).first() {
                problems.push(Problem::new("/model/preset", differs(name, has)));
            }
        }
        problems
    }
}

impl ModelSpec {
    /// Every value that `other`, a model or a request of one, gives and that is another one here: its name, and what it
    /// is here. The name of a preset counts for nothing.
    pub fn differences(&self, other: &impl Serialize) -> Vec<(String, Value)> {
        let fields = |model: Value| match model {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        let (own, other) = (fields(json!(self)), fields(json!(other)));
        let differs = |name: &str, has: &Value| match other.get(name) {
            None | Some(Value::Null) => false,
            Some(given) => name != "preset" && !is_same(given, has),
        };
        own.into_iter().filter(|(name, has)| differs(name, has)).collect()
    }
}

/// A number that went through another writer of JSON may have changed in its last bit.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * a.abs(),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{
        ids::{DatasetId, TokenizationId},
        spec::TrainSpec,
    };

    fn init() -> InitFacts {
        let model = json!({
            "preset": null, "vocab_size": 320, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "rope_theta": 5e5, "initializer_range": 0.02, "tie_word_embeddings": true
        });
        InitFacts { model: serde_json::from_value(model).unwrap(), tokenizer_sha256: Some("a".into()) }
    }

    fn data(vocab_size: i64) -> DataFacts {
        DataFacts {
            dataset: DatasetId::from("ds_1".to_owned()),
            tokenization: TokenizationId::from("tz_1".to_owned()),
            vocab_size,
            max_train_tokens: 100_000,
            max_valid_tokens: 5_000,
        }
    }

    fn begin(model: Value, vocab_size: i64) -> Result<TrainSpec, Vec<String>> {
        begin_method(json!({"type": "relora", "rank": 8, "restart_every_steps": 50}), model, vocab_size)
    }

    fn begin_method(method: Value, model: Value, vocab_size: i64) -> Result<TrainSpec, Vec<String>> {
        let (mut request, problems) = TrainSpecRequest::parse(json!({
            "dataset": "ds_1", "init_checkpoint": "node_1", "model": model, "method": method,
            "schedule": {"num_steps": 100}, "batch": {"num_seqs": 4, "sequence_length": 128}
        }));
        assert_eq!(problems, []);
        let pointers = |problems: Vec<Problem>| problems.into_iter().map(|p| p.pointer).collect::<Vec<_>>();
        let mut problems = pointers(request.begin_with(&init(), Some(&data(vocab_size))));
        match request.normalise(Some(&data(vocab_size))) {
            Ok((spec, _)) if problems.is_empty() => return Ok(spec),
            Ok(_) => {}
            Err(more) => problems.extend(pointers(more)),
        }
        problems.sort();
        Err(problems)
    }

    #[test]
    fn the_model_is_the_checkpoints() {
        let spec = begin(Value::Null, 300).unwrap();
        assert_eq!(spec.model, init().model);
        assert_eq!(spec.init_checkpoint, Some("node_1".to_owned().into()));
        assert_eq!(begin(json!(spec.model), 320).unwrap().model, spec.model, "a normalised spec can be sent again");
    }

    #[test]
    fn sizes_beside_it_must_be_its_own() {
        assert!(begin(json!({"hidden_size": 128, "rope_theta": 500_000}), 300).is_ok());
        let other = json!({"hidden_size": 64, "tie_word_embeddings": false, "rms_norm_eps": 1e-6});
        assert_eq!(
            begin(other, 300).unwrap_err(),
            ["/model/hidden_size", "/model/rms_norm_eps", "/model/tie_word_embeddings"]
        );
        assert_eq!(begin(json!({"preset": "llama-9m"}), 300).unwrap().model.preset.as_deref(), Some("llama-9m"));
        assert_eq!(begin(json!({"preset": "llama-20m"}), 300).unwrap_err(), ["/model/preset"]);
        assert_eq!(begin(json!({"preset": "llama-9000m"}), 300).unwrap_err(), ["/model/preset"]);
    }

    #[test]
    fn methods_that_train_other_matrices_are_refused() {
        for method in [json!({"type": "full"}), json!({"type": "lora", "rank": 8})] {
            assert!(begin_method(method, Value::Null, 300).is_ok_and(|spec| spec.init_checkpoint.is_some()));
        }
        for kind in ["control", "factorized"] {
            let method = json!({"type": kind, "rank": 8});
            assert_eq!(begin_method(method, Value::Null, 300).unwrap_err(), ["/method/type"], "{kind}");
        }
    }

    #[test]
    fn tokens_beyond_its_vocabulary_are_refused_once() {
        assert_eq!(begin(Value::Null, 321).unwrap_err(), ["/tokenization"]);
    }

    #[test]
    fn sequences_beyond_its_positions_are_refused_where_they_are_given() {
        let init = InitFacts { model: ModelSpec { max_position_embeddings: 127, ..init().model }, ..init() };
        let (mut request, _) = TrainSpecRequest::parse(json!({
            "dataset": "ds_1", "init_checkpoint": "node_1", "method": {"type": "full"},
            "schedule": {"num_steps": 100}, "batch": {"num_seqs": 4, "sequence_length": 128}
        }));
        let problems = request.begin_with(&init, Some(&data(300)));
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].pointer, "/batch/sequence_length");
        assert!(request.normalise(Some(&data(300))).is_ok(), "said once");
    }

    #[test]
    fn another_tokenizer_is_a_warning() {
        assert_eq!(init().tokenizer_warning(Some("a")), None);
        assert!(init().tokenizer_warning(Some("b")).is_some_and(|warning| warning.contains("another tokenizer")));
        assert!(init().tokenizer_warning(None).is_some());
        let without = InitFacts { tokenizer_sha256: None, ..init() };
        assert!(without.tokenizer_warning(Some("b")).is_some_and(|warning| warning.contains("no tokenizer")));
    }
}
