//! Sequential function composition (Chen, Peng and Wu, arXiv 2412.02975), which separates stacks of full attention from
//! hybrids of linear and full attention (Ye et al., arXiv 2602.01763).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Examples, Inputs, Preset, Task, Test, no_answers};

/// Elements of the set that all functions map into itself.
const DOMAIN: usize = 16;

/// Functions that are composed, at most.
const MAX_FUNCTIONS: usize = 3;

/// Queries of an example.
const QUERIES: usize = 8;

/// Features of an item: how many functions are still to be applied, an argument, and a value.
const FEATURES: usize = (MAX_FUNCTIONS + 1) + 2 * DOMAIN;

/// Random functions f_1 .. f_L from a set of 16 elements into itself, each as a table with one item per argument,
/// then queries q; the answer to a query is f_L(.. f_1(q)).
///
/// The table of f_L stands first and that of f_1 last. No item of a table can therefore read the function that is applied
/// before it, and a decoder has to follow the functions one after the other from the query. L + 1 layers of full attention
/// can do that whatever the size of the set; hybrids with L - 1 layers of full attention and many linear ones cannot, if the
/// set is large for the width of the model.
///
/// The papers ask one query; the queries of an example share its functions.
#[derive(Debug)]
pub struct Composition;

/// An entry of a table: the function, the argument, the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    /// The functions that are to be applied from here on, with this one.
    left: usize,
    argument: usize,
    value: usize,
}

/// The functions of an example in the order in which they are applied, as the values of the arguments.
fn functions(count: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<usize>> {
    let mut table = || (0..DOMAIN).map(|_| rng.random_range(0..DOMAIN)).collect();
    (0..count).map(|_| table()).collect()
}

/// The entries of all tables, that of the last function first.
fn entries(functions: &[Vec<usize>]) -> impl Iterator<Item = Entry> {
    let count = functions.len();
    functions.iter().enumerate().rev().flat_map(move |(at, table)| {
        let entry = move |(argument, &value)| Entry { left: count - at, argument, value };
        table.iter().enumerate().map(entry)
    })
}

/// Positions of an example with this number of functions.
fn length(functions: usize) -> usize {
    functions * DOMAIN + QUERIES
}

/// `rows` examples of compositions of `count` functions.
fn examples(rows: usize, count: usize, rng: &mut ChaCha8Rng) -> Examples {
    let (mut features, mut answers) = (Vec::with_capacity(rows * length(count) * FEATURES), Vec::new());
    let [argument_at, value_at] = [MAX_FUNCTIONS + 1, MAX_FUNCTIONS + 1 + DOMAIN];
    for _ in 0..rows {
        let functions = functions(count, rng);
        for Entry { left, argument, value } in entries(&functions) {
            let mut item = [0f32; FEATURES];
            (item[left], item[argument_at + argument], item[value_at + value]) = (1.0, 1.0, 1.0);
            features.extend(item);
        }
        answers.extend(no_answers(count * DOMAIN));
        for _ in 0..QUERIES {
            let query = rng.random_range(0..DOMAIN);
            // A query is a value to which all functions are to be applied.
            let mut item = [0f32; FEATURES];
            (item[0], item[count], item[value_at + query]) = (1.0, 1.0, 1.0);
            features.extend(item);
            answers.push(functions.iter().fold(query, |x, function| function[x]) as u32);
        }
    }
    Examples { rows, length: length(count), inputs: Inputs::Features(features), answers }
}

impl Task for Composition {
    fn name(&self) -> &'static str {
        "composition"
    }

    fn about(&self) -> &'static str {
        "f_3(f_2(f_1(q))) of random functions whose tables are given (Ye et al., arXiv 2602.01763)"
    }

    fn preset(&self) -> Preset {
        Preset {
            vocabulary: DOMAIN,
            hidden: 64,
            layers: MAX_FUNCTIONS + 1,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: length(MAX_FUNCTIONS),
            rotary: false,
            induction_heads: 0,
            beacon: false,
            steps: 3000,
            tokens: 1024,
            lr: 3e-3,
            weight_decay: 1e-3,
        }
    }

    fn mechanisms(&self) -> Option<&'static [&'static str]> {
        Some(&["linear", "linear+softmax", "linear+gd", "softmax", "gd-bare"])
    }

    fn features(&self) -> Option<usize> {
        Some(FEATURES)
    }

    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples {
        // Compositions of fewer functions are learned first.
        let count = rng.random_range(1..=MAX_FUNCTIONS);
        examples((tokens / length(count)).max(1), count, rng)
    }

    fn tests(&self) -> Vec<Test> {
        let counts: Vec<usize> = (1..=MAX_FUNCTIONS).collect();
        Test::of_sizes(&counts, "functions", length, |_| 256)
    }

    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples {
        examples(rows, test.size as usize, rng)
    }
}

