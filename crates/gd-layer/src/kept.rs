//! What a selecting layer keeps beside its keys, so that a decoding step works it out for the new positions alone.

use candle_core::{Result, Tensor};
use gd_kernels::{AppendBuffer, DecodeUse, KeyCache, Precision, Score, SequenceCache};

/// From keys `[R, Hk, m, D]` and their learned prior `[R, Hk, m]`, if there is one, the layer's own `[R, Hq, m]`.
pub(crate) type KeyPrior<'a> = dyn Fn(&Tensor, Option<&Tensor>) -> Result<Tensor> + 'a;

/// What the layer asks for.
pub(crate) struct Wanted<'a> {
    pub(crate) score: Score,
    /// What decoding asks of the keys, if it reads data derived from them.
    pub(crate) reads: Option<DecodeUse>,
    /// The precision of decoding, instead of the one that suits the device.
    pub(crate) precision: Option<Precision>,
    /// What makes the layer's prior, if it has one of its own.
    pub(crate) prior: Option<&'a KeyPrior<'a>>,
}

/// For all positions of a cache what decoding reads instead of the keys or beside them, and the layer's prior.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept {
    keys: Option<KeyCache>,
    prior: Option<AppendBuffer>,
}

impl Kept {
    /// Takes in the positions that have come to `keys` `[B, Hk, M, D]` with their learned prior `[B, Hk, M]`.
    pub(crate) fn follow(
        &mut self,
        keys: &AppendBuffer,
        learned: Option<&AppendBuffer>,
        wanted: &Wanted,
    ) -> Result<()> {
        let like = keys.buffer();
        if let (None, Some(reads)) = (&self.keys, wanted.reads) {
            self.keys = KeyCache::for_decoding(like, wanted.score, wanted.precision, reads)?;
        }
        if let Some(kept) = &mut self.keys {
            for (k, at) in keys.since(kept.lengths())? {
                kept.write(&k, &at)?;
            }
        }
        let Some(prior) = wanted.prior else { return Ok(()) };
        let from =
            self.prior.as_ref().map_or_else(|| vec![0; keys.lengths().len()], |p| p.lengths().to_vec());
        let learned = learned.map(|learned| learned.since(&from)).transpose()?;
        for (part, (k, at)) in keys.since(&from)?.into_iter().enumerate() {
            let learned = learned.as_ref().map(|parts| &parts[part].0);
            let new = prior(&k, learned)?.detach();
            let kept = match &mut self.prior {
                Some(kept) => kept,
                none => {
                    let dims = [from.len(), new.dim(1)?, keys.capacity()];
                    none.insert(AppendBuffer::new(&dims, new.dtype(), new.device())?)
                }
            };
            kept.write(&new, &at)?;
        }
        Ok(())
    }

    /// What decoding reads.
    pub(crate) fn keys(&self) -> Option<&KeyCache> {
        self.keys.as_ref()
    }

    /// The layer's prior `[B, Hq, M]`.
    pub(crate) fn prior(&self) -> Result<Option<Tensor>> {
        Ok(self.prior.as_ref().map(AppendBuffer::get).transpose()?)
    }

    /// That of some sequences, by their places in the batch.
    pub(crate) fn select(&self, places: &[usize]) -> Result<Self> {
        Ok(Self {
            keys: self.keys.as_ref().map(|keys| keys.select(places)).transpose()?,
            prior: self.prior.as_ref().map(|prior| prior.select(places)).transpose()?,
        })
    }

    /// That of several batches. What one of them lacks is left out, for all to be worked out anew.
    pub(crate) fn stack(all: &[&Self]) -> Result<Self> {
        let keys: Option<Vec<&KeyCache>> = all.iter().map(|kept| kept.keys.as_ref()).collect();
        let prior: Option<Vec<&AppendBuffer>> = all.iter().map(|kept| kept.prior.as_ref()).collect();
        Ok(Self {
            keys: keys.map(|keys| KeyCache::stack(&keys)).transpose()?,
            prior: prior.map(|prior| AppendBuffer::stack(&prior)).transpose()?,
        })
    }
}
