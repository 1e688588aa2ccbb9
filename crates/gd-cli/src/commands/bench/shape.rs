//! Shapes and passes of a benchmark, and the work that they require.

use std::fmt;
use std::str::FromStr;

use candle_core::DType;
use serde::{Serialize, Serializer};

/// Maximum number of elements of a tensor: 8 GiB of f32.
const MAX_ELEMENTS: usize = 1 << 31;

/// The shape of q, k and v: `[batch, heads, length, head dimension]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Batch size B.
    pub batch: usize,
    /// Number of heads H of queries and keys.
    pub heads: usize,
    /// Number of keys N. There are as many queries, except in a decode pass.
    pub len: usize,
    /// Head dimension D of keys and values.
    pub dim: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('x').collect();
        let [b, h, n, d] = parts[..] else {
            return Err("expected BxHxNxD: batch, heads, length, head dimension".into());
        };
        let size = |name: &str, text: &str| match text.parse() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("{name} is `{text}`, not a positive integer")),
        };
        let shape =
            Self { batch: size("B", b)?, heads: size("H", h)?, len: size("N", n)?, dim: size("D", d)? };
        let sizes = [shape.batch, shape.heads, shape.len, shape.dim];
        match sizes.iter().try_fold(1usize, |product, n| product.checked_mul(*n)) {
            Some(n) if n <= MAX_ELEMENTS => Ok(shape),
            _ => Err(format!("more than {MAX_ELEMENTS} elements")),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.batch, self.heads, self.len, self.dim)
    }
}

impl Serialize for Shape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The computation that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// Forward pass: N causal queries on N keys
    Fwd,
    /// Forward and backward pass with the gradients of q, k and v
    #[value(alias = "bwd")]
    Fwdbwd,
    /// Decode step: one query per head on N keys
    Decode,
}

impl Pass {
    /// The contender that the others are compared with.
    pub(super) fn baseline(self) -> &'static str {
        match self {
            Pass::Fwd | Pass::Decode => "gd k=1",
            Pass::Fwdbwd => "gd k=8",
        }
    }

    /// Number of queries per head.
    pub(super) fn queries(self, shape: Shape) -> usize {
        if self == Pass::Decode { 1 } else { shape.len }
    }

    /// Number of visible (query, key) pairs of all heads.
    pub(super) fn pairs(self, shape: Shape) -> f64 {
        let n = shape.len as f64;
        let per_head = if self == Pass::Decode { n } else { n * (n + 1.0) / 2.0 };
        (shape.batch * shape.heads) as f64 * per_head
    }

    /// Bytes of the N x N matrices of a mechanism that stores them: in a forward pass the scores before and after the
    /// mask, their exponentials and the weights; for the backward pass all steps of the softmax and most of their
    /// gradients.
    pub(super) fn matrix_bytes(self, shape: Shape) -> f64 {
        let matrices = if self == Pass::Fwdbwd { 13 } else { 4 };
        let rows = (shape.batch * shape.heads * self.queries(shape)) as f64;
        4.0 * rows * shape.len as f64 * f64::from(matrices)
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pass::Fwd => "fwd",
            Pass::Fwdbwd => "fwdbwd",
            Pass::Decode => "decode",
        })
    }
}

/// The minimal work of a mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// One score per pair, and the selected rows of the values.
    Select,
    /// As `Select` with 8-bit integers.
    Certified,
    /// One score per pair, and all value rows weighted by it.
    Blend,
}

impl Work {
    /// Number of floating-point operations; a multiplication and an addition count as two. The backward pass of a blend
    /// counts 2.5 times its forward pass, that of a selection counts as 0.
    pub(super) fn flops(self, shape: Shape, pass: Pass) -> f64 {
        let scores = 2.0 * shape.dim as f64 * pass.pairs(shape);
        match (self, pass) {
            (Work::Select | Work::Certified, _) => scores,
            (Work::Blend, Pass::Fwdbwd) => 2.0 * scores * 3.5,
            (Work::Blend, _) => 2.0 * scores,
        }
    }

    /// Bytes of the cache that a decode step reads: K in its storage format, and V for a blend.
    pub(super) fn bytes(self, shape: Shape, dtype: DType) -> f64 {
        let rows = (shape.batch * shape.heads * shape.len) as f64;
        let keys = dtype.size_in_bytes() as f64 * rows * shape.dim as f64;
        match self {
            Work::Select => keys,
            // One byte per element, and four f32 per row: scale, error, norm and bias.
            Work::Certified => rows * (shape.dim + 16) as f64,
            Work::Blend => 2.0 * keys,
        }
    }
}

/// The median, or NaN if there are no values.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[half],
        _ => (sorted[half - 1] + sorted[half]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_printed_as_they_are_parsed() {
        let shape: Shape = "2x8x4096x64".parse().expect("a shape");
        assert_eq!(shape, Shape { batch: 2, heads: 8, len: 4096, dim: 64 });
        assert_eq!(shape.to_string(), "2x8x4096x64");
    }

    #[test]
    fn errors_name_the_invalid_size() {
        let huge = format!("1x1x{}x64", usize::MAX);
        let cases = [
            ("", "BxHxNxD"),
            ("8x64", "BxHxNxD"),
            ("1x8x4096x64x2", "BxHxNxD"),
            ("1x8x0x64", "N is `0`"),
            ("1x-8x16x64", "H is `-8`"),
            ("1x8x16xd", "D is `d`"),
            ("bx8x16x64", "B is `b`"),
            ("1x8x1.5x64", "N is `1.5`"),
            (&huge, "elements"),
            ("1x1x67108864x64", "elements"),
        ];
        for (text, word) in cases {
            let error = text.parse::<Shape>().expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn the_median_does_not_depend_on_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn work_is_proportional_to_the_visible_pairs() {
        let shape = Shape { batch: 2, heads: 3, len: 4, dim: 8 };
        assert_eq!((Pass::Fwd.pairs(shape), Pass::Decode.pairs(shape)), (60.0, 24.0));
        assert_eq!(Work::Select.flops(shape, Pass::Fwd), 960.0);
        assert_eq!(Work::Select.flops(shape, Pass::Fwdbwd), 960.0);
        assert_eq!(Work::Blend.flops(shape, Pass::Fwd), 1920.0);
        assert_eq!(Work::Blend.flops(shape, Pass::Fwdbwd), 6720.0);
        assert_eq!(Work::Blend.flops(shape, Pass::Decode), 768.0);
        assert_eq!(
            (Work::Select.bytes(shape, DType::F32), Work::Blend.bytes(shape, DType::F32)),
            (768.0, 1536.0)
        );
        assert_eq!(
            Work::Certified.bytes(shape, DType::F32),
            768.0 / 4.0 + 768.0 / 4.0 / shape.dim as f64 * 16.0
        );
        assert_eq!(Pass::Fwd.matrix_bytes(shape), 4.0 * 4.0 * 96.0);
        assert_eq!(Pass::Decode.matrix_bytes(shape), 4.0 * 4.0 * 24.0);
    }
}
