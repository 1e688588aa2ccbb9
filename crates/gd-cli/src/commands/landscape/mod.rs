//! `gd landscape`: plots the energies around one query.

mod figure;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use comfy_table::Table;
use gd_model::analysis::landscape::{Jump, Landscape, VisibleKey};
use serde_json::json;

use super::op::inputs::Inputs;
use super::op::values::{MaskKind, open_unit, positive};
use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{TERMINAL, plain_table};

/// Plot the energy landscape of one query: along the passages to its two keys of least energy, and over a plane
#[derive(Debug, clap::Args)]
#[command(
    after_help = "X is a file as `gd op scan` reads it: q [B,Hq,N,D], k [B,Hk,M,D], any D; optional beta [Hq] and \
                  alpha [Hq] (or --beta, --alpha), prior [B|1,Hq|Hk,M], kv_len, cu_seqlens.\n\n\
                  The upper chart shows the energy on the passage from the query to the winner, the key with the least \
                  beta |q-k|^2 - b, and to the runner-up, with the coherence point u* of each, and the first root of \
                  bisection if that differs. The lower chart shows the energy over the plane of the query and two keys, \
                  as the minimum over the two pairs. If the three points are collinear, the plane is an arbitrary one \
                  through their line. There is no plane for head dimension 1.\n\n\
                  Example:\n  gd landscape --in x.safetensors --query 7 --mask causal --out landscape.png"
)]
pub struct Args {
    /// Safetensors file with queries and keys
    #[arg(long = "in", value_name = "X")]
    pub input: PathBuf,
    /// Plot to write: PNG if the name ends in .png, a page if it ends in .html, else SVG
    #[arg(long, value_name = "FILE", default_value = "landscape.svg")]
    pub out: PathBuf,
    /// Batch entry
    #[arg(long, value_name = "B", default_value_t = 0)]
    pub batch: usize,
    /// Query head
    #[arg(long, value_name = "H", default_value_t = 0)]
    pub head: usize,
    /// Query [default: the last]
    #[arg(long, value_name = "I")]
    pub query: Option<usize>,
    /// Two keys of the plane [default: winner and runner-up]
    #[arg(long, value_name = "A,B", value_delimiter = ',', num_args = 1)]
    pub keys: Option<Vec<usize>>,
    /// none, causal, or window:W for the last W keys
    #[arg(long, value_name = "MASK", default_value = "none")]
    pub mask: MaskKind,
    /// Query i has the position of key i + n
    #[arg(long, value_name = "n", default_value_t = 0, allow_negative_numbers = true)]
    pub kv_offset: i64,
    /// Inverse bandwidth of every head, > 0 [default: 1]
    #[arg(long, value_name = "B", allow_negative_numbers = true, value_parser = positive)]
    pub beta: Option<f64>,
    /// Weight of the query's well, in (0,1), for every head [default: 0.5]
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = open_unit)]
    pub alpha: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file, tensor or value that is not valid; no file is written then.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    // The landscape is computed on the CPU.
    let inputs = Inputs::read(&args.input, &Device::Cpu)?;
    let QueryLandscape { query, alpha, beta, landscape } = read_landscape(&args, &inputs)?;
    let (winner, runner_up) = landscape.winner_and_runner_up();
    let plane_keys = match args.keys.as_deref() {
        None => std::iter::once(winner.key).chain(runner_up.map(|jump| jump.key)).collect(),
        Some(pair @ [_, _]) => pair.to_vec(),
        Some(other) => return Err(usage(format!("--keys: {} given, two expected", other.len()))),
    };
    let plane = landscape.plane(&plane_keys).map_err(|e| usage(format!("--keys: {e}")))?;
    // Rounded to single precision, which most files contain, for fewer digits.
    let title = format!("Query {query} of head {}: alpha {}, beta {}", args.head, alpha as f32, beta as f32);
    plot::save(&args.out, &figure::figure(&landscape, &title, plane.as_ref())?)?;
    if ctx.json {
        return ctx.print(json!({
            "file": args.out,
            "batch": args.batch,
            "head": args.head,
            "query": query,
            "alpha": alpha,
            "beta": beta,
            "keys": landscape.keys(),
            "winner": winner,
            "runner_up": runner_up,
            "plane": plane.map(|plane| json!({ "keys": plane.keys, "collinear": plane.free })),
        }));
    }
    if plane.is_none() {
        tracing::warn!("head dimension 1 has no plane: the figure shows only the passages");
    }
    ctx.print(format_args!("{}\nsaved {}", jump_table(winner, runner_up), args.out.display()))
}

