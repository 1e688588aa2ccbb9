//! The flags of `gd op`.

use std::path::PathBuf;

use gd_kernels::{CoherenceMode, Estimator, Gate, Precision, Score, TieBreak};

use super::values::{MaskKind, choice, gate, number, open_unit, positive, unit};

const SCAN_HELP: &str = "\
Tensors read (B batch, Hq query heads, Hk key-value heads, Hq a multiple of Hk, N queries, M keys):
  q           [B,Hq,N,D]      F32, F16, BF16 or F64; D up to 1024
  k           [B,Hk,M,D]      as q
  prior       [B|1,Hq|Hk,M]   optional: key prior b, subtracted from the energy
  beta        [Hq]            optional: inverse bandwidth, > 0 (instead of --beta)
  protected   [B,P] or [B|1,Hq|Hk|1,N|1,P]  I32, optional: keys that are always candidates, -1: padding
  kv_len      [B] or [1]      I32, optional: number of valid keys per batch entry
  cu_seqlens  [S+1] or [B,S+1]  I32, optional: boundaries 0..M of packed sequences

Tensors written (K candidates in ascending order of energy, then P slots for the protected keys that are not among
them; padding has index -1 and energy +inf):
  index       [B,Hq,N,K+P]    I32
  energy      [B,Hq,N,K+P]    F32 (F64 for F64 input): beta |q-k|^2 - b, or -beta <q,k> - b
  protected   [B,Hq,N,K+P]    U8, if protected was read: 1 for a protected candidate

Example:
  gd op scan --in x.safetensors --out y.safetensors --k 8 --mask causal";

const SELECT_HELP: &str = "\
Tensors read: those of `gd op scan` (see its --help), and
  v           [B,Hk,M,Dv]     as q
  alpha       [Hq]            optional: weight of the query's well, in (0,1) (instead of --alpha)
  threshold   [Hq]            optional: maximum energy of a selected key (instead of --threshold)
  rounds      [Hq,R]          optional: weight of each refinement round (instead of --refine)
  dout        [B,Hq,N,Dv]     optional, with --backward: gradient of out (default: ones)

Tensors written:
  out         [B,Hq,N,Dv]     dtype of v; 0 where the head abstains
  index       [B,Hq,N]        I32: the selected key, -1 where the head abstains
  energy      [B,Hq,N]        F32 (F64 for F64 input): energy of the selected key, +inf where the head abstains
  margin      [B,Hq,N]        as energy: energy of the runner-up minus that of the selected key, +inf without
                              a runner-up
  coherence   [B,Hq,N]        as energy: position u* of the coherence point on the passage, 0 query, 1 key,
                              NaN where the head abstains
  gate        [B,Hq,N]        as energy: factor of the value row
  candidate_index, candidate_energy   [B,Hq,N,K+P]   as `gd op scan` writes them
index to gate belong to the first round. With --estimator dense every key is a candidate (K = M).
With --backward also the gradients of sum(out * dout), with the shapes of their tensors:
  dq, dk, dv, dbeta, dalpha, and dprior, dthreshold, drounds if these were given

Example:
  gd op select --in x.safetensors --out y.safetensors --k 8 --mask window:64 --gate energy:0.5 --threshold 4 --backward";

const ATTEND_HELP: &str = "\
Runs one of the attention mechanisms that selection is compared with. `--list` prints each with its stages, parameters,
tensors and source. Most of them read (B batch, H query heads, Hk key-value heads, N queries, M keys):
  q           [B,H,N,D]       F32, F64, F16 or BF16 (the latter two are computed in F32)
  k           [B,Hk,M,D]      as q
  v           [B,Hk,M,Dv]     as q
  mask        [N,M]           U8, optional: 1 for a visible key
  dout        [B,H,N,Dv]      optional, with --backward: gradient of out (default: ones)

Tensors written:
  out, weights, scores (before the mask), and those that are particular to the mechanism
  dX for every input X that is not a constant, with --backward: the gradients of sum(out * dout)

