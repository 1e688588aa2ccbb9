//! The table of `gd compare`.

use comfy_table::{Table, TableStyle};
use gd_model::analysis::compare::{Comparison, LEAST_COST_OF_CUT};
use serde_json::Value;

use crate::render::table::plain_table;

/// Creates the table with one row per mechanism.
pub(super) fn table(comparison: &Comparison, style: TableStyle) -> Table {
    let mut table = plain_table(
        style,
        &[
            "mechanism",
            "parameters",
            "validation loss",
            "difference",
            "bits/byte",
            "tokens/s",
            "peak MiB",
            "abstain rate",
            "first-token share",
            "top-1 margin",
            "reads cut",
            "mean gate",
            "open reads",
            "repeated",
            "other",
        ],
    );
    for s in &comparison.mechanisms {
        let spread = s.spread.map_or(String::new(), |d| format!(" ± {d:.4}"));
        table.add_row(vec![
            s.mechanism.clone(),
            s.parameters.to_string(),
            format!("{:.4}{spread}", s.loss),
            format!("{:+.2} %", s.difference_percent),
            format!("{:.4}", s.bits_per_byte),
            format!("{:.0}", s.tokens_per_second),
            s.peak_memory_mib.map_or(String::new(), |m| format!("{m:.0}")),
            format!("{:.4}", s.abstain_rate),
            format!("{:.4}", s.first_token_share),
            format!("{:.3}", s.top1_margin),
            format!("{:.4}", s.reading.loss_without_reads),
            s.reading.gate.map_or(String::new(), |x| format!("{x:.3}")),
            s.reading.open.map_or(String::new(), |x| format!("{x:.3}")),
            format!("{:.4}", s.reading.repeated),
            format!("{:.4}", s.reading.other),
        ]);
    }
    table
}

/// The loss of every mechanism in each eighth of the windows.
pub(super) fn by_position(comparison: &Comparison, style: TableStyle) -> Table {
    let parts = comparison.mechanisms.first().map_or(0, |s| s.reading.by_position.len());
    let ends: Vec<String> =
        (1..=parts).map(|part| format!("to {}", comparison.context * part / parts)).collect();
    let header: Vec<&str> =
        std::iter::once("loss by position").chain(ends.iter().map(String::as_str)).collect();
    let mut table = plain_table(style, &header);
    for s in &comparison.mechanisms {
        let losses = s.reading.by_position.iter().map(|loss| format!("{loss:.4}"));
        table.add_row(std::iter::once(s.mechanism.clone()).chain(losses));
    }
    table
}

/// Steps below which the order of the rows says little about the mechanisms.
const SHORT_RUN_STEPS: u64 = 1000;

