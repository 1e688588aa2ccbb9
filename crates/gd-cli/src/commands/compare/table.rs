//! The table of `gd compare`.

use comfy_table::{Table, TableStyle};
use gd_model::analysis::compare::Comparison;

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
        ],
    );
    for s in &comparison.mechanisms {
        let spread = s.spread.map_or(String::new(), |d| format!(" ± {d:.4}"));
        table.add_row(vec![
            s.mechanism.to_owned(),
            s.parameters.to_string(),
            format!("{:.4}{spread}", s.loss),
            format!("{:+.2} %", s.difference_percent),
            format!("{:.4}", s.bits_per_byte),
            format!("{:.0}", s.tokens_per_second),
            s.peak_memory_mib.map_or(String::new(), |m| format!("{m:.0}")),
            format!("{:.4}", s.abstain_rate),
            format!("{:.4}", s.first_token_share),
            format!("{:.3}", s.top1_margin),
        ]);
    }
    table
}

#[cfg(test)]
pub(super) mod tests {
    use gd_model::analysis::compare::Run;
    use gd_model::eval::{Evaluation, HeadStats};

    use super::*;
    use crate::render::table::MARKDOWN;

    pub(in super::super) fn run(mechanism: &'static str, seed: u64, loss: f64) -> Run {
        let heads = HeadStats { abstained: 0.25, first_token: 0.5, margin: loss, ..HeadStats::default() };
        Run {
            mechanism,
            seed,
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
            tokens_per_second: 1000.0,
            peak_memory_mib: (seed > 0).then_some(10.0 * loss),
            train_loss: (0..20).map(|i| loss + 3.0 / f64::from(i + 1)).collect(),
            valid_loss: vec![(10, loss + 0.2), (20, loss)],
        }
    }

    #[test]
    fn the_table_has_a_row_per_mechanism_with_mean_and_deviation() {
        let runs = vec![run("a", 0, 2.0), run("b", 0, 2.2), run("a", 1, 4.0), run("b", 1, 3.2)];
        let c = Comparison::new(runs, 20, 8, 4);
        let text = table(&c, MARKDOWN).to_string();
        assert!(text.contains("3.0000 ± 1.4142") && text.contains("-10.00 %"), "{text}");
        assert_eq!(text.lines().count(), 4, "{text}");
    }

    #[test]
    fn a_missing_peak_memory_is_an_empty_cell() {
        let c = Comparison::new(vec![run("a", 0, 2.0)], 20, 8, 4);
        let text = table(&c, MARKDOWN).to_string();
        assert!(!text.contains('±') && text.lines().all(|l| l.matches('|').count() == 11), "{text}");
    }
}
