//! Checks of single values, with one way to say what is wrong.

use crate::domain::problem::Problem;

/// 2^53 - 1: the largest integer that every JSON reader keeps.
pub const MAX_INTEGER: i64 = 9_007_199_254_740_991;
pub const MAX_STEPS: i64 = 1_000_000_000;

#[derive(Debug, Clone, Copy)]
pub enum Bounds {
    Closed(f64, f64),
    /// Without the lower end.
    OpenClosed(f64, f64),
    /// Without the upper end.
    ClosedOpen(f64, f64),
}

/// Collects problems; a value out of range is reported and brought into range, so that what depends
/// on it can be checked too.
#[derive(Debug, Default)]
pub struct Check {
    pub problems: Vec<Problem>,
}

impl Check {
    pub fn problem(&mut self, pointer: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::new(pointer, message));
    }

    pub fn integer(&mut self, pointer: &str, value: i64, min: i64, max: i64) -> i64 {
        if value < min || value > max {
            self.problem(pointer, format!("{value} is out of range: it must be from {min} to {max}"));
        }
        value.clamp(min, max.max(min))
    }

    pub fn required(&mut self, pointer: &str, value: Option<i64>, min: i64, max: i64) -> i64 {
        let Some(value) = value else {
            self.problem(pointer, "is required");
            return min;
        };
        self.integer(pointer, value, min, max)
    }

    pub fn number(&mut self, pointer: &str, value: f64, bounds: Bounds) {
        let (inside, wanted) = match bounds {
            Bounds::Closed(min, max) => ((min..=max).contains(&value), format!("from {min} to {max}")),
            Bounds::OpenClosed(min, max) => (value > min && value <= max, format!("above {min}, at most {max}")),
            Bounds::ClosedOpen(min, max) => ((min..max).contains(&value), format!("at least {min}, below {max}")),
        };
        if !inside {
            self.problem(pointer, format!("{value} is out of range: it must be {wanted}"));
        }
    }

    /// PostgreSQL stores no NUL character, and refuses to index very long values.
    pub fn text(&mut self, pointer: &str, value: &str, max_chars: usize) {
        if value.is_empty() || value.chars().count() > max_chars || value.contains('\0') {
            self.problem(pointer, format!("must have 1 to {max_chars} characters, none of them NUL"));
        }
    }

    pub fn at_most_items(&mut self, pointer: &str, num_items: usize, max_items: usize) {
        if num_items > max_items {
            self.problem(pointer, format!("has {num_items} items; at most {max_items} are taken"));
        }
    }
}
