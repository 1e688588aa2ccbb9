//! Numbers for readers: thousands separators, powers of a thousand, units and durations.

/// A whole number with a comma between groups of three digits.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with three digits and its power of a thousand from a tenth of a million on, such as `0.92 M`; smaller ones in
/// full.
pub fn scaled(x: f64) -> String {
    let (value, power) = match x.abs() {
        1e12.. => (x / 1e12, " T"),
        1e9.. => (x / 1e9, " B"),
        1e5.. => (x / 1e6, " M"),
        _ => return short(x),
    };
    format!("{value:.*}{power}", decimals(value))
}

/// A number with about four digits; from a thousand on a whole one with separators. Very small and very large ones have an
/// exponent.
pub fn short(x: f64) -> String {
    let size = x.abs();
    if !x.is_finite() {
        return x.to_string();
    }
    if size >= 1e9 || (size > 0.0 && size < 1e-3) {
        return format!("{x:.2e}");
    }
    if size >= 1000.0 || x == x.trunc() {
        let sign = if x <= -0.5 { "-" } else { "" };
        return format!("{sign}{}", grouped(size.round() as u64));
    }
    if size < 1.0 {
        // Three digits after the zeros.
        let zeros = (-size.log10()).floor().max(0.0) as usize;
        return format!("{x:.*}", zeros + 3);
    }
    format!("{x:.*}", decimals(size) + 1)
}

/// A round number without zeros at its end.
pub fn tick_label(x: f64) -> String {
    let text = short(x);
    let (digits, exponent) = text.split_once('e').map_or((text.as_str(), ""), |(d, e)| (d, e));
    let digits =
        if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    if exponent.is_empty() { digits.to_owned() } else { format!("{digits}e{exponent}") }
}

/// Digits after the point that give a number three digits.
fn decimals(x: f64) -> usize {
    match x.abs() {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    }
}

/// A size of memory that is given in MiB.
pub fn memory(mib: f64) -> String {
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.0} MiB") }
}

/// A duration in seconds, in the units in which it has the fewest digits.
pub fn duration(seconds: f64) -> String {
    let minutes = seconds / 60.0;
    match minutes {
        120.0.. => format!("{:.1} hours", minutes / 60.0),
        2.0.. => format!("{minutes:.1} minutes"),
        _ => format!("{seconds:.1} seconds"),
    }
}

/// About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.
pub fn ticks([low, high]: [f64; 2], count: usize) -> Vec<f64> {
    let rough = (high - low) / count.max(1) as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|n| n as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_separators_and_powers() {
        for (n, text) in [(0, "0"), (999, "999"), (2560, "2,560"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(n), text);
        }
        for (x, text) in [(917_504.0, "0.92 M"), (1.03e7, "10.3 M"), (1.345e8, "134 M"), (1.71e9, "1.71 B")] {
            assert_eq!(scaled(x), text);
        }
        for (x, text) in [(0.5, "0.5"), (2.25, "2.25"), (2000.0, "2,000"), (3e-4, "3e-4"), (0.0, "0")] {
            assert_eq!(tick_label(x), text);
        }
        assert_eq!(scaled(20_480.0), "20,480");
        for (x, text) in [
            (0.0, "0"),
            (2.34567, "2.346"),
            (0.00184, "0.00184"),
            (0.5, "0.500"),
            (12.3456, "12.35"),
            (345.67, "345.7"),
            (1234.5, "1,235"),
            (-1234.5, "-1,235"),
            (3e-4, "3.00e-4"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(short(x), text);
        }
    }

    #[test]
    fn durations_and_memory_have_units() {
        assert_eq!(duration(8.04), "8.0 seconds");
        assert_eq!(duration(150.0), "2.5 minutes");
        assert_eq!(duration(9000.0), "2.5 hours");
        assert_eq!([memory(512.0), memory(2048.0)], ["512 MiB", "2.0 GiB"]);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks([0.0, 20.0], 4), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert_eq!(ticks([2.31, 2.94], 3), [2.5]);
        assert_eq!(ticks([0.0, 0.0], 3), [0.0]);
        assert_eq!(ticks([-1.0, 1.0], 2), [-1.0, 0.0, 1.0]);
    }
}
