"""How many parameters a run trains, from the spec as the server completed it."""


def num_trained_params(spec):
    """Trained in the low-rank phase, or in the whole run where there is none."""
    method, model = spec["method"], dict(spec["model"])
    if method["type"] == "control":
        model |= {key: method[key] for key in ("hidden_size", "intermediate_size")}
    vocab = model["vocab_size"] * model["hidden_size"]
    norms = (2 * model["num_hidden_layers"] + 1) * model["hidden_size"]
    has_factors = method["type"] in ("factorized", "lora", "relora")
    trains_embeddings = not has_factors or method.get("train_embeddings", True)
    trains_head = not has_factors or method.get("train_head", True)
    if model["tie_word_embeddings"]:
        num_vocab_matrices = int(trains_embeddings)
    else:
        num_vocab_matrices = trains_embeddings + trains_head

    shapes = linear_shapes(model)
    targets = method.get("target_modules", list(shapes)) if has_factors else []
    per_layer = sum(
        method["rank"] * (rows + columns) if kind in targets else rows * columns
        for kind, (rows, columns) in shapes.items()
    )
    return num_vocab_matrices * vocab + norms + model["num_hidden_layers"] * per_layer


def linear_shapes(model):
    """(out, in) of the seven matrices of a layer."""
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    key_value = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    return {
        "q_proj": (hidden, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
