//! Model sizes of the ReLoRA paper (Lialin et al. 2023, table 1) and of its code.

/// A named model size.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    pub name: &'static str,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_attention_heads: i64,
    pub num_hidden_layers: i64,
}

const fn preset(name: &'static str, hidden_size: i64, intermediate_size: i64, heads: i64, layers: i64) -> Preset {
    Preset { name, hidden_size, intermediate_size, num_attention_heads: heads, num_hidden_layers: layers }
}

#[rustfmt::skip]
pub const PRESETS: [Preset; 13] = [
    preset("llama-9m",    128,   352,  4,  4),
    preset("llama-20m",   256,   688,  4,  4),
    preset("llama-35m",   384,  1024,  8,  6),
    preset("llama-40m",   416,  1024,  8,  8),
    preset("llama-60m",   512,  1376,  8,  8),
    preset("llama-71m",   512,  1368,  8, 12),
    preset("llama-100m",  640,  1708, 10, 12),
    preset("llama-130m",  768,  2048, 12, 12),
    preset("llama-250m",  768,  2560, 16, 24),
    preset("llama-350m", 1024,  2736, 16, 24),
    preset("llama-1b",   2048,  5461, 32, 24),
    preset("llama-3b",   2560,  6848, 32, 32),
    preset("llama-7b",   4096, 11008, 32, 32),
];

pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}
