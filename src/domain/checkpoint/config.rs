//! `config.json` of `transformers`: the model that it describes, if that is one which is computed here exactly.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

use super::files::{CONFIG_FILE, GENERATION_CONFIG_FILE, SPECIAL_TOKENS_FILE};
use crate::domain::{
    data::TOKENIZER_CONFIG_FILE,
    json,
    problem::Problem,
    spec::{
        ModelSpec,
        check::{Bounds, Check},
    },
};

/// What a configuration may say that bears on the function. Everything else is left alone.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    model_type: Option<String>,
    vocab_size: Option<i64>,
    hidden_size: Option<i64>,
    intermediate_size: Option<i64>,
    num_hidden_layers: Option<i64>,
    num_attention_heads: Option<i64>,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    max_position_embeddings: Option<i64>,
    rms_norm_eps: Option<f64>,
    initializer_range: Option<f64>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    pretraining_tp: Option<i64>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Where `transformers` 5 keeps both of the above.
    rope_parameters: Option<Rope>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Rope {
    rope_type: Option<String>,
    /// Its older name.
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// The model of a configuration, or everything that keeps it from being one that is computed here; pointers begin at
/// the configuration.
pub fn model_of_config(config: Value) -> Result<ModelSpec, Vec<Problem>> {
    match read_config(config) {
        (Some(model), problems) if problems.is_empty() => Ok(model),
        (_, problems) => Err(problems),
    }
}

/// The sizes that a configuration gives, if they make a model, and everything that is wrong with it: a model that is
/// computed in another way still has tensors that can be checked. What it leaves out has the default that
/// `transformers` gives it.
pub fn read_config(config: Value) -> (Option<ModelSpec>, Vec<Problem>) {
    let (config, problems) = json::parse::<Config>(config);
    let mut check = Check { problems };
    let model = config.model(&mut check);
    let model = check.problems.is_empty().then_some(model);
    config.refuse_other_functions(&mut check);
    // What was taken out as unreadable is not missing as well.
    let mut seen = BTreeSet::new();
    check.problems.retain(|problem| seen.insert(problem.pointer.clone()));
    (model, check.problems)
}

impl Config {
    /// Whatever is computed in another way than here.
    fn refuse_other_functions(&self, check: &mut Check) {
        if self.model_type.as_deref() != Some("llama") {
            let found = self.model_type.as_deref().unwrap_or("missing");
            check.problem("/model_type", format!("is {found}; only llama is computed here"));
        }
        if let Some(other) = self.hidden_act.as_deref().filter(|act| !["silu", "swish"].contains(act)) {
            check.problem("/hidden_act", format!("is {other}; only silu is computed here"));
        }
        for (pointer, bias) in [("/attention_bias", self.attention_bias), ("/mlp_bias", self.mlp_bias)] {
            if bias == Some(true) {
                check.problem(pointer, "is true; only models without biases are computed here");
            }
        }
        if let Some(parts) = self.pretraining_tp.filter(|&parts| parts != 1) {
            check.problem("/pretraining_tp", format!("is {parts}; only products in one part are computed here, 1"));
        }
        if self.quantization_config.is_some() {
            check.problem("/quantization_config", "is given; only weights that are not quantized are taken");
        }
        for (pointer, rope) in [("/rope_scaling", &self.rope_scaling), ("/rope_parameters", &self.rope_parameters)] {
            rope.iter().for_each(|rope| rope.refuse_scaling(check, pointer));
        }
        refuse_partial_rotation(check, "", self.partial_rotary_factor);
        if let (Some(scaling), Some(parameters)) = (&self.rope_scaling, &self.rope_parameters)
            && scaling.contradicts(parameters)
        {
            check.problem("/rope_scaling", "has another type or rope_theta than rope_parameters: leave one out");
            check.problem("/rope_parameters", "has another type or rope_theta than rope_scaling: leave one out");
        }
    }

    fn model(&self, check: &mut Check) -> ModelSpec {
        let hidden_size = check.required("/hidden_size", self.hidden_size, 1, 65_536);
        let num_attention_heads = check.required("/num_attention_heads", self.num_attention_heads, 1, 1_024);
        let num_key_value_heads = self.num_key_value_heads.unwrap_or(num_attention_heads);
        let num_key_value_heads = check.integer("/num_key_value_heads", num_key_value_heads, 1, 1_024);
        let model = ModelSpec {
            preset: None,
            vocab_size: check.required("/vocab_size", self.vocab_size, 1, 1 << 20),
            hidden_size,
            intermediate_size: check.required("/intermediate_size", self.intermediate_size, 1, 262_144),
            num_hidden_layers: check.required("/num_hidden_layers", self.num_hidden_layers, 1, 512),
            num_attention_heads,
            num_key_value_heads,
            max_position_embeddings: check.integer(
                "/max_position_embeddings",
                self.max_position_embeddings.unwrap_or(2_048),
                1,
                1 << 20,
            ),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self.rope_theta(check),
            initializer_range: self.initializer_range.unwrap_or(0.02),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        };
        check.number("/rms_norm_eps", model.rms_norm_eps, Bounds::OpenClosed(0.0, 1.0));
        check.number("/rope_theta", model.rope_theta, Bounds::Closed(1.0, 1e9));
        check.number("/initializer_range", model.initializer_range, Bounds::OpenClosed(0.0, 1.0));
        self.check_heads(check, &model);
        model
    }

    fn check_heads(&self, check: &mut Check, model: &ModelSpec) {
        if self.hidden_size.is_none() || self.num_attention_heads.is_none() {
            return;
        }
        let (hidden, heads, kv_heads) = (model.hidden_size, model.num_attention_heads, model.num_key_value_heads);
        if hidden % heads != 0 || hidden / heads % 2 != 0 {
            let message =
                format!("{heads} must divide hidden_size, {hidden}, into heads of an even number of elements");
            check.problem("/num_attention_heads", message);
        }
        if heads % kv_heads != 0 {
            check.problem("/num_key_value_heads", format!("{kv_heads} does not divide num_attention_heads, {heads}"));
        }
        if let Some(dim) = self.head_dim.filter(|&dim| dim != model.head_dim()) {
            let message =
                format!("is {dim}; only hidden_size / num_attention_heads, {}, is computed here", model.head_dim());
            check.problem("/head_dim", message);
        }
    }

    fn rope_theta(&self, check: &mut Check) -> f64 {
        let nested = [&self.rope_parameters, &self.rope_scaling].into_iter().flatten().find_map(|rope| rope.rope_theta);
        if let (Some(outer), Some(inner)) = (self.rope_theta, nested)
            && outer != inner
        {
            check.problem("/rope_theta", format!("is {outer}, and {inner} in rope_parameters: make it one"));
        }
        nested.or(self.rope_theta).unwrap_or(10_000.0)
    }
}

impl Rope {
    /// Every type that it gives, by either name.
    fn kinds(&self) -> impl Iterator<Item = &str> {
        [&self.rope_type, &self.kind].into_iter().flatten().map(String::as_str)
    }

    fn refuse_scaling(&self, check: &mut Check, pointer: &str) {
        if let Some(kind) = self.kinds().find(|&kind| kind != "default") {
            let message = format!("is of the type {kind}; only unscaled rotary embeddings are computed here");
            check.problem(pointer, message);
        } else if self.kinds().next().is_none() && self.factor.is_some() {
            check.problem(pointer, "has a factor and no type");
        }
        refuse_partial_rotation(check, pointer, self.partial_rotary_factor);
    }

    fn contradicts(&self, other: &Self) -> bool {
        let kind = |rope: &Self| rope.kinds().next().unwrap_or("default").to_owned();
        let have_other_thetas = matches!((self.rope_theta, other.rope_theta), (Some(a), Some(b)) if a != b);
        kind(self) != kind(other) || have_other_thetas
    }
}

fn refuse_partial_rotation(check: &mut Check, parent: &str, factor: Option<f64>) {
    if let Some(frac) = factor.filter(|&frac| frac != 1.0) {
        let message = format!("is {frac}; only heads that are rotated as a whole are computed here, 1");
        check.problem(format!("{parent}/partial_rotary_factor"), message);
    }
}

/// The token that ends a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndOfText {
    Id(i64),
    Token(String),
}

