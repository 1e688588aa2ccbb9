//! `gd landscape`: the energies around one query, as a picture.

mod figure;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use gd_model::analysis::landscape::{Jump, Landscape, Seen};
use serde_json::json;

use super::op::{Inputs, MaskKind, open_unit, positive};
use super::{Context, usage};
use crate::table::plain_table;

/// Draw the energy landscape of one query: along the passages to its best keys, and over a plane
#[derive(Debug, clap::Args)]
#[command(
    after_help = "X is a file as `gd op scan` reads it: q [B,Hq,N,D], k [B,Hk,M,D], any D; optional beta [Hq] and \
                  alpha [Hq] (or --beta, --alpha), prior [B|1,Hq|Hk,M], kv_len, cu_seqlens.\n\n\
                  Above: the energy on the way from the query to the winner, the key of least beta |q-k|^2 - b, \
                  and to the runner-up, with the coherence point u* of each, and the first root of bisection \
                  where that is another. Below: the energy over the plane of the query and two keys; of the two \
                  pairs the lower one counts. Where they lie on one line any plane through it is drawn; head \
                  dimension 1 has none.\n\n\
                  Example:\n  gd landscape --in x.safetensors --query 7 --mask causal --out landscape.png"
)]
pub struct Args {
    /// The safetensors file with queries and keys
    #[arg(long = "in", value_name = "X")]
    pub input: PathBuf,
    /// The picture to write: PNG where its name ends so, else SVG
    #[arg(long, value_name = "FILE", default_value = "landscape.svg")]
    pub out: PathBuf,
    /// The batch entry
    #[arg(long, value_name = "B", default_value_t = 0)]
    pub batch: usize,
    /// The query head
    #[arg(long, value_name = "H", default_value_t = 0)]
    pub head: usize,
    /// The query [default: the last]
    #[arg(long, value_name = "I")]
    pub query: Option<usize>,
    /// The two keys of the plane [default: winner and runner-up]
    #[arg(long, value_name = "A,B", value_delimiter = ',', num_args = 1)]
    pub keys: Option<Vec<usize>>,
    /// none, causal, or window:W for the last W keys
    #[arg(long, value_name = "MASK", default_value = "none")]
    pub mask: MaskKind,
    /// Query i stands at key position i + n
    #[arg(long, value_name = "n", default_value_t = 0, allow_negative_numbers = true)]
    pub kv_offset: i64,
    /// The inverse bandwidth of every head, > 0 [default: 1]
    #[arg(long, value_name = "B", allow_negative_numbers = true, value_parser = positive)]
    pub beta: Option<f64>,
    /// The weight of the query's well, in (0,1), for every head [default: 0.5]
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = open_unit)]
    pub alpha: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file, tensor or value that cannot be used; then no file is written.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    // All of it is computed on the host.
    let inputs = Inputs::read(&args.input, &Device::Cpu)?;
    let (query, alpha, beta, landscape) = landscape(&args, &inputs)?;
    let (winner, runner_up) = landscape.best();
    let chosen = match args.keys.as_deref() {
        None => std::iter::once(winner.key).chain(runner_up.map(|jump| jump.key)).collect(),
        Some(pair @ [_, _]) => pair.to_vec(),
        Some(other) => return Err(usage(format!("--keys: {} given, two expected", other.len()))),
    };
    let plane = landscape.plane(&chosen).map_err(|e| usage(format!("--keys: {e}")))?;
    // In single precision, as most files hold them, for a reader's sake.
    let title = format!("Query {query} of head {}: alpha {}, beta {}", args.head, alpha as f32, beta as f32);
    figure::figure(&landscape, &title, plane.as_ref())?.save(&args.out)?;
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
    let header = ["", "key", "L", "t", "energy", "u*", "E*", "first root u", "energy there"];
    let mut table = plain_table(UTF8_FULL_CONDENSED, &header);
    for (name, jump) in [("winner", Some(winner)), ("runner-up", runner_up)] {
        let Some(Jump { key, length, t, energy, global, passage }) = jump else { continue };
        let numbers = [length, t, energy, global.u, global.energy, passage.u, passage.energy];
        let cells = [name.to_owned(), key.to_string()].into_iter();
        table.add_row(cells.chain(numbers.map(|x| format!("{x:.6}"))).collect::<Vec<_>>());
    }
    if plane.is_none() {
        tracing::warn!("head dimension 1 has no plane: the figure shows the passages alone");
    }
    ctx.print(format_args!("{table}\nsaved {}", args.out.display()))
}

