//! The Routing Transformer (Roy et al. 2021, arXiv 2003.05997): queries and keys meet in clusters around centroids.

mod centroids;

use candle_core::{DType, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

pub use self::centroids::update_centroids;
use super::definition::{Definition, Info};
use super::indices::{add_rows, matmul, take_rows, top_k_positions, unit_rows, visible_softmax};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Attention within clusters. A query in several clusters returns the mean over those in which it sees a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Routing {
    /// Queries and keys of a cluster.
    pub w: usize,
    /// Whether a query reads keys at or before its own position only.
    pub causal: bool,
    /// Factor of the products of unit vectors; none for sqrt(D).
    pub scale: Option<f64>,
    /// Decay of the moving average of the centroids; see [`update_centroids`].
    pub ema: f64,
}

impl Default for Routing {
    fn default() -> Self {
        Self { w: 64, causal: true, scale: None, ema: 0.999 }
    }
}

impl Definition for Routing {
    const INFO: Info = Info {
        formula: "mean over clusters of softmax(scale q.k) v, q and k of length 1; a centroid takes its w closest q and k",
        source: "Roy et al. 2021",
        inputs: &[("q", "[B,H,N,D]"), ("k", "[B,H,N,D]"), ("v", "[B,H,N,Dv]")],
        constants: &[("centroids", "[H,C,D] of length 1, moved by averages instead of gradients")],
        parameters: &[
            ("w", "queries and keys of a cluster, at least 1"),
            ("causal", "true: keys at or before the query"),
            ("scale", "factor of the products of unit vectors; sqrt(D) if absent"),
            ("ema", "decay of the moving average of the centroids, 0 to 1"),
        ],
        memory: "C x w x (w + D + Dv) per head",
        not_in_models: Some("its centroids are trained by moving averages"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole(
            "top w members of every cluster > softmax within clusters > mean over clusters",
            |inputs| self.attend(inputs),
        )
    }

    fn validate(&self) -> Result<()> {
        if self.w == 0 {
            bail!("w 0: clusters of at least 1 member expected");
        }
        if !(0.0..=1.0).contains(&self.ema) {
            bail!("ema {}: a decay in 0..=1 expected", self.ema);
        }
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            bail!("scale {scale}: a finite number expected");
        }
        Ok(())
    }
}

impl Routing {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let get = |name| inputs.get(name);
        let (q, k, v, centroids) = (get("q")?, get("k")?, get("v")?, get("centroids")?);
        let (b, h, n, d) = q.dims4()?;
        let fits = k.dims() == q.dims() && v.rank() == 4 && v.dims()[..3] == q.dims()[..3];
        let (heads, _, width) = centroids.dims3()?;
        if !fits || heads != h || width != d {
            bail!(
                "q {:?}, k {:?}, v {:?}, centroids {:?}: [B,H,N,D], [B,H,N,D], [B,H,N,Dv] and [H,C,D] expected",
                q.dims(),
                k.dims(),
                v.dims(),
                centroids.dims()
            );
        }
        let (unit_q, unit_k) = (unit_rows(q)?, unit_rows(k)?);
        let closest = |x: &Tensor| top_k_positions(&matmul(centroids, &x.t()?)?, self.w);
        let (query, key) = (closest(&unit_q)?, closest(&unit_k)?);
        let (_, _, clusters, members) = query.dims4()?;
        // The clusters of a head are one list of rows.
        let rows = |x: &Tensor, index: &Tensor| {
            take_rows(x, &index.flatten(2, 3)?)?.reshape((b, h, clusters, members, x.dim(3)?))
        };
        let scale = self.scale.unwrap_or((d as f64).sqrt());
        let scores = (matmul(&rows(&unit_q, &query)?, &rows(&unit_k, &key)?.t()?)? * scale)?;
        let visible = match self.causal {
            true => key.unsqueeze(3)?.broadcast_le(&query.unsqueeze(4)?)?,
            false => Tensor::ones(scores.shape(), DType::U8, q.device())?,
        };
        let out = matmul(&visible_softmax(&scores, &visible)?, &rows(v, &key)?)?;
        let sees = visible.max_keepdim(4)?.to_dtype(out.dtype())?;
        let all = query.flatten(2, 3)?;
        let count = add_rows(&sees.flatten(2, 3)?, &all, n)?;
        let sum = add_rows(&out.flatten(2, 3)?, &all, n)?;
        let mut outputs = Outputs::default();
        outputs.insert("out", sum.broadcast_div(&count.maximum(1f64)?)?);
        outputs.insert("count", count.squeeze(3)?.to_dtype(DType::I64)?);
        outputs.insert("q_index", query.to_dtype(DType::I64)?);
        outputs.insert("k_index", key.to_dtype(DType::I64)?);
        let (moved, assigned) = update_centroids(q, k, centroids, self.ema)?;
        outputs.insert("ema.centroids", moved);
        outputs.insert("ema.assign", assigned);
        Ok(outputs)
    }
}
