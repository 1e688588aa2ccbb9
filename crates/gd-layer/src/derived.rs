//! Data that a selecting layer derives from its cached keys, so that a decoding step computes it for the new positions
//! alone.

use candle_core::{Result, Tensor};
use gd_kernels::{AppendBuffer, DecodeUse, KeyCache, Precision, Score, SequenceCache};

/// From keys `[R, Hk, m, D]` and their learned prior `[R, Hk, m]`, if there is one, the layer's own `[R, Hq, m]`.
pub(crate) type KeyPrior<'a> = dyn Fn(&Tensor, Option<&Tensor>) -> Result<Tensor> + 'a;

/// What is derived from the keys.
pub(crate) struct DerivedOptions<'a> {
    pub(crate) score: Score,
    /// How decoding uses the keys, if it reads data derived from them.
    pub(crate) reads: Option<DecodeUse>,
    /// The precision of decoding, instead of the one that suits the device.
    pub(crate) precision: Option<Precision>,
    /// Computes the layer's prior, if that is not the learned one.
    pub(crate) prior: Option<&'a KeyPrior<'a>>,
}

/// For all positions of a cache, the data that decoding reads instead of the keys or in addition to them, and the layer's
/// prior.
#[derive(Debug, Clone, Default)]
pub(crate) struct DerivedCache {
    keys: Option<KeyCache>,
    prior: Option<AppendBuffer>,
}

impl DerivedCache {
    /// Adds the positions that were appended to `keys` `[B, Hk, M, D]` since the last update, with their learned prior
    /// `[B, Hk, M]`.
    pub(crate) fn update(
        &mut self,
        keys: &AppendBuffer,
        learned: Option<&AppendBuffer>,
        options: &DerivedOptions,
    ) -> Result<()> {
        let like = keys.buffer();
        if let (None, Some(reads)) = (&self.keys, options.reads) {
            self.keys = KeyCache::for_decoding(like, options.score, options.precision, reads)?;
        }
        if let Some(derived) = &mut self.keys {
            for (k, at) in keys.since(derived.lengths())? {
                derived.write(&k, &at)?;
            }
        }
        let Some(prior) = options.prior else { return Ok(()) };
        let from =
            self.prior.as_ref().map_or_else(|| vec![0; keys.lengths().len()], |p| p.lengths().to_vec());
        let learned = learned.map(|learned| learned.since(&from)).transpose()?;
        for (part, (k, at)) in keys.since(&from)?.into_iter().enumerate() {
            let learned = learned.as_ref().map(|parts| &parts[part].0);
            let new = prior(&k, learned)?.detach();
            let derived = match &mut self.prior {
                Some(derived) => derived,
                none => {
                    let dims = [from.len(), new.dim(1)?, keys.capacity()];
                    none.insert(AppendBuffer::new(&dims, new.dtype(), new.device())?)
                }
            };
            derived.write(&new, &at)?;
        }
        Ok(())
    }

    /// The data that decoding reads.
    pub(crate) fn keys(&self) -> Option<&KeyCache> {
        self.keys.as_ref()
    }

    /// The layer's prior `[B, Hq, M]`.
    pub(crate) fn prior(&self) -> Result<Option<Tensor>> {
        Ok(self.prior.as_ref().map(AppendBuffer::get).transpose()?)
    }

    /// The data of some sequences, by their numbers in the batch.
    pub(crate) fn select(&self, places: &[usize]) -> Result<Self> {
        Ok(Self {
            keys: self.keys.as_ref().map(|keys| keys.select(places)).transpose()?,
            prior: self.prior.as_ref().map(|prior| prior.select(places)).transpose()?,
        })
    }

    /// The data of several batches as one. What one of them lacks is left out, and computed again for all.
    pub(crate) fn stack(all: &[&Self]) -> Result<Self> {
        let keys: Option<Vec<&KeyCache>> = all.iter().map(|derived| derived.keys.as_ref()).collect();
        let prior: Option<Vec<&AppendBuffer>> = all.iter().map(|derived| derived.prior.as_ref()).collect();
        Ok(Self {
            keys: keys.map(|keys| KeyCache::stack(&keys)).transpose()?,
            prior: prior.map(|prior| AppendBuffer::stack(&prior)).transpose()?,
        })
    }
}
