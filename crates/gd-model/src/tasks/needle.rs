//! A needle in text: a fact among sentences, and a question for it at the end (Kamradt 2023, as a task for models that are
//! trained on it).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Preset, Task, Test, no_answers};

/// Positions in training.
const TRAIN_LENGTH: usize = 256;

/// The fact: ` The code of KEY is VALUE.` with four letters and four digits.
const FACT: [&str; 3] = [" The code of ", " is ", "."];
/// The question, before the digits.
const QUESTION: [&str; 2] = [" What is the code of ", "? "];
/// Letters of a key, and digits of a value.
const CHARACTERS: usize = 4;

/// Words of the sentences around the fact.
const WORDS: &[&str] = &[
    "the",
    "a",
    "old",
    "small",
    "river",
    "house",
    "garden",
    "letter",
    "winter",
    "morning",
    "road",
    "friend",
    "window",
    "walks",
    "sees",
    "writes",
    "opens",
    "finds",
    "leaves",
    "remembers",
    "to",
    "of",
    "with",
    "under",
    "near",
    "and",
    "before",
    "after",
    "quietly",
    "again",
    "slowly",
    "today",
];

/// Bytes of random sentences with one fact among them, then a question for it: the answers are the digits. All keys and
/// values are random, so that nothing but the fact gives them.
#[derive(Debug)]
pub struct Needle;

/// `length` bytes of random sentences.
fn sentences(length: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut text = String::new();
    while text.len() < length {
        let words = rng.random_range(4..12);
        for word in 0..words {
            let next = WORDS[rng.random_range(0..WORDS.len())];
            match word {
                0 => text.push_str(&format!(" {}{}", next[..1].to_uppercase(), &next[1..])),
                _ => text.push_str(&format!(" {next}")),
            }
        }
        text.push('.');
    }
    text.as_bytes()[..length].to_vec()
}

fn example(length: usize, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<u32>) {
    let key: String = (0..CHARACTERS).map(|_| char::from(rng.random_range(b'A'..=b'Z'))).collect();
    let value: String = (0..CHARACTERS).map(|_| char::from(rng.random_range(b'0'..=b'9'))).collect();
    let fact = format!("{}{key}{}{value}{}", FACT[0], FACT[1], FACT[2]);
    let question = format!("{}{key}{}", QUESTION[0], QUESTION[1]);
    // The last digit is an answer only.
    let rest = length + 1 - fact.len() - question.len() - CHARACTERS;
    let before = rng.random_range(0..=rest);
    let mut text = sentences(before, rng);
    text.extend(fact.bytes());
    text.extend(sentences(rest - before, rng));
    text.extend(question.bytes());
    text.extend(value.bytes());
    let mut answers = no_answers(length);
    for digit in 0..CHARACTERS {
        let at = length + 1 - CHARACTERS + digit;
        answers[at - 1] = u32::from(text[at]);
    }
    text.pop();
    (text.into_iter().map(u32::from).collect(), answers)
}

impl Task for Needle {
    fn name(&self) -> &'static str {
        "needle"
    }

    fn about(&self) -> &'static str {
        "the digits of a fact among random sentences, 256 bytes, tested to 4096"
    }

    fn preset(&self) -> Preset {
        Preset {
            vocabulary: 256,
            hidden: 64,
            layers: 3,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: 4096,
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
        let examples = |n: usize| ((1usize << 18) / n).clamp(64, 512);
        Test::of_sizes(&[256, 512, 1024, 2048, 4096], "bytes", |n| n, examples)
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        Examples::of_tokens(rows, || example(test.length, rng))
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_answers_are_the_digits_of_the_fact_that_is_asked_for() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for length in [128, 256, 1000] {
            let (tokens, answers) = example(length, &mut rng);
            assert_eq!((tokens.len(), answers.len()), (length, length));
            let text: String = tokens.iter().map(|&t| char::from(t as u8)).collect();
            let (_, after) = text.split_once(FACT[0]).unwrap();
            let (key, value) = (&after[..4], &after[8..12]);
            assert!(text[..length - 3].ends_with(&format!("{}{key}{}", QUESTION[0], QUESTION[1])), "{text}");
            assert!(text.ends_with(&value[..3]));
            let asked: String =
                answers.iter().filter(|a| **a != IGNORE).map(|&a| char::from(a as u8)).collect();
            assert_eq!(asked, value);
            assert!(answers[length - 4] != IGNORE && answers[length - 5] == IGNORE);
        }
    }
}
