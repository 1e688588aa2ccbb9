//! Sampling of the next token from logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// The temperature where nothing states one.
pub const DEFAULT_TEMPERATURE: f64 = 0.8;

/// Sampling parameters. They apply in this order: repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Divides the logits; at least 0. With 0, the token of the highest logit is taken, the first one if several are equal.
    pub temperature: f64,
    /// Restricts sampling to the k most probable tokens; at least 1.
    pub top_k: Option<usize>,
    /// Restricts sampling to the smallest set of most probable tokens whose total probability is at least this; in (0, 1].
    pub top_p: Option<f64>,
    /// Restricts sampling to tokens whose probability is at least this fraction of the highest one; in \[0, 1\].
    pub min_p: Option<f64>,
    /// Divides the positive and multiplies the negative logits of tokens that have occurred; greater than 0. With 1, logits
    /// do not change.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// The sampling that `generation_config.json` states, with [`DEFAULT_TEMPERATURE`] and no filters where it states
    /// nothing. `do_sample: false` is temperature 0, and `top_k: 0` is no filter, as in `transformers`.
    ///
    /// # Errors
    /// Names a value that is not a number or out of range.
    pub fn from_generation_config(config: &Value) -> Result<Self> {
        let number = |name: &str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                Error::Invalid(format!("generation_config.json: {name} is {value}, not a number"))
            }),
        };
        let greedy = config.get("do_sample").is_some_and(|value| *value == Value::Bool(false));
        let temperature = number("temperature")?.unwrap_or(DEFAULT_TEMPERATURE);
        let top_k = number("top_k")?.filter(|k| *k > 0.0);
        let sampling = Self {
            temperature: if greedy { 0.0 } else { temperature },
            top_k: top_k.map(|k| k as usize),
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?.unwrap_or(1.0),
        };
        sampling.validate().map_err(|e| Error::Invalid(format!("generation_config.json: {e}")))?;
        Ok(sampling)
    }

    /// Checks the ranges of all parameters.
    ///
    /// # Errors
    /// Names the first parameter that is out of range, with its value.
    pub fn validate(&self) -> Result<()> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty } = *self;
        let fail = |name: &str, allowed: &str, value: String| Err(Error::out_of_range(name, value, allowed));
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return fail("temperature", "finite and at least 0", temperature.to_string());
        }
        if top_k == Some(0) {
            return fail("top_k", "at least 1", "0".into());
        }
        if let Some(p) = top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return fail("top_p", "in (0, 1]", p.to_string());
        }
        if let Some(p) = min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return fail("min_p", "in [0, 1]", p.to_string());
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            return fail("repetition_penalty", "finite and above 0", repetition_penalty.to_string());
        }
        Ok(())
    }
}