/// The query, alpha, beta, and the landscape that the flags choose.
fn landscape(args: &Args, inputs: &Inputs) -> Result<(usize, f64, f64, Landscape)> {
    let (q, k) = (inputs.operand("q")?, inputs.operand("k")?);
    let at = || args.input.display().to_string();
    let (b, heads, n, d) = q.dims4()?;
    let (kb, kv_heads, keys, kd) = k.dims4()?;
    if kb != b || kd != d || kv_heads == 0 || heads % kv_heads != 0 || n == 0 || d == 0 {
        anyhow::bail!(
            "{}: `q` is {:?} and `k` {:?}; [B,Hq,N,D] and [B,Hk,M,D] expected, Hq a multiple of Hk",
            at(),
            q.dims(),
            k.dims()
        );
    }
    let query = args.query.unwrap_or(n - 1);
    for (flag, value, count) in
        [("--batch", args.batch, b), ("--head", args.head, heads), ("--query", query, n)]
    {
        if value >= count {
            return Err(usage(format!("{flag} {value}: {} has {count}, from 0 on", at())));
        }
    }
    let per_head = |name: &str, flag: Option<f64>, default: f64| -> Result<f64> {
        let values = inputs.per_head(name, flag, heads, DType::F64)?;
        values.map_or(Ok(default), |t| Ok(t.to_vec1::<f64>()?[args.head]))
    };
    let (alpha, beta) = (per_head("alpha", args.alpha, 0.5)?, per_head("beta", args.beta, 1.0)?);
    let row = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) };
    let kv_head = args.head / (heads / kv_heads);
    let own = row(&k.narrow(0, args.batch, 1)?.narrow(1, kv_head, 1)?)?;
    let prior = inputs.optional("prior").map(|p| prior(p, args, [b, heads, kv_heads, keys])).transpose();
    let prior = prior.with_context(at)?.map(|p| row(&p)).transpose()?;
    let mask = inputs.mask(args.mask, args.kv_offset)?;
    mask.validate(b, keys).with_context(at)?;
    let seen = mask.visible(args.batch, query, keys).map(|j| Seen {
        position: j,
        key: own[j * d..(j + 1) * d].to_vec(),
        prior: prior.as_ref().map_or(0.0, |p| p[j]),
    });
    let seen = seen.collect();
    let own = row(&q.narrow(0, args.batch, 1)?.narrow(1, args.head, 1)?.narrow(2, query, 1)?)?;
    let landscape = Landscape::new(own, seen, alpha, beta)
        .with_context(|| format!("{}: query {query} of head {}", at(), args.head))?;
    Ok((query, alpha, beta, landscape))
}

/// The head's row of a prior `[B|1, Hq|Hk, M]`.
fn prior(p: &Tensor, args: &Args, [b, heads, kv_heads, keys]: [usize; 4]) -> Result<Tensor> {
    let fits = p.dims().len() == 3
        && [1, b].contains(&p.dims()[0])
        && [heads, kv_heads].contains(&p.dims()[1])
        && p.dims()[2] == keys;
    if !fits {
        anyhow::bail!("`prior` is {:?}, expected [{b} or 1, {heads} or {kv_heads}, {keys}]", p.dims());
    }
    let head = args.head / (heads / p.dims()[1]);
    Ok(p.narrow(0, if p.dims()[0] == 1 { 0 } else { args.batch }, 1)?.narrow(1, head, 1)?)
}
