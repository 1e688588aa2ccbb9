//! Data that a selecting layer derives from its cached keys. It is cached, too, so that a decoding step computes it for
//! the new positions only.

use candle_core::{Result, Tensor};
use gd_kernels::{AppendBuffer, DecodeUse, KeyCache, Precision, Score, SequenceCache};

/// Computes the prior of the layer `[R, Hq, m]` from keys `[R, Hk, m, D]` and their learned prior `[R, Hk, m]`, if
/// there is one.
pub(crate) type KeyPrior<'a> = dyn Fn(&Tensor, Option<&Tensor>) -> Result<Tensor> + 'a;

/// The data that is derived from the keys.
pub(crate) struct DerivedOptions<'a> {
    /// The score of the scans.
    pub(crate) score: Score,
    /// How decoding uses the derived data; none where it reads the keys themselves.
    pub(crate) reads: Option<DecodeUse>,
    /// The precision of decoding; none for the default of the device.
    pub(crate) precision: Option<Precision>,
    /// Computes the prior of the layer; none where that is the learned one.
    pub(crate) prior: Option<&'a KeyPrior<'a>>,
}

/// For all positions of a cache, the data that decoding reads instead of the keys or in addition to them, and the
/// layer's prior.
#[derive(Debug, Clone, Default)]
pub(crate) struct DerivedCache {
    keys: Option<KeyCache>,
    /// The prior of the layer `[B, Hq, M]`.
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
        let lengths =
            self.prior.as_ref().map_or_else(|| vec![0; keys.lengths().len()], |p| p.lengths().to_vec());
        let learned = learned.map(|learned| learned.since(&lengths)).transpose()?;
        for (i, (k, at)) in keys.since(&lengths)?.into_iter().enumerate() {
            let learned = learned.as_ref().map(|parts| &parts[i].0);
            let new = prior(&k, learned)?.detach();
            let derived = match &mut self.prior {
                Some(derived) => derived,
                none => {
                    let dims = [lengths.len(), new.dim(1)?, keys.capacity()];
                    none.insert(AppendBuffer::new(&dims, new.dtype(), new.device())?)
                }
            };
            derived.write(&new, &at)?;
        }
        Ok(())
    }

    /// The data that decoding reads instead of the keys or in addition to them.
    pub(crate) fn keys(&self) -> Option<&KeyCache> {
        self.keys.as_ref()
    }

    /// The layer's prior `[B, Hq, M]`.
    pub(crate) fn prior(&self) -> Result<Option<Tensor>> {
        Ok(self.prior.as_ref().map(AppendBuffer::get).transpose()?)
    }

    /// The data of some of the sequences, by their indices in the batch.
    pub(crate) fn select(&self, sequences: &[usize]) -> Result<Self> {
        Ok(Self {
            keys: self.keys.as_ref().map(|keys| keys.select(sequences)).transpose()?,
            prior: self.prior.as_ref().map(|prior| prior.select(sequences)).transpose()?,
        })
    }

    /// The data of several batches as one. Data that one of them lacks is left out; the next update computes it for
    /// all.
    pub(crate) fn stack(all: &[&Self]) -> Result<Self> {
        let keys: Option<Vec<&KeyCache>> = all.iter().map(|derived| derived.keys.as_ref()).collect();
        let prior: Option<Vec<&AppendBuffer>> = all.iter().map(|derived| derived.prior.as_ref()).collect();
        Ok(Self {
            keys: keys.map(|keys| KeyCache::stack(&keys)).transpose()?,
            prior: prior.map(|prior| AppendBuffer::stack(&prior)).transpose()?,
        })
    }
}
