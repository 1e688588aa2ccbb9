//! The table and the figure of `gd task`.

use comfy_table::{Table, TableStyle};
use gd_model::tasks::{Task, TaskRun};

use crate::render::plot::{Figure, Line, LineChart};
use crate::render::table::plain_table;

/// Runs by mechanism, in the order of their first runs.
fn by_mechanism(runs: &[TaskRun]) -> Vec<Vec<&TaskRun>> {
    let mut groups: Vec<Vec<&TaskRun>> = Vec::new();
    for run in runs {
        match groups.iter_mut().find(|group| group[0].mechanism == run.mechanism) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    groups
}

/// The mean of a value over runs, with the least and the greatest one if there are several.
fn cell(runs: &[&TaskRun], value: impl Fn(&TaskRun) -> f64, digits: usize) -> String {
    let values: Vec<f64> = runs.iter().map(|run| value(run)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
    match values.len() {
        1 => format!("{mean:.digits$}"),
        _ => format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})"),
    }
}

/// Creates the table: for every mechanism and test the accuracy in percent as the mean over the seeds.
pub(super) fn table(runs: &[TaskRun], style: TableStyle) -> Table {
    let header =
        ["mechanism", "parameters", "test", "accuracy %", "cut %", "wrong", "answers", "loss", "mean gate"];
    let mut table = plain_table(style, &header);
    for group in by_mechanism(runs) {
        for (at, test) in group[0].tests.iter().enumerate() {
            let sum = |value: fn(&gd_model::tasks::TestResult) -> usize| {
                group.iter().map(|run| value(&run.tests[at])).sum::<usize>().to_string()
            };
            let gate = match test.gate {
                Some(_) => cell(&group, |run| run.tests[at].gate.unwrap_or(f64::NAN), 3),
                None => String::new(),
            };
            table.add_row(vec![
                group[0].mechanism.clone(),
                group[0].parameters.to_string(),
                test.name.clone(),
                cell(&group, |run| 100.0 * run.tests[at].accuracy, 2),
                cell(&group, |run| 100.0 * run.tests[at].accuracy_without_reads, 2),
                sum(|test| test.errors),
                sum(|test| test.answers),
                cell(&group, |run| run.tests[at].loss, 4),
                gate,
            ]);
        }
    }
    table
}

/// Creates the figure: accuracy by the size of the test, as the mean over the seeds.
pub(super) fn chart(task: &dyn Task, runs: &[TaskRun]) -> Figure {
    let groups = by_mechanism(runs);
    let sizes: Vec<f64> = runs.first().map_or(Vec::new(), |run| run.tests.iter().map(|t| t.size).collect());
    // Sizes that double are drawn as powers of two.
    let doubles = sizes.iter().all(|size| *size >= 1.0);
    let x = |size: f64| if doubles { size.log2() } else { size };
    let line = |(color, group): (usize, &Vec<&TaskRun>)| {
        let mean = |at: usize| {
            group.iter().map(|run| 100.0 * run.tests[at].accuracy).sum::<f64>() / group.len() as f64
        };
        Line {
            label: group[0].mechanism.clone(),
            color,
            dashed: false,
            points: sizes.iter().enumerate().map(|(at, size)| (x(*size), mean(at))).collect(),
        }
    };
    let (low, high) =
        sizes.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &s| (l.min(x(s)), h.max(x(s))));
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    // Lines at the edge of the axes are inside of them.
    let margin = 0.02 * (high - low);
    Figure {
        line_chart: LineChart {
            title: format!("{}: correct answers by the size of the test", task.name()),
            x: if doubles { "log2 of the size".into() } else { "size".into() },
            y: "correct answers in %".into(),
            axes: [low - margin..high + margin, -2.0..102.0],
            lines: groups.iter().enumerate().map(line).collect(),
            marks: Vec::new(),
        },
        heat_map: None,
    }
}

#[cfg(test)]
mod tests {
    use gd_model::tasks::{TestResult, named};

    use super::*;
    use crate::render::plot::svg;
    use crate::render::table::MARKDOWN;

    fn run(mechanism: &str, seed: u64, accuracy: f64) -> TaskRun {
        let test = |size: f64| TestResult {
            name: format!("{size} pairs"),
            size,
            accuracy,
            errors: 3,
            answers: 10,
            loss: 1.5,
            accuracy_without_reads: 0.25,
            gate: (mechanism == "gd").then_some(0.5),
        };
        TaskRun {
            task: "mqar-small".into(),
            mechanism: mechanism.into(),
            seed,
            parameters: 100,
            steps: 10,
            seconds: 1.0,
            train_loss: 2.0,
            tests: vec![test(8.0), test(16.0)],
        }
    }

    #[test]
    fn rows_are_means_over_seeds_with_their_range() {
        let runs = [run("softmax", 0, 0.5), run("gd", 0, 0.25), run("softmax", 1, 1.0), run("gd", 1, 0.75)];
        let text = table(&runs, MARKDOWN).to_string();
        assert!(
            text.contains("75.00 (50.00 to 100.00)") && text.contains("50.00 (25.00 to 75.00)"),
            "{text}"
        );
        assert!(text.contains("0.500 (0.500 to 0.500)"), "{text}");
        assert_eq!(text.lines().count(), 2 + 4);
        let figure = svg(&chart(named("mqar-small").unwrap(), &runs)).unwrap();
        assert!(figure.contains("softmax") && !figure.contains("NaN"));
        // Lines at the edges of the axes are drawn: one, and its entry in the legend.
        for accuracy in [0.0, 0.5, 1.0] {
            let figure = svg(&chart(named("mqar-small").unwrap(), &[run("gd", 0, accuracy)])).unwrap();
            assert_eq!(figure.matches("stroke-width=\"2\"").count(), 2, "{accuracy}");
        }
    }
}