/// What is to be known about the table: the n-grams, parameters of mechanisms that are not the defaults, the learning rates,
/// how few the steps are, and whether the table measures reading.
pub(super) fn notes(comparison: &Comparison) -> String {
    let mut lines = Vec::new();
    if let Some(s) = comparison.mechanisms.first() {
        let (n, share) = (s.reading.ngram, 100.0 * s.reading.repeated_share);
        lines.push(format!(
            "repeated: loss on the {share:.1} % of tokens whose {n}-gram occurred before in the window; other: on the rest"
        ));
    }
    for s in &comparison.mechanisms {
        let layers = s.layers.iter().filter_map(|layer| serde_json::to_value(layer).ok());
        let mut changed: Vec<String> =
            layers.filter(Value::is_object).map(|layer| layer.to_string()).collect();
        changed.dedup();
        if !changed.is_empty() {
            lines.push(format!("{}: {}", s.mechanism, changed.join(", ")));
        }
    }
    for s in &comparison.mechanisms {
        let of = comparison.sweep.iter().filter(|point| point.mechanism == s.mechanism);
        let points: Vec<String> = of.map(|point| format!("{:e}: {:.4}", point.lr, point.loss)).collect();
        if !points.is_empty() {
            lines.push(format!(
                "{} at learning rate {:e} (loss at {})",
                s.mechanism,
                s.lr,
                points.join(", ")
            ));
        }
    }
    if comparison.steps < SHORT_RUN_STEPS {
        lines.push(format!(
            "After {} steps the losses are those of the start of a training: they show that every mechanism learns and what \
             it costs, not which one is better.",
            comparison.steps
        ));
    }
    if !comparison.measures_reading() {
        lines.push(format!(
            "This table does not measure reading: cutting all reads costs no mechanism {LEAST_COST_OF_CUT} nats per token."
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
pub(super) mod tests {
    use gd_model::analysis::compare::{Run, SweepPoint};
    use gd_model::config::Mechanism;
    use gd_model::eval::reading::ReadingReport;
    use gd_model::eval::{Evaluation, HeadStats};

    use super::*;
    use crate::render::table::MARKDOWN;

    pub(in super::super) fn run(mechanism: &str, seed: u64, loss: f64) -> Run {
        let heads = HeadStats { abstained: 0.25, first_token: 0.5, margin: loss, ..HeadStats::default() };
        Run {
            mechanism: mechanism.into(),
            layers: vec![Mechanism::Softmax],
            seed,
            lr: 3e-3,
            intermediate_size: 8,
            parameters: 100,
            result: Evaluation {
                loss,
                perplexity: loss.exp(),
                bits_per_byte: loss / 2f64.ln(),
                tokens: 9,
                text_tokens: 9,
                text_bytes: 9.0,
                heads,
            },
            reading: ReadingReport {
                loss_without_reads: loss,
                loss,
                by_position: vec![loss; 8],
                ..ReadingReport::default()
            },
            tokens_per_second: 1000.0,
            peak_memory_mib: (seed > 0).then_some(10.0 * loss),
            train_loss: (0..20).map(|i| loss + 3.0 / f64::from(i + 1)).collect(),
            valid_loss: vec![(10, loss + 0.2), (20, loss)],
        }
    }

    #[test]
    fn the_table_has_a_row_per_mechanism_with_mean_and_deviation() {
        let runs = vec![run("a", 0, 2.0), run("b", 0, 2.2), run("a", 1, 4.0), run("b", 1, 3.2)];
        let c = Comparison::new(runs, Vec::new(), 20, 8, 4);
        let text = table(&c, MARKDOWN).to_string();
        assert!(text.contains("3.0000 ± 1.4142") && text.contains("-10.00 %"), "{text}");
        assert_eq!(text.lines().count(), 4, "{text}");
    }

    #[test]
    fn a_table_without_reads_says_so_and_a_sweep_is_listed() {
        let point = |lr, loss| SweepPoint { mechanism: "a".into(), lr, loss };
        let sweep = vec![point(1e-3, 2.5), point(3e-3, 2.0)];
        let mut runs = vec![run("a", 0, 2.0)];
        let text = notes(&Comparison::new(runs.clone(), sweep, 20, 8, 4));
        assert!(text.contains("does not measure reading"), "{text}");
        assert!(text.contains("a at learning rate 3e-3 (loss at 1e-3: 2.5000, 3e-3: 2.0000)"), "{text}");
        assert!(text.contains("After 20 steps") && !text.contains("a: "), "{text}");
        let window = serde_json::json!({"name": "sliding_window", "window": 32});
        runs[0].layers = vec![serde_json::from_value(window.clone()).unwrap(); 2];
        let text = notes(&Comparison::new(runs.clone(), Vec::new(), 1000, 8, 4));
        assert!(text.contains(&format!("a: {window}\n")) && !text.contains("steps"), "{text}");
        runs[0].reading.loss_without_reads += 0.02;
        let c = Comparison::new(runs, Vec::new(), 20, 8, 16);
        assert!(!notes(&c).contains("does not measure"));
        let positions = by_position(&c, MARKDOWN).to_string();
        assert!(positions.contains("to 2 ") && positions.contains("to 16"), "{positions}");
    }

    #[test]
    fn a_missing_peak_memory_is_an_empty_cell() {
        let c = Comparison::new(vec![run("a", 0, 2.0)], Vec::new(), 20, 8, 4);
        let text = table(&c, MARKDOWN).to_string();
        assert!(!text.contains('±') && text.lines().all(|l| l.matches('|').count() == 16), "{text}");
    }
}
