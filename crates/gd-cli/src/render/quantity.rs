//! The numbers of a log in words: title, unit, and what they say.

/// What a number of the log is.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantity {
    /// Its name in words.
    pub title: String,
    /// Unit of the values once they are multiplied by `scale`; empty without a unit.
    pub unit: &'static str,
    /// By which factor values are shown.
    pub scale: f64,
    /// What it measures and how to read it, in a line; empty where the title says it.
    pub explanation: &'static str,
}

/// The quantity of this name. The title of a name that is not known here is the name with spaces.
pub fn quantity(name: &str) -> Quantity {
    let (title, unit, explanation) = match name {
        "loss" => ("training loss", "nats per token", ""),
        "valid_loss" => (
            "validation loss",
            "nats per token",
            "On the start of the validation text, which the model is not trained on.",
        ),
        "valid_loss_ema" => ("validation loss of the averaged weights", "nats per token", ""),
        "lr" => ("learning rate", "", ""),
        "grad_norm" => ("gradient norm", "", "Before clipping."),
        "tokens_per_second" => ("tokens per second", "tokens/s", ""),
        "mfu" => (
            "model FLOPs utilization",
            "%",
            "Operations of the model per second, relative to the measured rate of a matrix product.",
        ),
        "resident_mib" => ("memory in use", "MiB", ""),
        "peak_mib" => ("peak memory", "MiB", ""),
        "tokens" => ("training tokens", "tokens", ""),
        "skipped" => ("skipped updates so far", "", ""),
        "hardness" => ("weight of the hard selection", "", ""),
        "candidates" => ("candidates per query", "", ""),
        "heads/abstained" => (
            "heads that abstain",
            "%",
            "Share of heads and queries that read nothing, because no key was within the threshold.",
        ),
        "heads/first_token" => (
            "weight on the first token",
            "%",
            "Mean weight of position 0, that of a read being its gate. Heads that have nothing to read often go there.",
        ),
        "heads/margin" => (
            "margin to the runner-up",
            "energy",
            "Energy of the second-best key minus that of the selected one. The larger, the clearer the choice.",
        ),
        "heads/entropy" => (
            "entropy over the candidates",
            "nats",
            "How evenly the weights of the candidates are spread; 0 if one of them has all weight.",
        ),
        "heads/distinct" => (
            "different keys of a position",
            "%",
            "Different keys that the heads of a position read, relative to the heads that read; 100 % if no two agree.",
        ),
        "churn" => (
            "selections that changed",
            "%",
            "Share of the selections in the same text that differ from the evaluation before.",
        ),
        _ => {
            let title = name.replace(['_', '/'], " ");
            return Quantity { title, unit: "", scale: 1.0, explanation: "" };
        }
    };
    let scale = if unit == "%" { 100.0 } else { 1.0 };
    Quantity { title: title.into(), unit, scale, explanation }
}

impl Quantity {
    /// The label of an axis: the unit, or the title without one.
    pub fn axis(&self) -> &str {
        if self.unit.is_empty() { &self.title } else { self.unit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_log_have_words_and_others_their_name() {
        let churn = quantity("churn");
        assert_eq!((churn.unit, churn.scale, churn.axis()), ("%", 100.0, "%"));
        assert!(!churn.explanation.is_empty());
        assert_eq!(quantity("heads/new_one").title, "heads new one");
        assert_eq!(quantity("lr").axis(), "learning rate");
    }
}
