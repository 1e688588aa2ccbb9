//! The flags of `gd op`.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use gd_kernels::{CoherenceMode, Estimator, Gate, Precision, Score, TieBreak};

const SCAN_HELP: &str = "\
Tensors read (B batch, Hq query heads, Hk key-value heads, Hq a multiple of Hk, N queries, M keys):
  q           [B,Hq,N,D]      F32, F16, BF16 or F64; D up to 1024
  k           [B,Hk,M,D]      as q
  prior       [B|1,Hq|Hk,M]   optional: key prior b, subtracted from the energy
  beta        [Hq]            optional: inverse bandwidth, > 0 (instead of --beta)
  protected   [B,P] or [B|1,Hq|Hk|1,N|1,P]  I32, optional: keys that stay candidates, -1 pads
  kv_len      [B] or [1]      I32, optional: the keys that count, per batch entry
  cu_seqlens  [S+1] or [B,S+1]  I32, optional: boundaries 0..M of packed sequences

Tensors written (K candidates by rising energy, then the protected keys not among them in P more slots;
index -1 and energy +inf pad):
  index       [B,Hq,N,K+P]    I32
  energy      [B,Hq,N,K+P]    F32 (F64 for F64 input): beta |q-k|^2 - b, or -beta <q,k> - b
  protected   [B,Hq,N,K+P]    U8, if protected was read: 1 for a protected candidate

Example:
  gd op scan --in x.safetensors --out y.safetensors --k 8 --mask causal";

const SELECT_HELP: &str = "\
Tensors read: those of `gd op scan` (see its --help), and
  v           [B,Hk,M,Dv]     as q
  alpha       [Hq]            optional: weight of the query's well, in (0,1) (instead of --alpha)
  threshold   [Hq]            optional: greatest energy that is selected (instead of --threshold)
  rounds      [Hq,R]          optional: weight of each refinement round (instead of --refine)
  dout        [B,Hq,N,Dv]     optional, with --backward: gradient of out (default: ones)

Tensors written:
  out         [B,Hq,N,Dv]     dtype of v; 0 where the head abstains
  index       [B,Hq,N]        I32: the selected key, -1 where the head abstains
  energy      [B,Hq,N]        F32 (F64 for F64 input): the selected key's energy, +inf where the head abstains
  margin      [B,Hq,N]        as energy: runner-up's energy minus the selected one's, +inf without one
  coherence   [B,Hq,N]        as energy: the coherence point's place u* on the passage, 0 query, 1 key,
                              NaN where the head abstains
  gate        [B,Hq,N]        as energy: what scaled the value row
  candidate_index, candidate_energy   [B,Hq,N,K+P]   as `gd op scan` writes them
index to gate are those of the first round. With --estimator dense every key is a candidate (K = M).
With --backward, the gradients of sum(out * dout), each in the shape of its tensor:
  dq, dk, dv, dbeta, dalpha, and dprior, dthreshold, drounds where these were given

Example:
  gd op select --in x.safetensors --out y.safetensors --k 8 --mask window:64 --gate energy:0.5 --threshold 4 --backward";

/// Run one raw operator on the tensors of a safetensors file
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  gd op select --in x.safetensors --out y.safetensors --mask causal --backward\n\
                  `gd op scan --help` and `gd op select --help` list every tensor."
)]
pub struct Args {
    /// The operator.
    #[command(subcommand)]
    pub operator: Operator,
}

/// The operators that can be run alone.
#[derive(Debug, clap::Subcommand)]
pub enum Operator {
    /// Find the candidates: the K keys of least energy for every query
    #[command(after_help = SCAN_HELP)]
    Scan(ScanArgs),
    /// Select one key per query and head (or none) and return its value row
    #[command(after_help = SELECT_HELP)]
    Select(Box<SelectArgs>),
}

/// The flags of both operators.
#[derive(Debug, clap::Args)]
pub struct ScanArgs {
    /// The file to read
    #[arg(long = "in", value_name = "X.safetensors")]
    pub input: PathBuf,
    /// The file to write
    #[arg(long = "out", value_name = "Y.safetensors")]
    pub output: PathBuf,
    /// Candidates per query: 1, 2, 4, 8, 16, 32 or 64, at most the number of keys [default: 8, or the most the keys allow]
    #[arg(long = "k", value_name = "K", allow_negative_numbers = true)]
    pub candidates: Option<i64>,
    /// none, causal, or window:W for the last W keys
    #[arg(long, value_name = "MASK", default_value = "none")]
    pub mask: MaskKind,
    /// Query i stands at key position i + n
    #[arg(long, value_name = "n", default_value_t = 0, allow_negative_numbers = true)]
    pub kv_offset: i64,
    /// What is compared: the selection energy or the plain dot product
    #[arg(long, default_value = "energy", value_parser = choice(&[("energy", Score::Energy), ("dot", Score::Dot)]))]
    pub score: Score,
    /// Which of several equal keys wins: the first or the last
    #[arg(long, default_value = "first", value_parser = choice(&[("first", TieBreak::First), ("last", TieBreak::Last)]))]
    pub tie: TieBreak,
    /// The inverse bandwidth of every head, > 0 [default: 1]
    #[arg(long, value_name = "B", allow_negative_numbers = true, value_parser = positive)]
    pub beta: Option<f64>,
    /// How candidates are found: native scores every pair in full, certified by 8-bit integers where
    /// their error bound decides; the result is the same
    #[arg(long, default_value = "native", value_parser = choice(&[("native", Precision::Native), ("certified", Precision::Certified)]))]
    pub precision: Precision,
    /// Whether NaN and infinity in q or k are errors
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub checked: bool,
}