/// Where [`end_of_text`] looks.
pub const END_OF_TEXT_FILES: [&str; 4] =
    [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, GENERATION_CONFIG_FILE, CONFIG_FILE];

/// Finds the end-of-text token of a checkpoint. The tokenizer's own word comes first: a model's configuration has an
/// id by default, whatever its tokenizer. `read` gives a file's content if the checkpoint has the file.
pub fn end_of_text(read: impl Fn(&str) -> Option<Value>) -> Option<EndOfText> {
    let token = |file: &str| match &read(file)?["eos_token"] {
        Value::String(token) => Some(EndOfText::Token(token.clone())),
        added => Some(EndOfText::Token(added["content"].as_str()?.to_owned())),
    };
    let id = |file: &str| match &read(file)?["eos_token_id"] {
        // Of several the first is the one that training used; the others end a turn of a chat.
        Value::Array(ids) => Some(EndOfText::Id(ids.first()?.as_i64()?)),
        id => Some(EndOfText::Id(id.as_i64()?)),
    };
    let tokens = [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE].into_iter().find_map(token);
    tokens.or_else(|| [GENERATION_CONFIG_FILE, CONFIG_FILE].into_iter().find_map(id))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "rope_theta": 5e5
        })
    }

    fn with(changes: Value) -> Value {
        let mut config = good();
        let fields = config.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        config
    }

    fn pointers(config: Value) -> Vec<String> {
        let mut pointers: Vec<_> =
            model_of_config(config).unwrap_err().into_iter().map(|problem| problem.pointer).collect();
        pointers.sort();
        pointers
    }

    #[test]
    fn a_configuration_is_read_with_the_defaults_of_transformers() {
        let model = model_of_config(good()).unwrap();
        assert_eq!((model.vocab_size, model.num_key_value_heads, model.max_position_embeddings), (320, 2, 2_048));
        assert_eq!((model.rms_norm_eps, model.rope_theta, model.initializer_range), (1e-5, 5e5, 0.02));
        assert!(!model.tie_word_embeddings && model.preset.is_none());
    }

    #[test]
    fn rotary_parameters_are_read_from_either_place() {
        let theta = |changes| model_of_config(with(changes)).unwrap().rope_theta;
        let nested = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}});
        assert_eq!(theta(nested), 7e4);
        assert_eq!(theta(json!({"rope_theta": null, "rope_scaling": null})), 1e4);
        assert_eq!(theta(json!({"rope_scaling": {"type": "default"}})), 5e5);
        let both = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}});
        assert_eq!(pointers(with(both)), ["/rope_theta"]);
    }

    #[test]
    fn rotary_parameters_in_both_places_must_say_the_same() {
        let both = |scaling: Value, parameters: Value| {
            with(json!({"rope_theta": null, "rope_scaling": scaling, "rope_parameters": parameters}))
        };
        let theta = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
        assert_eq!(model_of_config(both(theta(7e4), theta(7e4))).unwrap().rope_theta, 7e4);
        assert_eq!(model_of_config(both(json!({"type": "default"}), theta(7e4))).unwrap().rope_theta, 7e4);
        assert_eq!(pointers(both(theta(7e4), theta(8e4))), ["/rope_parameters", "/rope_scaling"]);
        let linear = json!({"type": "linear", "factor": 2.0});
        assert_eq!(pointers(both(linear, theta(7e4))), ["/rope_parameters", "/rope_scaling"]);
        let two_types = json!({"rope_type": "default", "type": "linear"});
        assert_eq!(pointers(with(json!({"rope_scaling": two_types}))), ["/rope_scaling"]);
    }

    #[test]
    fn every_other_function_is_refused_by_name() {
        let config = with(json!({
            "model_type": "mistral", "hidden_act": "gelu", "attention_bias": true, "mlp_bias": true,
            "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"partial_rotary_factor": 0.5},
            "pretraining_tp": 2, "head_dim": 32, "partial_rotary_factor": 0.5, "quantization_config": {"bits": 4}
        }));
        assert_eq!(
            pointers(config),
            [
                "/attention_bias",
                "/head_dim",
                "/hidden_act",
                "/mlp_bias",
                "/model_type",
                "/partial_rotary_factor",
                "/pretraining_tp",
                "/quantization_config",
                "/rope_parameters",
                "/rope_parameters/partial_rotary_factor",
                "/rope_scaling",
            ]
        );
        assert_eq!(pointers(with(json!({"rope_parameters": {"rope_type": "llama3"}}))), ["/rope_parameters"]);
        assert_eq!(pointers(with(json!({"rope_scaling": {"factor": 2.0}}))), ["/rope_scaling"]);
    }

    #[test]
    fn sizes_that_are_missing_of_a_wrong_type_or_do_not_fit_are_named_once() {
        assert_eq!(pointers(with(json!({"num_key_value_heads": 3}))), ["/num_key_value_heads"]);
        assert_eq!(pointers(with(json!({"hidden_size": 66}))), ["/num_attention_heads"]);
        let config = with(json!({"vocab_size": "many", "hidden_size": null}));
        assert_eq!(pointers(config), ["/hidden_size", "/vocab_size"]);
        assert_eq!(pointers(json!([1])).first().map(String::as_str), Some(""));
    }

    #[test]
    fn the_tokenizer_says_first_what_ends_a_text() {
        let find = |files: Value| end_of_text(|name| files.get(name).cloned());
        let token = |text: &str| Some(EndOfText::Token(text.into()));
        let all = json!({
            "tokenizer_config.json": {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": "<e>"},
            "generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 2}
        });
        assert_eq!(find(all), token("</s>"));
        assert_eq!(
            find(json!({"tokenizer_config.json": {"eos_token": {"content": "<e>", "lstrip": false}}})),
            token("<e>")
        );
        assert_eq!(
            find(json!({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<e>"}})),
            token("<e>")
        );
        assert_eq!(find(json!({"config.json": {"eos_token_id": [7, 8]}})), Some(EndOfText::Id(7)));
        assert_eq!(
            find(json!({"config.json": {"eos_token_id": null}, "tokenizer_config.json": {"eos_token": null}})),
            None
        );
    }
}
