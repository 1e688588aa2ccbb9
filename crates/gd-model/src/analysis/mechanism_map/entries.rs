//! What the map can show.

use super::selection::{Protection, Selection};
use super::weights::{FromKeys, FromScores};

/// A mechanism on the map.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The name.
    pub name: &'static str,
    /// A description in one line.
    pub what: &'static str,
    pub(super) kind: Kind,
}

/// How an entry turns a row into weights and answers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Weights from scores.
    Scores(FromScores),
    /// Weights from scores that depend on the order of the keys or on a second row of scores, so that the recall task does
    /// not apply.
    ScoresOnly(FromScores),
    /// Weights from queries and keys.
    Keys(FromKeys),
    /// The key with the greatest score, or none by a rule.
    Reject(Rule),
    /// The operators of selection attention.
    Selection(Selection),
}

/// A rule that rejects the answers with the lowest figure. The threshold is that which rejects `share` of the queries of the
/// tuning split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rule {
    pub(super) figure: Figure,
    pub(super) share: f64,
}

/// What a rule compares with its threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Figure {
    /// The greatest weight of the softmax at its own beta: Chow's rule.
    Chow,
    /// The greatest score.
    Energy,
    /// The greatest score minus the second.
    Margin,
}

const fn scores(name: &'static str, what: &'static str, from: FromScores) -> Entry {
    Entry { name, what, kind: Kind::Scores(from) }
}

const fn configured(configuration: &'static str) -> FromScores {
    FromScores::Mechanism { configuration, learned: &[] }
}

const fn scaled(learned: &'static [(&'static str, f64)]) -> FromScores {
    FromScores::Mechanism { configuration: r#"{"name":"ssmax"}"#, learned }
}

const fn reject(name: &'static str, what: &'static str, figure: Figure, share: f64) -> Entry {
    Entry { name, what, kind: Kind::Reject(Rule { figure, share }) }
}

const fn selection(name: &'static str, what: &'static str, selection: Selection) -> Entry {
    Entry { name, what, kind: Kind::Selection(selection) }
}

/// All entries.
pub const ENTRIES: &[Entry] = &[
    scores("sigmoid", "sigmoid of the scores minus ln n", configured(r#"{"name":"sigmoid"}"#)),
    scores("softmax", "softmax", configured(r#"{"name":"softmax"}"#)),
    scores("softmax1", "softmax with a null logit of 0", configured(r#"{"name":"softmax1"}"#)),
    scores("ssmax_s0.43", "softmax of 0.43 ln n times the scores", scaled(&[("s", 0.43)])),
    scores("ssmax_s0.168", "softmax of 0.168 ln n times the scores", scaled(&[("s", 0.168)])),
    scores("entmax1.3", "alpha-entmax with alpha 1.3", configured(r#"{"name":"entmax","alpha":1.3}"#)),
    scores("entmax1.5", "alpha-entmax with alpha 1.5", configured(r#"{"name":"entmax","alpha":1.5}"#)),
    scores("sparsemax", "sparsemax", configured(r#"{"name":"sparsemax"}"#)),
    scores("top4", "softmax over the 4 greatest scores", configured(r#"{"name":"topk","k":4}"#)),
    scores("window8", "softmax over the last 8 positions", FromScores::LastKeys(8)),
    scores("hard", "the key with the greatest score", configured(r#"{"name":"hard"}"#)),
    Entry {
        name: "differential_l0.8",
        what: "absolute difference of two softmax maps, lambda 0.8",
        kind: Kind::ScoresOnly(FromScores::Differential(0.8)),
    },
    Entry {
        name: "differential_l0.2",
        what: "absolute difference of two softmax maps, lambda 0.2",
        kind: Kind::ScoresOnly(FromScores::Differential(0.2)),
    },
    Entry {
        name: "monotonic",
        what: "first row of monotonic attention, scores as energies",
        kind: Kind::ScoresOnly(FromScores::Monotonic { window: 1 }),
    },
    Entry {
        name: "mocha8",
        what: "first row of monotonic chunkwise attention, window 8",
        kind: Kind::ScoresOnly(FromScores::Monotonic { window: 8 }),
    },
    Entry {
        name: "hopfield_t1",
        what: "Hopfield retrieval with one update",
        kind: Kind::Keys(FromKeys::Hopfield),
    },
    Entry { name: "linear", what: "linear attention with elu + 1", kind: Kind::Keys(FromKeys::Linear) },
    reject("hard+reject_chow", "hard, or none below a softmax weight", Figure::Chow, 0.1),
    reject("hard+reject_energy", "hard, or none below a score", Figure::Energy, 0.1),
    reject("hard+margin", "hard, or none below a margin, 20 % rejected", Figure::Margin, 0.2),
    reject("hard+margin_10", "hard, or none below a margin, 10 % rejected", Figure::Margin, 0.1),
    selection(
        "gd+threshold",
        "selection with a threshold on the energy",
        Selection::Threshold(Protection::None),
    ),
    selection(
        "gd+consistency_gate",
        "selection with a threshold and the consistency gate",
        Selection::EnergyGate,
    ),
    selection("gd+coherence_gate", "selection with the coherence gate", Selection::CoherenceGate),
    selection(
        "gd+barrier",
        "selection with a threshold, and a barrier for 8 of the keys",
        Selection::Threshold(Protection::Barrier),
    ),
    selection("gd+margin", "selection with a threshold on the margin, 20 % rejected", Selection::Margin),
];
