//! How much of a certified scan was scored in full precision.

use candle_core::Tensor;

use crate::error::Result;

/// Of all visible (query, key) pairs the share that a scan scored in full precision: 1 unless it was certified.
#[derive(Debug, Clone)]
pub struct Rescored(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Share(f64),
    /// Scored and visible keys of every query, u32 `[B, Hq, N, 2]`, on a GPU.
    Counts(Tensor),
}

impl Rescored {
    /// Every pair, as a native scan does.
    pub const ALL: Self = Self(Kind::Share(1.0));

    pub(crate) fn known(share: f64) -> Self {
        Self(Kind::Share(share))
    }

    #[cfg_attr(not(any(feature = "cuda", feature = "metal", test)), allow(dead_code))]
    pub(crate) fn counted(counts: Tensor) -> Self {
        Self(Kind::Counts(counts))
    }

    /// The share, 1 where no key is visible. Of a scan on a GPU this waits for the device.
    ///
    /// # Errors
    /// A launch before that failed, or a copy to the host.
    pub fn share(&self) -> Result<f64> {
        let counts = match &self.0 {
            Kind::Share(share) => return Ok(*share),
            Kind::Counts(counts) => counts.flatten_all()?.to_vec1::<u32>()?,
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
            Rescored::counted(t).share()
        };
        assert_eq!(counts(&[1, 4, 2, 8])?, 0.25);
        // More than 32 bits hold.
        assert_eq!(
            counts(&[1 << 31, u32::MAX, 1 << 31, u32::MAX])?,
            (1u64 << 31) as f64 / f64::from(u32::MAX)
        );
        assert_eq!(counts(&[0, 0])?, 1.0);
        assert_eq!(Rescored::known(0.5).share()?, 0.5);
        assert_eq!(Rescored::ALL.share()?, 1.0);
        Ok(())
    }
}
