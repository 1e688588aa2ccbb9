//! What a benchmark runs on: shapes and passes, and how much work they are.

use std::fmt;
use std::str::FromStr;

use candle_core::DType;
use serde::{Serialize, Serializer};

/// Elements that one tensor may have: 8 GiB of f32.
const MOST: usize = 1 << 31;

/// The shape of q, k and v: `[batch, heads, length, head dimension]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// B.
    pub batch: usize,
    /// H, of queries and keys alike.
    pub heads: usize,
    /// N keys; as many queries, except in a decoding pass.
    pub len: usize,
    /// D, of keys and values.
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
            _ => Err(format!("{name} is `{text}`, not a whole number above 0")),
        };
        let shape =
            Self { batch: size("B", b)?, heads: size("H", h)?, len: size("N", n)?, dim: size("D", d)? };
        let sizes = [shape.batch, shape.heads, shape.len, shape.dim];
        match sizes.iter().try_fold(1usize, |product, n| product.checked_mul(*n)) {
            Some(n) if n <= MOST => Ok(shape),
            _ => Err(format!("more than {MOST} elements")),
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

/// What is run on a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// N queries on N keys, causal, without a gradient
    Fwd,
    /// The same with the gradients of q, k and v
    #[value(alias = "bwd")]
    Fwdbwd,
    /// One query per head on N keys, without a gradient
    Decode,
}

impl Pass {
    /// The contender that the others are compared to.
    pub(super) fn base(self) -> &'static str {
        match self {
            Pass::Fwd | Pass::Decode => "gd k=1",
            Pass::Fwdbwd => "gd k=8",
        }
    }

    /// Queries per head.
    pub(super) fn queries(self, shape: Shape) -> usize {
        if self == Pass::Decode { 1 } else { shape.len }
    }

    /// (Query, key) pairs of all heads that the mask admits.
    pub(super) fn pairs(self, shape: Shape) -> f64 {
        let n = shape.len as f64;
        let per_head = if self == Pass::Decode { n } else { n * (n + 1.0) / 2.0 };
        (shape.batch * shape.heads) as f64 * per_head
    }

    /// Bytes that a mechanism needs which keeps N x N matrices: in a forward pass the scores before
    /// and after the mask, their exponentials and the weights; for the backward pass every step of
    /// the softmax and the gradients of most.
    pub(super) fn square_bytes(self, shape: Shape) -> f64 {
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

/// What a mechanism cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// One score for every pair; of the values only the selected rows.
    Select,
    /// The same by integers of 8 bits.
    Certified,
    /// One score for every pair, and every value row weighted by it.
    Blend,
}

impl Work {
    /// Floating-point operations, a multiplication and an addition being two. A backward pass costs
    /// a blend 2.5 times the forward pass; of a selection only the scan is counted.
    pub(super) fn flops(self, shape: Shape, pass: Pass) -> f64 {
        let scores = 2.0 * shape.dim as f64 * pass.pairs(shape);
        match (self, pass) {
            (Work::Select | Work::Certified, _) => scores,
            (Work::Blend, Pass::Fwdbwd) => 2.0 * scores * 3.5,
            (Work::Blend, _) => 2.0 * scores,
        }
    }

    /// Bytes of the cache that one decoding step reads: K in its form, and V if it is blended.
    pub(super) fn bytes(self, shape: Shape, dtype: DType) -> f64 {
        let rows = (shape.batch * shape.heads * shape.len) as f64;
        let keys = dtype.size_in_bytes() as f64 * rows * shape.dim as f64;
        match self {
            Work::Select => keys,
            // A byte for every element, and scale, error, norm and bias.
            Work::Certified => rows * (shape.dim + 16) as f64,
            Work::Blend => 2.0 * keys,
        }
    }
}

/// The median; NaN of nothing.
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
    fn shapes_parse_and_print_alike() {
        let shape: Shape = "2x8x4096x64".parse().expect("a shape");
        assert_eq!(shape, Shape { batch: 2, heads: 8, len: 4096, dim: 64 });
        assert_eq!(shape.to_string(), "2x8x4096x64");
    }

    #[test]
    fn bad_shapes_say_what_is_wrong() {
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
    fn the_median_is_the_middle_of_any_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn work_is_counted_by_admitted_pairs() {
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
        assert_eq!(Pass::Fwd.square_bytes(shape), 4.0 * 4.0 * 96.0);
        assert_eq!(Pass::Decode.square_bytes(shape), 4.0 * 4.0 * 24.0);
    }
}
