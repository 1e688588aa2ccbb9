//! The share of key-query pairs that a certified scan scored in full precision.

use candle_core::Tensor;

use crate::error::Result;

/// The share of all visible (query, key) pairs that a scan scored in full precision: 1 unless the scan was certified.
#[derive(Debug, Clone)]
pub struct Rescored(Source);

#[derive(Debug, Clone)]
enum Source {
    Share(f64),
    /// Scored and visible keys of every query, u32 `[B, Hq, N, 2]`, on a GPU.
    #[cfg_attr(not(any(feature = "gpu", test)), allow(dead_code))] // counted on a GPU
    Counts(Tensor),
}

impl Rescored {
    /// Every pair, as in a native scan.
    pub const ALL: Self = Self(Source::Share(1.0));

    pub(crate) fn from_share(share: f64) -> Self {
        Self(Source::Share(share))
    }

    #[cfg(any(feature = "gpu", test))]
    pub(crate) fn from_counts(counts: Tensor) -> Self {
        Self(Source::Counts(counts))
    }

    /// The share, in [0, 1]; 1 where no key is visible. For a scan on a GPU this waits for the device.
    ///
    /// # Errors
    /// An earlier launch that failed, or a failed copy to the host.
    pub fn share(&self) -> Result<f64> {
        let counts = match &self.0 {
            Source::Share(share) => return Ok(*share),
            Source::Counts(counts) => counts.flatten_all()?.to_vec1::<u32>()?,
        };
        let (mut scored, mut visible) = (0u64, 0u64);
        for row in counts.chunks_exact(2) {
            scored += u64::from(row[0]);
            visible += u64::from(row[1]);
        }
        Ok(if visible == 0 { 1.0 } else { scored as f64 / visible as f64 })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn shares_are_those_of_all_pairs() -> Result<()> {
        let counts = |rows: &[u32]| -> Result<f64> {
            let t = Tensor::from_vec(rows.to_vec(), (1, 1, rows.len() / 2, 2), &Device::Cpu)?;
            Rescored::from_counts(t).share()
        };
        assert_eq!(counts(&[1, 4, 2, 8])?, 0.25);
        // The sums exceed 32 bits.
        assert_eq!(
            counts(&[1 << 31, u32::MAX, 1 << 31, u32::MAX])?,
            (1u64 << 31) as f64 / f64::from(u32::MAX)
        );
        assert_eq!(counts(&[0, 0])?, 1.0);
        assert_eq!(Rescored::from_share(0.5).share()?, 0.5);
        assert_eq!(Rescored::ALL.share()?, 1.0);
        Ok(())
    }
}
