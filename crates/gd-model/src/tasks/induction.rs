//! Induction heads (Olsson et al., arXiv 2209.11895; as a task by Gu and Dao, Mamba, arXiv 2312.00752).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Preset, Task, Test, no_answers};

/// Tokens besides the special one.
const TOKENS: u32 = 15;

/// Positions in training.
const TRAIN_LENGTH: usize = 256;

/// Random tokens, among them a special token once; the last token is the special one again, and the answer is the token
/// that followed it the first time.
#[derive(Debug)]
pub struct InductionHeads;

fn example(length: usize, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<u32>) {
    let mut tokens: Vec<u32> = (0..length).map(|_| rng.random_range(0..TOKENS)).collect();
    let at = rng.random_range(0..length - 2);
    (tokens[at], tokens[length - 1]) = (TOKENS, TOKENS);
    let mut answers = no_answers(length);
    answers[length - 1] = tokens[at + 1];
    (tokens, answers)
}

impl Task for InductionHeads {
    fn name(&self) -> &'static str {
        "induction"
    }

    fn about(&self) -> &'static str {
        "the token after the only earlier special token, 256 positions, tested to 65536 (Gu and Dao, arXiv 2312.00752)"
    }

    fn preset(&self) -> Preset {
        Preset {
            vocabulary: TOKENS as usize + 1,
            hidden: 64,
            layers: 2,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: 1 << 16,
            rotary: false,
            induction_heads: 2,
            beacon: true,
            steps: 2000,
            tokens: 8 * TRAIN_LENGTH,
            lr: 3e-3,
            weight_decay: 0.1,
        }
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        Examples::of_tokens(tokens / TRAIN_LENGTH, || example(TRAIN_LENGTH, rng))
    }

    fn tests(&self) -> Vec<Test> {
        let lengths = [64, 256, 1024, 4096, 16384, 65536];
        Test::of_sizes(&lengths, "tokens", |n| n, |n: usize| ((1usize << 20) / n).clamp(8, 512))
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        Examples::of_tokens(rows, || example(test.length, rng))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_special_token_stands_twice_and_the_answer_followed_it() {
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        for length in [4, 64, 256] {
            let (tokens, answers) = example(length, &mut rng);
            let special: Vec<usize> = (0..length).filter(|&at| tokens[at] == TOKENS).collect();
            assert_eq!((special.len(), special[1]), (2, length - 1));
            assert_eq!(answers[length - 1], tokens[special[0] + 1]);
            assert!(answers[length - 1] < TOKENS);
        }
    }
}
