//! The flip-flop language (Liu et al., exposing attention glitches, arXiv 2306.00946).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Preset, Task, Test, no_answers};

/// The tokens: the bits 0 and 1, then the instructions.
const WRITE: u32 = 2;
const READ: u32 = 3;
const IGNORE_BIT: u32 = 4;

/// Positions of an example.
const LENGTH: usize = 512;

/// The probability of an instruction to ignore in training.
const TRAIN_IGNORE: f64 = 0.8;

/// Pairs of an instruction (write, read or ignore) and a bit. The bit after a read is that of the last write; it is the
/// answer. FFL(p) ignores with probability p; writes and reads share the rest. The first instruction writes, the last
/// one reads.
#[derive(Debug)]
pub struct FlipFlop;

fn example(ignore: f64, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<u32>) {
    let (mut tokens, mut answers) = (Vec::with_capacity(LENGTH), no_answers(LENGTH));
    let (pairs, mut memory) = (LENGTH / 2, 0);
    for pair in 0..pairs {
        let instruction = match pair {
            0 => WRITE,
            last if last == pairs - 1 => READ,
            _ if rng.random_bool(ignore) => IGNORE_BIT,
            _ if rng.random_bool(0.5) => WRITE,
            _ => READ,
        };
        let bit = if instruction == READ { memory } else { rng.random_range(0..2) };
        match instruction {
            WRITE => memory = bit,
            READ => answers[2 * pair] = bit,
            _ => {}
        }
        tokens.extend([instruction, bit]);
    }
    (tokens, answers)
}

fn examples(ignore: f64, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
    Examples::of_tokens(rows, || example(ignore, rng))
}

impl Task for FlipFlop {
    fn name(&self) -> &'static str {
        "flip-flop"
    }

    fn about(&self) -> &'static str {
        "FFL(0.8) of 512 tokens: the bit of the last write; tested on FFL(0.98) and FFL(0.1) (Liu et al., arXiv 2306.00946)"
    }

    fn preset(&self) -> Preset {
        Preset {
            vocabulary: 5,
            hidden: 64,
            layers: 2,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: LENGTH,
            rotary: true,
            induction_heads: 0,
            beacon: true,
            steps: 1000,
            tokens: 4 * LENGTH,
            lr: 3e-3,
            weight_decay: 0.1,
        }
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        examples(TRAIN_IGNORE, tokens / LENGTH, rng)
    }

    fn tests(&self) -> Vec<Test> {
        // Reads of an example are about (1 - p) / 2 of its 256 pairs; about 10^5 in all.
        let test = |ignore: f64, examples| Test {
            name: format!("FFL({ignore})"),
            size: ignore,
            length: LENGTH,
            examples,
        };
        vec![test(0.1, 900), test(0.8, 400), test(0.98, 2000)]
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        examples(test.size, rows, rng)
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn reads_repeat_the_last_write_and_instructions_have_their_rates() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (mut ignored, mut reads) = (0, 0);
        for _ in 0..100 {
            let (tokens, answers) = example(0.8, &mut rng);
            assert_eq!((tokens.len(), tokens[0], tokens[LENGTH - 2]), (LENGTH, WRITE, READ));
            let mut last = None;
            for (pair, answers) in tokens.chunks(2).zip(answers.chunks(2)) {
                assert!(pair[0] >= WRITE && pair[1] < 2 && answers[1] == IGNORE);
                if pair[0] == READ {
                    assert_eq!((Some(pair[1]), answers[0]), (last, pair[1]));
                    reads += 1;
                } else {
                    assert_eq!(answers[0], IGNORE);
                }
                last = if pair[0] == WRITE { Some(pair[1]) } else { last };
                ignored += usize::from(pair[0] == IGNORE_BIT);
            }
        }
        let share = ignored as f64 / 25_400.0;
        assert!((share - 0.8).abs() < 0.01 && (2300..3000).contains(&reads), "{share} {reads}");
    }
}
