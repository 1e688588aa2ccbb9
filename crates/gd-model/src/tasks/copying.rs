//! Tasks that write a string again: copying (Jelassi et al., repeat after me, arXiv 2402.01032), its reverse, sorting, and
//! selective copying (Gu and Dao, Mamba, arXiv 2312.00752).

use rand::RngExt;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Preset, Task, Test, no_answers};

/// What is written after the separator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// The string.
    Same,
    /// The string backwards.
    Reverse,
    /// Its letters in ascending order.
    Sorted,
    /// The letters that stand among noise, in their order.
    Selected,
}

/// A string of random letters and a separator; then the model writes the letters in some order. Each of them is an
/// answer, given the correct ones before it.
#[derive(Debug)]
pub struct Copying {
    name: &'static str,
    about: &'static str,
    order: Order,
    /// Letters of the alphabet.
    letters: usize,
    /// The string's length in training.
    train: (usize, usize),
    tests: &'static [usize],
}

/// Letters in a string of selective copying; the rest is noise.
const SELECTED: usize = 16;

/// Lengths of the tests of copying, its reverse and sorting.
const LENGTHS: &[usize] = &[16, 32, 64, 128, 256];

impl Copying {
    /// Copies a string.
    pub const COPY: Self = Self {
        name: "copy",
        about: "copy a string of 1 to 32 of 26 letters, tested to 256 (Jelassi et al., arXiv 2402.01032)",
        order: Order::Same,
        letters: 26,
        train: (1, 32),
        tests: LENGTHS,
    };

    /// Writes a string backwards.
    pub const REVERSE: Self = Self {
        name: "reverse",
        about: "write a string of 1 to 32 of 26 letters backwards, tested to 256",
        order: Order::Reverse,
        ..Self::COPY
    };

    /// Sorts the letters of a string.
    pub const SORT: Self = Self {
        name: "sort",
        about: "write the letters of a string of 1 to 32 in ascending order, 64 letters, tested to 256",
        order: Order::Sorted,
        letters: 64,
        ..Self::COPY
    };

    /// Copies the letters that stand among noise.
    pub const SELECTIVE: Self = Self {
        name: "selective-copy",
        about: "copy 16 letters that stand among noise, 256 positions, tested to 4096 (Gu and Dao, arXiv 2312.00752)",
        order: Order::Selected,
        letters: 16,
        train: (256, 256),
        tests: &[64, 256, 1024, 4096],
    };

    /// The token that ends the string; letters are 0 to `letters` - 1.
    fn separator(&self) -> u32 {
        self.letters as u32
    }

    /// The token of noise.
    fn noise(&self) -> u32 {
        self.separator() + 1
    }

    /// The letters that an example with a string of this length ends with.
    fn written(&self, length: usize) -> usize {
        if self.order == Order::Selected { SELECTED } else { length }
    }

    /// The positions of an example: the last letter is an answer only.
    fn positions(&self, length: usize) -> usize {
        length + self.written(length)
    }

    fn example(&self, length: usize, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<u32>) {
        let mut letter = |_| rng.random_range(0..self.letters as u32);
        let mut output: Vec<u32> = (0..self.written(length)).map(&mut letter).collect();
        let mut tokens = output.clone();
        match self.order {
            Order::Same => {}
            Order::Reverse => output.reverse(),
            Order::Sorted => output.sort_unstable(),
            Order::Selected => {
                let mut places = sample(rng, length, SELECTED).into_vec();
                places.sort_unstable();
                tokens = vec![self.noise(); length];
                places.into_iter().zip(&output).for_each(|(at, &letter)| tokens[at] = letter);
            }
        }
        let mut answers = no_answers(length);
        tokens.push(self.separator());
        tokens.extend(&output[..output.len() - 1]);
        answers.extend(output);
        (tokens, answers)
    }

    fn examples(&self, rows: usize, length: usize, rng: &mut ChaCha8Rng) -> Examples {
        Examples::of_tokens(rows, || self.example(length, rng))
    }
}

impl Task for Copying {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn preset(&self) -> Preset {
        let longest = self.tests.iter().copied().max().unwrap_or(1);
        Preset {
            vocabulary: self.letters + 2,
            hidden: 64,
            layers: 2,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: self.positions(longest),
            rotary: true,
            induction_heads: 2,
            beacon: true,
            steps: 2000,
            tokens: 1024,
            lr: 3e-3,
            weight_decay: 0.1,
        }
    }

    fn writes_a_string(&self) -> bool {
        true
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        let length = rng.random_range(self.train.0..=self.train.1);
        self.examples(tokens / self.positions(length), length, rng)
    }

    fn tests(&self) -> Vec<Test> {
        let examples = |n| 4096 / self.written(n);
        Test::of_sizes(self.tests, "letters", |n| self.positions(n), examples)
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        self.examples(rows, test.size as usize, rng)
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    /// The string, what is read after the separator, and the answers.
    fn parts(task: &Copying, length: usize) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
        let (mut tokens, mut answers) = task.example(length, &mut ChaCha8Rng::seed_from_u64(5));
        assert_eq!((tokens.len(), answers.len()), (task.positions(length), task.positions(length)));
        assert_eq!(tokens[length], task.separator());
        let given = tokens.split_off(length + 1);
        tokens.truncate(length);
        let asked = answers.split_off(length);
        assert!(answers.iter().all(|&a| a == IGNORE));
        assert_eq!(asked[..asked.len() - 1], given[..], "each letter is given after it was asked for");
        (tokens, given, asked)
    }

    #[test]
    fn answers_are_the_string_its_reverse_or_its_letters_in_order() {
        let (string, _, asked) = parts(&Copying::COPY, 20);
        assert_eq!(asked, string);
        let (mut string, _, asked) = parts(&Copying::REVERSE, 20);
        string.reverse();
        assert_eq!(asked, string);
        let (mut string, _, asked) = parts(&Copying::SORT, 20);
        string.sort_unstable();
        assert_eq!(asked, string);
    }

    #[test]
    fn selective_copying_drops_the_noise() {
        let task = &Copying::SELECTIVE;
        let (string, _, asked) = parts(task, 256);
        let letters: Vec<u32> = string.iter().copied().filter(|&t| t != task.noise()).collect();
        assert_eq!((letters.len(), &letters), (SELECTED, &asked));
        assert!(letters.iter().all(|&t| t < 16));
    }
}