A file may hold several cases. With --case a.b, tensors are searched as a.b.NAME, then a.NAME, then NAME, and the
results are written with the prefix with which the files have them, or else a.b. The JSON file holds parameters for
all cases under `params` and for each under `cases`: {\"params\": {\"k\": 4}, \"cases\": {\"a.b\": {\"mask\": \"causal\"}}}.
There, `mask` names the tensor mask.causal. The case `rows` normalises the rows of the tensor rows.z [R,M].

Example:
  gd op attend --mechanism entmax --in x.safetensors --out y.safetensors --backward";

/// Run one operator on the tensors of a safetensors file
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

/// The operators that the command can run.
#[derive(Debug, clap::Subcommand)]
pub enum Operator {
    /// Find the candidates: the K keys of least energy for every query
    #[command(after_help = SCAN_HELP)]
    Scan(ScanArgs),
    /// Select one key per query and head (or none) and return its value row
    #[command(after_help = SELECT_HELP)]
    Select(Box<SelectArgs>),
    /// Run an attention mechanism: softmax, entmax, top-k and others
    #[command(after_help = ATTEND_HELP)]
    Attend(AttendArgs),
}

/// The flags of `attend`.
#[derive(Debug, clap::Args)]
pub struct AttendArgs {
    /// Print every mechanism with its stages, parameters, tensors and source
    #[arg(long, conflicts_with_all = ["mechanism", "input", "output"])]
    pub list: bool,
    /// Name of the mechanism
    #[arg(long, value_name = "NAME")]
    pub mechanism: Option<String>,
    /// File to read
    #[arg(long = "in", value_name = "X.safetensors")]
    pub input: Option<PathBuf>,
    /// Parameters of the mechanism, and what holds for each case [default: the defaults of the mechanism]
    #[arg(long, value_name = "P.json")]
    pub params: Option<PathBuf>,
    /// Case of the files [default: the tensors without a prefix]
    #[arg(long, value_name = "CASE", default_value = "")]
    pub case: String,
    /// File to write
    #[arg(long = "out", value_name = "Y.safetensors")]
    pub output: Option<PathBuf>,
    /// Also write the gradients of sum(out * dout)
    #[arg(long)]
    pub backward: bool,
}

/// The flags of both operators.
#[derive(Debug, clap::Args)]
pub struct ScanArgs {
    /// File to read
    #[arg(long = "in", value_name = "X.safetensors")]
    pub input: PathBuf,
    /// File to write
    #[arg(long = "out", value_name = "Y.safetensors")]
    pub output: PathBuf,
    /// Candidates per query: 1, 2, 4, 8, 16, 32 or 64, at most the number of keys [default: 8, or fewer if there are
    /// fewer keys]
    #[arg(long = "k", value_name = "K", allow_negative_numbers = true)]
    pub candidates: Option<i64>,
    /// none, causal, or window:W for the last W keys
    #[arg(long, value_name = "MASK", default_value = "none")]
    pub mask: MaskKind,
    /// Query i has the position of key i + n
    #[arg(long, value_name = "n", default_value_t = 0, allow_negative_numbers = true)]
    pub kv_offset: i64,
    /// Score of a key: the selection energy or the dot product
    #[arg(long, default_value = "energy", value_parser = choice(&[("energy", Score::Energy), ("dot", Score::Dot)]))]
    pub score: Score,
    /// Which of several keys with equal energy is preferred: the first or the last
    #[arg(long, default_value = "first", value_parser = choice(&[("first", TieBreak::First), ("last", TieBreak::Last)]))]
    pub tie: TieBreak,
    /// Inverse bandwidth of every head, > 0 [default: 1]
    #[arg(long, value_name = "B", allow_negative_numbers = true, value_parser = positive)]
    pub beta: Option<f64>,
    /// Arithmetic of the scan: native scores every pair in full precision, certified uses 8-bit integers where their
    /// error bound is sufficient. The result is the same
    #[arg(long, default_value = "native", value_parser = choice(&[("native", Precision::Native), ("certified", Precision::Certified)]))]
    pub precision: Precision,
    /// Whether NaN or infinity in q, k, dout or a value row that is read is an error, and an energy that exceeds the
    /// range of its dtype; without, such energies are counted and written as the greatest number of the dtype
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub checked: bool,
}

/// The flags of `select`.
#[derive(Debug, clap::Args)]
pub struct SelectArgs {
    /// The flags that `scan` also has.
    #[command(flatten)]
    pub scan: ScanArgs,
    /// Weight of the query's well, in (0,1), for every head [default: 0.5]
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = open_unit)]
    pub alpha: Option<f64>,
    /// Maximum energy of a selected key, for every head [default: no limit]
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = number)]
    pub threshold: Option<f64>,
    /// Factor of the selected value row: none, energy, energy:TEMPERATURE, margin, margin:TEMPERATURE or coherence
    #[arg(long, value_name = "GATE", default_value = "none", value_parser = gate)]
    pub gate: Gate,
    /// Number of selection rounds, each with weight 1 [default: 1]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..=64))]
    pub refine: Option<u64>,
    /// Estimator of the gradient of the discrete selection
    #[arg(long, default_value = "candidates", value_parser = choice(&ESTIMATORS))]
    pub estimator: Estimator,
    /// Temperature of the estimator's softmax, > 0
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive)]
    pub temperature: f64,
    /// Share of the gradient that is distributed equally among the candidates
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true, value_parser = unit)]
    pub preserve_floor: f64,
    /// Share of the value gradient that is distributed among the candidates by their weight
    #[arg(long, value_name = "L", default_value_t = 0.0, allow_negative_numbers = true, value_parser = unit)]
    pub value_floor: f64,
    /// Share of the hard selection in the output, 0 to 1 (the rest is the soft mixture)
    #[arg(long, value_name = "H", default_value_t = 1.0, allow_negative_numbers = true, value_parser = unit)]
    pub hardness: f64,
    /// Which root of the coherence equation is written
    #[arg(long, default_value = "global", value_parser = choice(&[("global", CoherenceMode::Global), ("passage", CoherenceMode::Passage)]))]
    pub coherence_mode: CoherenceMode,
    /// Conditional protection: floor=F,margin=M,strength=S,entropy=E,slack=L, or a JSON file with these values
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
