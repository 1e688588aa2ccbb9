//! Log-probabilities of tokens.

/// The log-probability of a token and those of the most probable tokens at its position, in nats. They are those of the
/// model: without temperature, penalties and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f64,
    /// The most probable tokens with their log-probabilities, in descending order; equal ones by their ids.
    pub top: Vec<(u32, f64)>,
}

impl TokenLogprobs {
    /// The log-probabilities of `token` and of the `count` most probable tokens, from logits `[V]`: log softmax in f64. A
    /// token without a logit has −∞.
    ///
    /// ```
    /// use gd_model::infer::logprobs::TokenLogprobs;
    ///
    /// let half = TokenLogprobs::new(&[0.0, 0.0, f32::NEG_INFINITY], 1, 1);
    /// assert_eq!((half.logprob, half.top), (-(2f64.ln()), vec![(0, -(2f64.ln()))]));
    /// ```
    pub fn new(logits: &[f32], token: u32, count: usize) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| (f64::from(*x) - f64::from(max)).exp()).sum();
        let logprob = |x: f32| f64::from(x) - f64::from(max) - sum.ln();
        let mut ids: Vec<u32> = (0..).take(logits.len()).collect();
        let at = |id: u32| logits[id as usize];
        let order = |a: &u32, b: &u32| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
        let count = count.min(ids.len());
        if count > 0 {
            // A full sort of a vocabulary would cost more than a step of a small model.
            ids.select_nth_unstable_by(count - 1, order);
        }
        ids.truncate(count);
        ids.sort_by(order);
        Self {
            token,
            logprob: logits.get(token as usize).copied().map_or(f64::NEG_INFINITY, logprob),
            top: ids.into_iter().map(|id| (id, logprob(at(id)))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_log_softmax_in_descending_order() {
        let logits = [1.0, 3.0, -2.0, 3.0, 0.5];
        let all = TokenLogprobs::new(&logits, 2, 9);
        let total: f64 = all.top.iter().map(|(_, p)| p.exp()).sum();
        assert!((total - 1.0).abs() <= 1e-12, "{total}");
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 0, 4, 2]);
        assert_eq!(all.logprob, all.top[4].1);
        assert!((all.top[0].1 - all.top[2].1 - 2.0).abs() <= 1e-12, "{all:?}");
        assert_eq!(TokenLogprobs::new(&logits, 1, 2).top, all.top[..2]);
        assert_eq!(TokenLogprobs::new(&logits, 1, 0).top, []);
        assert_eq!(TokenLogprobs::new(&logits, 5, 0).logprob, f64::NEG_INFINITY);
        // Logits that exceed the range of `exp`.
        assert_eq!(TokenLogprobs::new(&[2000.0, -2000.0], 0, 1).logprob, 0.0);
    }
}
