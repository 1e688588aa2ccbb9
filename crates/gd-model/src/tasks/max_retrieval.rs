//! Max retrieval (Veličković et al., softmax is not enough, arXiv 2410.01104).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Inputs, Preset, Task, Test, no_answers};

/// The number of classes.
const CLASSES: usize = 10;

/// Items in the training examples, at most.
const TRAIN_ITEMS: usize = 16;

/// Features of an item: its priority, its class, and whether it is the query.
const FEATURES: usize = 1 + CLASSES + 1;

/// n items with a priority in [0, 1) and a class each, then a query: the answer is the class of the item of greatest
/// priority. Items have features instead of tokens, and no positions.
#[derive(Debug)]
pub struct MaxRetrieval;

/// `rows` examples of `items` items.
fn examples(rows: usize, items: usize, rng: &mut ChaCha8Rng) -> Examples {
    let length = items + 1;
    let (mut features, mut answers) = (Vec::with_capacity(rows * length * FEATURES), Vec::new());
    for _ in 0..rows {
        let mut greatest = (-1.0, 0);
        for _ in 0..items {
            let (priority, class) = (rng.random::<f32>(), rng.random_range(0..CLASSES));
            let mut item = [0f32; FEATURES];
            (item[0], item[1 + class]) = (priority, 1.0);
            features.extend(item);
            greatest = if priority > greatest.0 { (priority, class) } else { greatest };
        }
        let mut query = [0f32; FEATURES];
        query[FEATURES - 1] = 1.0;
        features.extend(query);
        answers.extend(no_answers(items));
        answers.push(greatest.1 as u32);
    }
    Examples { rows, length, inputs: Inputs::Features(features), answers }
}

impl Task for MaxRetrieval {
    fn name(&self) -> &'static str {
        "max-retrieval"
    }

    fn about(&self) -> &'static str {
        "the class of the item of greatest priority among 1 to 16, tested to 4096 (Velickovic et al., arXiv 2410.01104)"
    }

    fn preset(&self) -> Preset {
        Preset {
            vocabulary: CLASSES,
            hidden: 64,
            layers: 1,
            heads: 1,
            head_dim: 64,
            feed_forward: 64,
            positions: 4097,
            rotary: false,
            induction_heads: 0,
            beacon: false,
            steps: 2500,
            tokens: 1024,
            lr: 3e-3,
            weight_decay: 1e-3,
        }
    }

    fn features(&self) -> Option<usize> {
        Some(FEATURES)
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        let items = rng.random_range(1..=TRAIN_ITEMS);
        // As many answers for every size: the mean number of items is half of the greatest.
        examples((tokens / (TRAIN_ITEMS / 2)).max(1), items, rng)
    }

    fn tests(&self) -> Vec<Test> {
        Test::of_sizes(&[16, 64, 256, 1024, 4096], "items", |n| n + 1, |n| ((1 << 20) / n).min(1024))
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        examples(rows, test.length - 1, rng)
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_answer_is_the_class_of_the_greatest_priority() {
        let made = examples(5, 9, &mut ChaCha8Rng::seed_from_u64(3));
        let Inputs::Features(features) = &made.inputs else { panic!("features") };
        assert_eq!(features.len(), 5 * 10 * FEATURES);
        for (row, answers) in features.chunks(10 * FEATURES).zip(made.answers.chunks(10)) {
            let items: Vec<&[f32]> = row.chunks(FEATURES).collect();
            let greatest = items[..9].iter().max_by(|a, b| a[0].total_cmp(&b[0])).unwrap();
            assert_eq!(greatest[1 + answers[9] as usize], 1.0);
            assert!(answers[..9].iter().all(|&a| a == IGNORE));
            assert!(
                items[..9]
                    .iter()
                    .all(|item| item[1..].iter().sum::<f32>() == 1.0 && item[FEATURES - 1] == 0.0)
            );
            assert_eq!((items[9][FEATURES - 1], items[9].iter().sum::<f32>()), (1.0, 1.0));
        }
    }
}