/// The flags of `select`.
#[derive(Debug, clap::Args)]
pub struct SelectArgs {
    /// The flags that `scan` has too.
    #[command(flatten)]
    pub scan: ScanArgs,
    /// The weight of the query's well, in (0,1), for every head [default: 0.5]
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = open_unit)]
    pub alpha: Option<f64>,
    /// The greatest energy that is selected, for every head [default: no bound]
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = number)]
    pub threshold: Option<f64>,
    /// What scales the selected row: none, energy[:TEMPERATURE] or coherence
    #[arg(long, value_name = "GATE", default_value = "none", value_parser = parse_gate)]
    pub gate: Gate,
    /// Rounds of selection, each with weight 1 [default: 1]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..=64))]
    pub refine: Option<u64>,
    /// How the gradient passes the choice
    #[arg(long, default_value = "candidates", value_parser = choice(&ESTIMATORS))]
    pub estimator: Estimator,
    /// The temperature of the estimator's softmax, > 0
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive)]
    pub temperature: f64,
    /// The share of the gradient that is spread evenly over the candidates
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true, value_parser = unit)]
    pub preserve_floor: f64,
    /// The share of the value gradient that goes to the candidates by their weight
    #[arg(long, value_name = "L", default_value_t = 0.0, allow_negative_numbers = true, value_parser = unit)]
    pub value_floor: f64,
    /// The share of the hard choice in the output, 0 to 1 (the rest is the soft mixture)
    #[arg(long, value_name = "H", default_value_t = 1.0, allow_negative_numbers = true, value_parser = unit)]
    pub hardness: f64,
    /// Which root of the coherence equation is reported
    #[arg(long, default_value = "global", value_parser = choice(&[("global", CoherenceMode::Global), ("passage", CoherenceMode::Passage)]))]
    pub coherence_mode: CoherenceMode,
    /// Conditional protection: floor=F,margin=M,strength=S,entropy=E,slack=L, or a JSON file with these
    #[arg(long, value_name = "SPEC|FILE")]
    pub barrier: Option<String>,
    /// Also write the gradients of sum(out * dout)
    #[arg(long)]
    pub backward: bool,
}

const ESTIMATORS: [(&str, Estimator); 5] = [
    ("candidates", Estimator::Candidates),
    ("winner", Estimator::Winner),
    ("dense", Estimator::Dense),
    ("reinmax", Estimator::Reinmax),
    ("blend", Estimator::Blend),
];

/// The value of `--mask`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskKind {
    /// Every key.
    None,
    /// The keys up to the query's own position.
    Causal,
    /// The last so many of them.
    Window(usize),
}

impl std::str::FromStr for MaskKind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let window = |w: &str| match w.parse() {
            Ok(0) | Err(_) => Err(format!("a window of `{w}` keys; 1 or more expected")),
            Ok(w) => Ok(Self::Window(w)),
        };
        match s.split_once(':') {
            None if s == "none" => Ok(Self::None),
            None if s == "causal" => Ok(Self::Causal),
            Some(("window", w)) => window(w),
            _ => Err("expected none, causal or window:W".into()),
        }
    }
}

fn parse_gate(s: &str) -> Result<Gate, String> {
    let energy = |t: &str| match positive(t) {
        Ok(temperature) => Ok(Gate::Energy { temperature }),
        Err(e) => Err(format!("a gate temperature of `{t}`: {e}")),
    };
    match s.split_once(':') {
        None if s == "none" => Ok(Gate::None),
        None if s == "coherence" => Ok(Gate::Coherence),
        None if s == "energy" => energy("1"),
        Some(("energy", t)) => energy(t),
        _ => Err("expected none, energy, energy:TEMPERATURE or coherence".into()),
    }
}

fn number(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|x: &f64| !x.is_nan()).ok_or_else(|| "expected a number".into())
}

pub(in crate::commands) fn positive(s: &str) -> Result<f64, String> {
    number(s).ok().filter(|&x| x > 0.0 && x.is_finite()).ok_or_else(|| "expected a number above 0".into())
}

fn unit(s: &str) -> Result<f64, String> {
    number(s).ok().filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "expected a number from 0 to 1".into())
}

pub(in crate::commands) fn open_unit(s: &str) -> Result<f64, String> {
    unit(s).ok().filter(|&x| x > 0.0 && x < 1.0).ok_or_else(|| "expected a number between 0 and 1".into())
}

/// A parser for one of the names in `table`, which stands for the value beside it.
fn choice<T: Copy + Send + Sync + 'static>(
    table: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(table.iter().map(|&(name, _)| name)).try_map(move |name| {
        table.iter().find(|(n, _)| *n == name).map(|&(_, value)| value).ok_or("no such name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_gates_parse_and_refuse() {
        assert_eq!("window:7".parse(), Ok(MaskKind::Window(7)));
        for bad in ["", "window", "window:", "window:0", "window:-1", "causal:3", "block"] {
            assert!(bad.parse::<MaskKind>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(parse_gate("energy"), Ok(Gate::Energy { temperature: 1.0 }));
        assert_eq!(parse_gate("energy:0.25"), Ok(Gate::Energy { temperature: 0.25 }));
        for bad in ["", "energy:", "energy:0", "energy:-1", "energy:nan", "energy:inf", "coherence:1"] {
            assert!(parse_gate(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