#[cfg(test)]
mod tests {
    use gd_kernels::cross_entropy::IGNORE;
    use rand::SeedableRng;

    use super::*;

    /// The place of the only 1 among features.
    fn one_of(features: &[f32]) -> Option<usize> {
        assert!(features.iter().all(|&x| x == 0.0 || x == 1.0) && features.iter().sum::<f32>() <= 1.0);
        features.iter().position(|&x| x == 1.0)
    }

    #[test]
    fn answers_follow_the_tables_from_the_last_to_the_first() {
        for count in 1..=MAX_FUNCTIONS {
            let made = examples(4, count, &mut ChaCha8Rng::seed_from_u64(count as u64));
            let Inputs::Features(features) = &made.inputs else { panic!("features") };
            assert_eq!(made.length, DOMAIN * count + QUERIES);
            let mut differs = 0;
            for (row, answers) in
                features.chunks(made.length * FEATURES).zip(made.answers.chunks(made.length))
            {
                let items: Vec<&[f32]> = row.chunks(FEATURES).collect();
                let (table, queries) = items.split_at(DOMAIN * count);
                assert!(answers[..table.len()].iter().all(|&a| a == IGNORE));
                let part =
                    |item: &[f32], at: usize| one_of(&item[MAX_FUNCTIONS + 1 + at * DOMAIN..][..DOMAIN]);
                // The table of the function that is applied with `left` functions to go stands `left`-th from the front.
                let apply = |left: usize, x: usize| {
                    let entry = table[(left - 1) * DOMAIN + x];
                    assert_eq!(one_of(&entry[..=MAX_FUNCTIONS]), Some(left));
                    assert_eq!(part(entry, 0), Some(x));
                    part(entry, 1).unwrap()
                };
                for (query, &answer) in queries.iter().zip(&answers[table.len()..]) {
                    assert_eq!((query[0], one_of(&query[1..=MAX_FUNCTIONS])), (1.0, Some(count - 1)));
                    assert_eq!(part(query, 0), None);
                    let start = part(query, 1).unwrap();
                    let end = (1..=count).rev().fold(start, |x, left| apply(left, x));
                    assert_eq!(answer as usize, end);
                    differs += usize::from(start != end);
                }
            }
            // A random function leaves one of 16 elements in its place.
            assert!(differs > 4 * QUERIES / 2, "{differs}");
        }
    }

    #[test]
    fn another_function_in_any_place_changes_answers() {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let [a, b] = [functions(3, &mut rng), functions(3, &mut rng)];
        let all = |f: &[Vec<usize>]| -> Vec<usize> {
            (0..DOMAIN).map(|q| f.iter().fold(q, |x, function| function[x])).collect()
        };
        for at in 0..3 {
            let mut other = a.clone();
            other[at] = b[at].clone();
            assert_ne!(all(&a), all(&other), "function {at}");
        }
        let order: Vec<usize> = entries(&a).map(|entry| entry.left).collect();
        assert!(order.is_sorted() && order.len() == 3 * DOMAIN && order[0] == 1);
        assert_eq!(entries(&a).next().unwrap().value, a[2][0]);
    }
}
