//! A number that changes over a run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A constant, or a piecewise function of the progress of a run.
///
/// In JSON it is a number, such as `0.5`, or a list of points `[fraction of all steps, value]` with rising fractions,
/// such as `[[0.25, 0], [0.7, 1]]`. Before the first and after the last point the value is constant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Curve {
    /// The same value at every step.
    Constant(f64),
    /// Points `(fraction of all steps, value)`.
    Points(Vec<(f64, f64)>),
}

impl Curve {
    /// The value at a fraction of all steps, interpolated linearly between the points. Two points at the same fraction
    /// are a jump, at which the value is that of the second.
    pub fn at(&self, share: f64) -> f64 {
        let points = match self {
            Self::Constant(value) => return *value,
            Self::Points(points) => points,
        };
        match points.partition_point(|p| p.0 <= share) {
            0 => points.first().map_or(f64::NAN, |p| p.1),
            n if n == points.len() => points[n - 1].1,
            n => {
                let ((x, from), (end, to)) = (points[n - 1], points[n]);
                from + (to - from) * (share - x) / (end - x)
            }
        }
    }

    /// The value of the last point at or before a fraction of all steps, without interpolation.
    pub fn step_at(&self, share: f64) -> f64 {
        match self {
            Self::Constant(value) => *value,
            Self::Points(points) => {
                let n = points.partition_point(|p| p.0 <= share);
                points.get(n.saturating_sub(1)).map_or(f64::NAN, |p| p.1)
            }
        }
    }

    /// Checks that the points are in order and that `valid` holds for every value. `name` and `allowed` describe the
    /// curve and its values in errors.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first point out of order or value outside its range.
    pub fn validate(&self, name: &str, allowed: &str, valid: impl Fn(f64) -> bool) -> Result<()> {
        let values: Vec<f64> = match self {
            Self::Constant(value) => vec![*value],
            Self::Points(points) if points.is_empty() => {
                return Err(Error::out_of_range(name, "an empty list", "a number or a list of points"));
            }
            Self::Points(points) => {
                let mut last = 0.0;
                for (share, _) in points {
                    if !(last..=1.0).contains(share) {
                        let allowed = format!("a list of points with fractions that rise from {last} to 1");
                        return Err(Error::out_of_range(name, share, allowed));
                    }
                    last = *share;
                }
                points.iter().map(|p| p.1).collect()
            }
        };
        match values.into_iter().find(|&v| !(v.is_finite() && valid(v))) {
            Some(value) => Err(Error::out_of_range(name, value, allowed)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_between_points_are_interpolated_or_stepped() {
        let curve: Curve = serde_json::from_str("[[0.2, 0], [0.6, 1], [0.6, 3], [0.8, 2]]").unwrap();
        let near = |share: f64, value: f64| {
            assert!((curve.at(share) - value).abs() < 1e-12, "{share}: {}", curve.at(share));
        };
        for (share, value) in
            [(0.0, 0.0), (0.2, 0.0), (0.3, 0.25), (0.6, 3.0), (0.7, 2.5), (0.8, 2.0), (1.0, 2.0)]
        {
            near(share, value);
        }
        let steps: Vec<f64> = [0.0, 0.3, 0.6, 0.9].map(|x| curve.step_at(x)).into();
        assert_eq!(steps, [0.0, 0.0, 3.0, 2.0]);
        let constant: Curve = serde_json::from_str("0.5").unwrap();
        assert_eq!((constant.at(0.3), constant.step_at(1.0)), (0.5, 0.5));
        assert_eq!(serde_json::to_string(&curve).unwrap(), "[[0.2,0.0],[0.6,1.0],[0.6,3.0],[0.8,2.0]]");
    }

    #[test]
    fn invalid_curves_are_named() {
        let check = |text: &str| {
            let curve: Curve = serde_json::from_str(text).unwrap();
            curve.validate("x", "in [0, 1]", |v| (0.0..=1.0).contains(&v)).map_err(|e| e.to_string())
        };
        assert_eq!(check("[[0, 0], [1, 1]]"), Ok(()));
        assert_eq!(check("1.5").unwrap_err(), "x must be in [0, 1], not 1.5");
        assert_eq!(check("[[0.5, 0], [1, 2]]").unwrap_err(), "x must be in [0, 1], not 2");
        assert!(check("[[0.5, 0], [0.2, 1]]").unwrap_err().contains("0.2"));
        assert!(check("[[1.5, 0]]").unwrap_err().contains("1.5"));
        assert_eq!(check("[]").unwrap_err(), "x must be a number or a list of points, not an empty list");
    }
}
