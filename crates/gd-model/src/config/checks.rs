//! Checks of the ranges of values, collected so that all problems are reported at once.

use std::fmt;

use crate::error::{Error, Result};

/// The problems of a block of settings.
#[derive(Debug, Default)]
pub(super) struct Checks(Vec<Error>);

impl Checks {
    /// Records that `name` has a value outside its range, unless `valid`.
    pub(super) fn require(
        &mut self,
        valid: bool,
        name: &str,
        value: impl fmt::Display,
        allowed: impl fmt::Display,
    ) {
        if !valid {
            self.0.push(Error::out_of_range(name, value, allowed));
        }
    }

    /// Records the error of a check, if it failed.
    pub(super) fn add(&mut self, result: Result<()>) {
        self.0.extend(result.err());
    }

    /// Records the problems of a block inside this one.
    pub(super) fn extend(&mut self, problems: Vec<Error>) {
        self.0.extend(problems);
    }

    /// All problems, in the order of the checks.
    pub(super) fn into_problems(self) -> Vec<Error> {
        self.0
    }
}

/// The problems of a block of settings by the paths of its keys in the block `parent`.
pub(super) fn inside(parent: &str, problems: Vec<Error>) -> Vec<Error> {
    let inside = |problem| match problem {
        Error::OutOfRange { name, value, allowed } => {
            Error::OutOfRange { name: format!("{parent}.{name}"), value, allowed }
        }
        other => other,
    };
    problems.into_iter().map(inside).collect()
}

/// The first problem as an error.
pub(super) fn first(problems: Vec<Error>) -> Result<()> {
    problems.into_iter().next().map_or(Ok(()), Err)
}