fn jump_table(winner: Jump, runner_up: Option<Jump>) -> Table {
    let header = ["", "key", "L", "t", "energy", "u*", "E*", "first root u", "energy at the first root"];
    let mut table = plain_table(TERMINAL, &header);
    for (name, jump) in [("winner", Some(winner)), ("runner-up", runner_up)] {
        let Some(Jump { key, length, t, energy, global, passage }) = jump else { continue };
        let numbers = [length, t, energy, global.u, global.energy, passage.u, passage.energy];
        let cells = [name.to_owned(), key.to_string()].into_iter();
        table.add_row(cells.chain(numbers.map(|x| format!("{x:.6}"))).collect::<Vec<_>>());
    }
    table
}

/// The landscape of one query of one head.
struct QueryLandscape {
    query: usize,
    alpha: f64,
    beta: f64,
    landscape: Landscape,
}

/// The sizes of q `[B, Hq, N, D]` and k `[B, Hk, M, D]`.
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    dim: usize,
}

/// Builds the landscape of the query that the flags choose.
fn read_landscape(args: &Args, inputs: &Inputs) -> Result<QueryLandscape> {
    let file = || args.input.display().to_string();
    let (q, k) = (inputs.operand("q")?, inputs.operand("k")?);
    let sizes = sizes(q, k).with_context(file)?;
    let query = args.query.unwrap_or(sizes.queries - 1);
    for (flag, value, count) in [
        ("--batch", args.batch, sizes.batch),
        ("--head", args.head, sizes.heads),
        ("--query", query, sizes.queries),
    ] {
        if value >= count {
            return Err(usage(format!("{flag} {value}: {} has {count}, numbered from 0", file())));
        }
    }
    let per_head = |name: &str, flag: Option<f64>, default: f64| -> Result<f64> {
        let values = inputs.per_head(name, flag, sizes.heads, DType::F64)?;
        values.map_or(Ok(default), |t| Ok(t.to_vec1::<f64>()?[args.head]))
    };
    let (alpha, beta) = (per_head("alpha", args.alpha, 0.5)?, per_head("beta", args.beta, 1.0)?);
    let kv_head = args.head / (sizes.heads / sizes.kv_heads);
    let all_keys = to_f64(&k.narrow(0, args.batch, 1)?.narrow(1, kv_head, 1)?)?;
    let prior = inputs.optional("prior").map(|p| head_prior(p, args, &sizes)).transpose();
    let prior = prior.with_context(file)?;
    let mask = inputs.mask(args.mask, args.kv_offset)?;
    mask.validate(sizes.batch, sizes.keys).with_context(file)?;
    let visible = mask.visible(args.batch, query, sizes.keys).map(|j| VisibleKey {
        position: j,
        key: all_keys[j * sizes.dim..(j + 1) * sizes.dim].to_vec(),
        prior: prior.as_ref().map_or(0.0, |p| p[j]),
    });
    let visible = visible.collect();
    let query_row = to_f64(&q.narrow(0, args.batch, 1)?.narrow(1, args.head, 1)?.narrow(2, query, 1)?)?;
    let landscape = Landscape::new(query_row, visible, alpha, beta)
        .with_context(|| format!("{}: query {query} of head {}", file(), args.head))?;
    Ok(QueryLandscape { query, alpha, beta, landscape })
}

fn sizes(q: &Tensor, k: &Tensor) -> Result<Sizes> {
    let (batch, heads, queries, dim) = q.dims4()?;
    let (key_batch, kv_heads, keys, key_dim) = k.dims4()?;
    let valid_heads = kv_heads > 0 && heads % kv_heads == 0;
    if key_batch != batch || key_dim != dim || !valid_heads || queries == 0 || dim == 0 {
        anyhow::bail!(
            "`q` is {:?} and `k` {:?}; [B,Hq,N,D] and [B,Hk,M,D] expected, Hq a multiple of Hk",
            q.dims(),
            k.dims()
        );
    }
    Ok(Sizes { batch, heads, kv_heads, queries, keys, dim })
}

/// The row `[M]` of the head in a prior `[B|1, Hq|Hk, M]`.
fn head_prior(prior: &Tensor, args: &Args, sizes: &Sizes) -> Result<Vec<f64>> {
    let &Sizes { batch, heads, kv_heads, keys, .. } = sizes;
    let valid = prior.rank() == 3
        && [1, batch].contains(&prior.dims()[0])
        && [heads, kv_heads].contains(&prior.dims()[1])
        && prior.dims()[2] == keys;
    if !valid {
        anyhow::bail!(
            "`prior` is {:?}, expected [{batch} or 1, {heads} or {kv_heads}, {keys}]",
            prior.dims()
        );
    }
    let head = args.head / (heads / prior.dims()[1]);
    let batch = if prior.dims()[0] == 1 { 0 } else { args.batch };
    to_f64(&prior.narrow(0, batch, 1)?.narrow(1, head, 1)?)
}

/// The values of a tensor in row-major order.
fn to_f64(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
