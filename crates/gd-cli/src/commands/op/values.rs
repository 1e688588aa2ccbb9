//! Parsers for the values of flags.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use gd_kernels::Gate;

/// The value of `--mask`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskKind {
    /// All keys are visible.
    None,
    /// The keys up to the query's own position are visible.
    Causal,
    /// The last keys, this many, up to the query's own position are visible.
    Window(usize),
}

impl std::str::FromStr for MaskKind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let window = |w: &str| match w.parse() {
            Ok(0) | Err(_) => Err(format!("a window of `{w}` keys; 1 or more expected")),
            Ok(w) => Ok(Self::Window(w)),
        };
        match s.split_once(':') {
            None if s == "none" => Ok(Self::None),
            None if s == "causal" => Ok(Self::Causal),
            Some(("window", w)) => window(w),
            _ => Err("expected none, causal or window:W".into()),
        }
    }
}

/// Parses the value of `--gate`.
pub(super) fn gate(s: &str) -> Result<Gate, String> {
    let temperature = |t: &str| positive(t).map_err(|e| format!("a gate temperature of `{t}`: {e}"));
    match s.split_once(':') {
        None if s == "none" => Ok(Gate::None),
        None if s == "coherence" => Ok(Gate::Coherence),
        None if s == "energy" => Ok(Gate::Energy { temperature: 1.0 }),
        None if s == "margin" => Ok(Gate::Margin { temperature: 1.0 }),
        Some(("energy", t)) => Ok(Gate::Energy { temperature: temperature(t)? }),
        Some(("margin", t)) => Ok(Gate::Margin { temperature: temperature(t)? }),
        _ => Err("expected none, energy, energy:TEMPERATURE, margin, margin:TEMPERATURE or coherence".into()),
    }
}

/// Parses a number that is not NaN.
pub(super) fn number(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|x: &f64| !x.is_nan()).ok_or_else(|| "expected a number".into())
}

/// Parses a finite number above 0.
pub(in crate::commands) fn positive(s: &str) -> Result<f64, String> {
    number(s).ok().filter(|&x| x > 0.0 && x.is_finite()).ok_or_else(|| "expected a number above 0".into())
}

/// Parses a number in [0, 1].
pub(super) fn unit(s: &str) -> Result<f64, String> {
    number(s).ok().filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "expected a number from 0 to 1".into())
}

/// Parses a number in (0, 1).
pub(in crate::commands) fn open_unit(s: &str) -> Result<f64, String> {
    unit(s).ok().filter(|&x| x > 0.0 && x < 1.0).ok_or_else(|| "expected a number between 0 and 1".into())
}

/// A parser that maps each name in `table` to the value next to it.
pub(super) fn choice<T: Copy + Send + Sync + 'static>(
    table: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(table.iter().map(|&(name, _)| name)).try_map(move |name| {
        table.iter().find(|(n, _)| *n == name).map(|&(_, value)| value).ok_or("no such name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_gates_are_parsed_and_invalid_ones_are_errors() {
        assert_eq!("window:7".parse(), Ok(MaskKind::Window(7)));
        for bad in ["", "window", "window:", "window:0", "window:-1", "causal:3", "block"] {
            assert!(bad.parse::<MaskKind>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(gate("energy"), Ok(Gate::Energy { temperature: 1.0 }));
        assert_eq!(gate("energy:0.25"), Ok(Gate::Energy { temperature: 0.25 }));
        assert_eq!(gate("margin"), Ok(Gate::Margin { temperature: 1.0 }));
        assert_eq!(gate("margin:0.5"), Ok(Gate::Margin { temperature: 0.5 }));
        for bad in ["", "energy:", "energy:0", "energy:-1", "energy:nan", "energy:inf", "coherence:1"] {
            assert!(gate(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