/// Samples tokens. The same parameters, seed and logits give the same tokens.
///
/// ```
/// use gd_model::infer::sampler::{Sampler, Sampling};
///
/// let logits = [0.5, 2.0, -1.0];
/// let mut greedy = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0)?;
/// assert_eq!(greedy.next(&logits, &[])?, 1);
///
/// let mut sampler = Sampler::new(Sampling { top_k: Some(2), ..Sampling::default() }, 7)?;
/// assert_ne!(sampler.next(&logits, &[])?, 2);
/// # Ok::<(), gd_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Creates a sampler whose random numbers depend on `seed` only.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn new(sampling: Sampling, seed: u64) -> Result<Self> {
        sampling.validate()?;
        Ok(Self { sampling, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// Samples a token from `logits` `[V]`. `history` holds the tokens that the repetition penalty applies to. A logit of −∞
    /// excludes its token.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a logit of NaN or +∞, and if no logit is finite.
    pub fn next(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        if let Some(i) = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(Error::Invalid(format!("the logit of token {i} is {}", logits[i])));
        }
        let mut ranked: Vec<(u32, f64)> =
            self.penalized(logits, history).into_iter().zip(0..).map(|(x, i)| (i, x)).collect();
        ranked.retain(|(_, logit)| *logit > f64::NEG_INFINITY);
        let top = ranked.iter().copied().reduce(|a, b| if b.1 > a.1 { b } else { a });
        let Some((argmax, max_logit)) = top else {
            return Err(Error::Invalid(format!("none of the {} logits is finite", logits.len())));
        };
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        if temperature == 0.0 {
            return Ok(argmax);
        }
        // Weights relative to the most probable token, which has weight 1, so that `exp` does not overflow.
        for (_, x) in &mut ranked {
            *x = ((*x - max_logit) / temperature).exp();
        }
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if let Some(k) = top_k {
            ranked.truncate(k);
        }
        if let Some(p) = top_p {
            let threshold = p * ranked.iter().map(|(_, w)| w).sum::<f64>();
            let mut sum = 0.0;
            // The token that reaches the threshold belongs to the set.
            let reached = |(_, w): &(u32, f64)| {
                sum += w;
                sum >= threshold
            };
            let count = ranked.iter().position(reached).map_or(ranked.len(), |last| last + 1);
            ranked.truncate(count);
        }
        if let Some(p) = min_p {
            ranked.retain(|(_, w)| *w >= p);
        }
        let mut rest = self.rng.random::<f64>() * ranked.iter().map(|(_, w)| w).sum::<f64>();
        let sampled = ranked.iter().find(|(_, w)| {
            rest -= w;
            rest < 0.0
        });
        // Because of rounding, the rest may still be positive after the last token.
        Ok(sampled.or(ranked.last()).map_or(argmax, |(i, _)| *i))
    }

    /// The logits in f64, with the repetition penalty of the tokens in `history`.
    fn penalized(&self, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let penalty = self.sampling.repetition_penalty;
        if penalty != 1.0 {
            let mut penalized = vec![false; logits.len()];
            for &id in history {
                // A token is penalized once, regardless of how often it has occurred.
                if let Some(x) = logits.get_mut(id as usize).filter(|_| !penalized[id as usize]) {
                    *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
                    penalized[id as usize] = true;
                }
            }
        }
        logits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of times that each token is sampled in `n` samples.
    fn draws(sampling: Sampling, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling, 5).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sampler.next(logits, &[]).unwrap() as usize] += 1;
        }
        counts
    }

    fn logits(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn zero_temperature_takes_the_first_token_of_the_highest_logit() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(draws(greedy, &[1.0, 3.0, 3.0, 2.0], 10), [0, 10, 0, 0]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let row = logits(&[0.1, 0.6, 0.3, 0.0]);
        let counts = draws(Sampling::default(), &row, 20_000);
        // Four standard deviations are 280.
        for (count, expected) in counts.iter().zip([2_000, 12_000, 6_000, 0]) {
            assert!(count.abs_diff(expected) < 280, "{counts:?}");
        }
        assert_eq!(counts[3], 0);
        // Temperature ½ squares the odds: 0.01 : 0.36 : 0.09.
        let cool = draws(Sampling { temperature: 0.5, ..Sampling::default() }, &row, 20_000);
        for (count, expected) in cool.iter().zip([435, 15_652, 3_913, 0]) {
            assert!(count.abs_diff(expected) < 240, "{cool:?}");
        }
    }

    #[test]
    fn filters_restrict_the_sampled_tokens() {
        let row = logits(&[0.05, 0.4, 0.1, 0.3, 0.15]);
        let sampled = |sampling: Sampling| -> Vec<usize> {
            let counts = draws(sampling, &row, 2_000);
            (0..counts.len()).filter(|&i| counts[i] > 0).collect()
        };
        let base = Sampling::default();
        assert_eq!(sampled(base), [0, 1, 2, 3, 4]);
        assert_eq!(sampled(Sampling { top_k: Some(2), ..base }), [1, 3]);
        assert_eq!(sampled(Sampling { top_k: Some(99), ..base }), [0, 1, 2, 3, 4]);
        assert_eq!(sampled(Sampling { top_p: Some(0.72), ..base }), [1, 3, 4]);
        assert_eq!(sampled(Sampling { top_p: Some(0.68), ..base }), [1, 3]);
        assert_eq!(sampled(Sampling { top_p: Some(1e-9), ..base }), [1]);
        assert_eq!(sampled(Sampling { min_p: Some(0.3), ..base }), [1, 3, 4]);
        assert_eq!(sampled(Sampling { min_p: Some(1.0), ..base }), [1]);
        // Of equal logits, the first ones remain.
        let flat = draws(Sampling { top_k: Some(2), ..base }, &[0.0; 4], 100);
        assert!(flat[0] > 0 && flat[1] > 0 && flat[2..] == [0, 0], "{flat:?}");
    }

    #[test]
    fn repetition_penalty_lowers_either_sign_once() {
        let greedy = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..Sampling::default() };
        let mut sampler = Sampler::new(greedy, 0).unwrap();
        assert_eq!(sampler.next(&[4.0, 2.5, 1.0], &[]).unwrap(), 0);
        assert_eq!(sampler.next(&[4.0, 2.5, 1.0], &[0]).unwrap(), 1);
        assert_eq!(sampler.next(&[4.0, 1.5, 1.0], &[0, 0, 0]).unwrap(), 0);
        assert_eq!(sampler.next(&[-1.0, -1.5], &[0]).unwrap(), 1);
        assert_eq!(sampler.next(&[4.0, 2.5], &[99]).unwrap(), 0);
    }

    #[test]
    fn samples_depend_on_the_seed_only() {
        let row: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.3).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling::default(), seed).unwrap();
            (0..40).map(|_| sampler.next(&row, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_generation_config_gives_the_sampling() {
        let read = |text: &str| Sampling::from_generation_config(&serde_json::from_str(text).unwrap());
        let base = Sampling { temperature: DEFAULT_TEMPERATURE, ..Sampling::default() };
        assert_eq!(read("{}").unwrap(), base);
        let text = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": null,
                       "repetition_penalty": 1.1, "eos_token_id": 2}"#;
        let all = Sampling {
            temperature: 0.6,
            top_k: Some(20),
            top_p: Some(0.9),
            min_p: None,
            repetition_penalty: 1.1,
        };
        assert_eq!(read(text).unwrap(), all);
        let greedy = read(r#"{"do_sample": false, "temperature": 0.6, "top_k": 0}"#).unwrap();
        assert_eq!(greedy, Sampling { temperature: 0.0, ..base });
        for (text, names) in [
            (r#"{"top_p": "a"}"#, "top_p is \"a\""),
            (r#"{"temperature": -1}"#, "generation_config.json: temperature"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn invalid_parameters_and_logits_are_named() {
        let base = Sampling::default();
        let cases = [
            (Sampling { temperature: -0.5, ..base }, "temperature", "-0.5"),
            (Sampling { temperature: f64::NAN, ..base }, "temperature", "NaN"),
            (Sampling { top_k: Some(0), ..base }, "top_k", "0"),
            (Sampling { top_p: Some(0.0), ..base }, "top_p", "0"),
            (Sampling { top_p: Some(1.5), ..base }, "top_p", "1.5"),
            (Sampling { min_p: Some(-0.1), ..base }, "min_p", "-0.1"),
            (Sampling { repetition_penalty: 0.0, ..base }, "repetition_penalty", "0"),
        ];
        for (sampling, name, value) in cases {
            let error = Sampler::new(sampling, 0).unwrap_err().to_string();
            assert!(error.starts_with(name) && error.ends_with(&format!("not {value}")), "{error}");
        }
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(Sampling { temperature, ..base }, 0).unwrap();
            let error = |row: &[f32]| sampler.clone().next(row, &[]).unwrap_err().to_string();
            assert_eq!(error(&[0.0, f32::NAN]), "the logit of token 1 is NaN");
            assert_eq!(error(&[f32::INFINITY, 0.0]), "the logit of token 0 is inf");
            assert_eq!(error(&[f32::NEG_INFINITY; 3]), "none of the 3 logits is finite");
            assert_eq!(error(&[]), "none of the 0 logits is finite");
            assert_eq!(sampler.next(&[f32::NEG_INFINITY, -3e38], &[]).unwrap(), 1);
        }
    }
}
