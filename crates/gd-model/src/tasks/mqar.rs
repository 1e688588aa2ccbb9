//! Multi-query associative recall (Arora et al., Zoology, arXiv 2312.04927).

use rand::RngExt;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Preset, Task, Test, no_answers};

/// The exponent of the power law of the distances between the pairs and their queries.
const POWER: f64 = 0.01;

/// n pairs of a key and a value, then every key once more among random tokens; the answer after a repeated key is its
/// value. Keys differ within an example. As in Zoology, the pairs take the first 2 n positions, and the queries stand at
/// even distances from them that follow a power law.
#[derive(Debug)]
pub struct Mqar {
    name: &'static str,
    about: &'static str,
    /// Tokens that are keys, from 1 on; 0 is no key.
    keys: usize,
    /// Tokens that are values, after the keys.
    values: usize,
    /// Pairs and positions of the training examples.
    train: &'static [(usize, usize)],
    preset: Preset,
}

/// Pairs of the tests, in examples of four positions a pair.
const TEST_PAIRS: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// Answers of a test, about.
const TEST_ANSWERS: usize = 2048;

impl Mqar {
    /// 512 keys and 128 values, trained on 4 to 16 pairs.
    pub const SMALL: Self = Self {
        name: "mqar-small",
        about: "associative recall of 4 to 16 of 512 keys, tested to 256 pairs (after Arora et al., arXiv 2312.04927)",
        keys: 512,
        values: 128,
        train: &[(4, 16), (8, 32), (16, 64)],
        preset: Preset {
            vocabulary: 1 + 512 + 128,
            hidden: 64,
            layers: 2,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: 1024,
            rotary: true,
            induction_heads: 2,
            beacon: true,
            steps: 600,
            tokens: 1024,
            lr: 3e-3,
            weight_decay: 0.1,
        },
    };

    /// The sizes of Zoology: a vocabulary of 8192, trained on 4 to 64 pairs in 64 to 256 positions.
    pub const ZOOLOGY: Self = Self {
        name: "mqar",
        about: "associative recall with 8192 tokens, trained on 4 to 64 pairs, tested to 256 (Arora et al., arXiv \
                2312.04927)",
        keys: 4095,
        values: 4096,
        train: &[(4, 64), (8, 64), (16, 64), (16, 128), (32, 128), (32, 256), (64, 256)],
        preset: Preset {
            vocabulary: 8192,
            hidden: 128,
            layers: 2,
            heads: 4,
            head_dim: 32,
            feed_forward: 256,
            positions: 1024,
            rotary: true,
            induction_heads: 2,
            beacon: true,
            steps: 2000,
            tokens: 2048,
            lr: 3e-3,
            weight_decay: 0.1,
        },
    };

    fn example(&self, pairs: usize, length: usize, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<u32>) {
        let keys: Vec<u32> = sample(rng, self.keys, pairs).into_iter().map(|k| 1 + k as u32).collect();
        let first_value = 1 + self.keys;
        let values: Vec<u32> = match pairs <= self.values {
            true => sample(rng, self.values, pairs).into_iter().map(|v| (first_value + v) as u32).collect(),
            false => {
                (0..pairs).map(|_| rng.random_range(first_value..first_value + self.values) as u32).collect()
            }
        };
        let mut tokens: Vec<u32> =
            (0..length).map(|_| rng.random_range(0..self.preset.vocabulary) as u32).collect();
        let mut answers = no_answers(length);
        for (i, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            (tokens[2 * i], tokens[2 * i + 1]) = (key, value);
        }
        let places = places(pairs, (length - 2 * pairs) / 2, rng);
        for (place, (&key, &value)) in places.into_iter().zip(keys.iter().zip(&values)) {
            let at = 2 * (pairs + place);
            (tokens[at], answers[at]) = (key, value);
        }
        (tokens, answers)
    }

    fn examples(&self, rows: usize, pairs: usize, length: usize, rng: &mut ChaCha8Rng) -> Examples {
        Examples::of_tokens(rows, || self.example(pairs, length, rng))
    }
}

/// `count` different numbers below `space`, drawn one after the other with weights `POWER (x + 1)^(POWER - 1)`.
fn places(count: usize, space: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    if count == space {
        let mut all: Vec<usize> = (0..space).collect();
        all.shuffle(rng);
        return all;
    }
    // Exponential clocks: the first `count` to ring are a weighted sample without replacement.
    let mut clocks: Vec<(f64, usize)> = (0..space)
        .map(|x| {
            let weight = ((x + 1) as f64).powf(POWER - 1.0);
            (-(1.0 - rng.random::<f64>()).ln() / weight, x)
        })
        .collect();
    clocks.sort_by(|a, b| a.0.total_cmp(&b.0));
    clocks.into_iter().take(count).map(|(_, x)| x).collect()
}

impl Task for Mqar {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn preset(&self) -> Preset {
        self.preset.clone()
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        let (pairs, length) = self.train[rng.random_range(0..self.train.len())];
        self.examples(tokens / length, pairs, length, rng)
    }

    fn tests(&self) -> Vec<Test> {
        Test::of_sizes(&TEST_PAIRS, "pairs", |n| 4 * n, |n| TEST_ANSWERS / n)
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        self.examples(rows, test.length / 4, test.length, rng)
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn every_key_is_asked_for_once_and_its_answer_is_its_value() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (task, pairs, length) in
            [(&Mqar::SMALL, 16, 64), (&Mqar::SMALL, 256, 1024), (&Mqar::ZOOLOGY, 8, 64)]
        {
            let (tokens, answers) = task.example(pairs, length, &mut rng);
            let mut keys: Vec<u32> = (0..pairs).map(|i| tokens[2 * i]).collect();
            let asked: Vec<usize> = (0..length).filter(|&at| answers[at] != IGNORE).collect();
            assert_eq!(asked.len(), pairs);
            assert!(asked.iter().all(|at| at % 2 == 0 && *at >= 2 * pairs));
            for at in asked {
                let pair = keys.iter().position(|&key| key == tokens[at]).unwrap();
                assert_eq!(answers[at], tokens[2 * pair + 1]);
                assert!((1 + task.keys..1 + task.keys + task.values).contains(&(answers[at] as usize)));
            }
            keys.sort_unstable();
            keys.dedup();
            assert_eq!(keys.len(), pairs, "keys differ");
            assert!(keys.iter().all(|&key| (1..=task.keys as u32).contains(&key)));
        }
    }

    #[test]
    fn queries_are_more_often_near_than_far() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut near = 0;
        for _ in 0..200 {
            near += places(4, 24, &mut rng).into_iter().filter(|x| *x < 12).count();
        }
        // By weights of about 1 / (x + 1): more than three quarters of the first draws; uniform would be 400.
        assert!(near > 500, "{near} of 800");
    }
}
