//! The types in which a model is written to a GGUF file: which tensor has which, as llama.cpp chooses them
//! (`llama_tensor_get_type` in `llama-quant.cpp`).

use std::str::FromStr;

use candle_core::quantized::GgmlDType;

/// How the matrices of a model are stored in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 4 bits, one scale per 32 values.
    Q4_0,
    /// 4 bits, one scale and one minimum per 32 values.
    Q4_1,
    /// 5 bits, one scale per 32 values.
    Q5_0,
    /// 5 bits, one scale and one minimum per 32 values.
    Q5_1,
    /// 8 bits, one scale per 32 values.
    Q8_0,
    /// Q4_K, and Q6_K for the matrices that need more.
    Q4KM,
    /// Q5_K, and Q6_K for the matrices that need more.
    Q5KM,
    /// Q6_K.
    Q6K,
}

impl Quantization {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4KM, Self::Q5KM, Self::Q6K];

    /// Its name: that of llama.cpp in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_k_m",
            Self::Q5KM => "q5_k_m",
            Self::Q6K => "q6_k",
        }
    }

    /// The value of `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
        }
    }

    /// The type of most matrices.
    fn default_type(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4KM => GgmlDType::Q4K,
            Self::Q5KM => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// The type of a matrix of `columns` columns, of which `name` is the name in Hugging Face. `layers` is the number of
    /// layers; `is_output` says whether the matrix is the output projection, be it tied to the embedding.
    ///
    /// # Errors
    /// Columns that are no multiple of 32.
    pub fn type_of(
        self,
        name: &str,
        columns: usize,
        layers: usize,
        is_output: bool,
    ) -> Result<GgmlDType, String> {
        let mixes = matches!(self, Self::Q4KM | Self::Q5KM);
        let needs_more = || {
            let needed = name.ends_with("self_attn.v_proj.weight") || name.ends_with("mlp.down_proj.weight");
            let layer =
                name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            needed && layer.is_some_and(|layer| uses_more_bits(layer, layers))
        };
        let dtype = match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            _ if is_output || mixes && needs_more() => GgmlDType::Q6K,
            _ => self.default_type(),
        };
        if columns.is_multiple_of(dtype.block_size()) {
            return Ok(dtype);
        }
        // What llama.cpp takes for matrices whose columns are no multiple of 256.
        let dtype = match dtype {
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            other => other,
        };
        match columns.is_multiple_of(dtype.block_size()) {
            true => Ok(dtype),
            false => Err(format!(
                "{columns} columns are no multiple of the {} values of a block of {}",
                dtype.block_size(),
                self.name()
            )),
        }
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_lowercase();
        Self::ALL.into_iter().find(|q| q.name() == lower).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{text}` is none of {names}")
        })
    }
}

/// Whether llama.cpp gives more bits to the values and the down projection of a layer: those of the first and the last eighth
/// of the layers, and of every third in between.
fn uses_more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_that_of_llama_cpp() {
        let of = |q: Quantization, name: &str, columns, is_output| {
            q.type_of(name, columns, 32, is_output).unwrap()
        };
        let more: Vec<usize> = (0..32)
            .filter(|i| {
                let name = format!("model.layers.{i}.mlp.down_proj.weight");
                of(Quantization::Q4KM, &name, 11_008, false) == GgmlDType::Q6K
            })
            .collect();
        assert_eq!(more, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
        let (value, query) =
            ("model.layers.31.self_attn.v_proj.weight", "model.layers.31.self_attn.q_proj.weight");
        assert_eq!(of(Quantization::Q5KM, value, 4096, false), GgmlDType::Q6K);
        assert_eq!(of(Quantization::Q5KM, query, 4096, false), GgmlDType::Q5K);
        assert_eq!(of(Quantization::Q4_1, value, 4096, false), GgmlDType::Q4_1);
        assert_eq!(of(Quantization::Q4_0, "lm_head.weight", 4096, true), GgmlDType::Q6K);
        assert_eq!(of(Quantization::Q8_0, "lm_head.weight", 4096, true), GgmlDType::Q8_0);
        assert_eq!(of(Quantization::Q4KM, "model.embed_tokens.weight", 4096, false), GgmlDType::Q4K);
        // 576 columns are no multiple of 256.
        assert_eq!(of(Quantization::Q4KM, query, 576, false), GgmlDType::Q5_0);
        assert_eq!(of(Quantization::Q5KM, query, 576, false), GgmlDType::Q5_1);
        assert_eq!(of(Quantization::Q4_0, "model.embed_tokens.weight", 576, true), GgmlDType::Q8_0);
    }

    #[test]
    fn names_and_widths_that_are_not_possible_are_errors() {
        assert_eq!("Q4_K_M".parse(), Ok(Quantization::Q4KM));
        let error = "q3_k_m".parse::<Quantization>().unwrap_err();
        assert!(error.contains("`q3_k_m`") && error.contains("q4_k_m"), "{error}");
        for q in Quantization::ALL {
            assert_eq!(q.name().parse(), Ok(q));
            let error = q.type_of("model.layers.0.mlp.up_proj.weight", 80, 2, false).unwrap_err();
            assert!(error.contains("80 columns") && error.contains("32"), "{error}");
        }
    }
}
