//! The methods of Python's strings, lists and dictionaries. Those that change their object are refused, as in the sandbox
//! in which transformers renders.

use minijinja::State;
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::functions::format_braces;
use super::limits::{Outcome, VALUE_BYTES, charge, failed, text};

/// The methods that change a list or a dictionary.
const CHANGING: [&str; 13] = [
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

/// Calls a method. Those of maps and the simple ones of strings are methods of minijinja's own compatibility layer.
pub(super) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Outcome<Value> {
    match (value.kind(), value.as_str()) {
        (_, Some(string)) => match string_method(state, string, name, args)? {
            Some(result) => Ok(result),
            None => unknown_method_callback(state, value, name, args),
        },
        (ValueKind::Seq | ValueKind::Iterable | ValueKind::Map, _) if name == "copy" => {
            let () = from_args(args)?;
            Ok(value.clone())
        }
        (ValueKind::Seq | ValueKind::Iterable, _) if name == "index" => {
            let (item,): (&Value,) = from_args(args)?;
            for (at, other) in value.try_iter()?.checked().enumerate() {
                if other? == *item {
                    return Ok(Value::from(at));
                }
            }
            Err(failed(format!("{item:?} is not in list")))
        }
        (ValueKind::Seq | ValueKind::Iterable | ValueKind::Map, _) if CHANGING.contains(&name) => {
            let kind = value.kind();
            Err(failed(format!("{name} would change a {kind}, which a template may not do")))
        }
        _ => unknown_method_callback(state, value, name, args),
    }
}

/// Calls a method of a string; `None` if it is not one of those that are defined here.
fn string_method(state: &mut State, s: &str, name: &str, args: &[Value]) -> Outcome<Option<Value>> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let stripped = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let s = if name == "rstrip" { s } else { s.trim_start_matches(stripped) };
            Value::from(if name == "lstrip" { s } else { s.trim_end_matches(stripped) })
        }
        "split" | "rsplit" => {
            let (separator, limit, options): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.map_or_else(|| options.get::<Option<&str>>("sep"), |s| Ok(Some(s)))?;
            let limit = limit.map_or_else(|| options.get::<Option<i64>>("maxsplit"), |n| Ok(Some(n)))?;
            options.assert_all_used()?;
            let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
            if separator == Some("") {
                return Err(failed("empty separator"));
            }
            let parts = separator.map_or(s.len() / 2, |separator| s.matches(separator).count()).min(limit);
            charge(state, s.len().saturating_add((parts + 1).saturating_mul(VALUE_BYTES)))?;
            split(s, separator, limit, name == "rsplit").into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let (ends, options): (Option<bool>, Kwargs) = from_args(args)?;
            let ends = ends.map_or_else(|| options.get::<Option<bool>>("keepends"), |ends| Ok(Some(ends)))?;
            options.assert_all_used()?;
            lines(s, ends.unwrap_or(false)).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(failed("empty separator"));
            }
            let parts = match name {
                "partition" => s.split_once(separator).map_or((s, "", ""), |(a, b)| (a, separator, b)),
                _ => s.rsplit_once(separator).map_or(("", "", s), |(a, b)| (a, separator, b)),
            };
            Value::from(minijinja::value::Tuple::from([parts.0.into(), parts.1.into(), parts.2.into()]))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(s.strip_prefix(prefix).unwrap_or(s))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(s.strip_suffix(suffix).unwrap_or(s))
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let at = if name == "index" { s.find(part) } else { s.rfind(part) };
            Value::from(at.map(|at| s[..at].chars().count()).ok_or_else(|| failed("substring not found"))?)
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            Value::from(replace(state, s, old, new, count)?)
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            Value::from(join(state, items.try_iter()?.checked(), s, true)?)
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['-', '+'])));
            let zeros = width.saturating_sub(s.chars().count());
            charge(state, zeros)?;
            Value::from(format!("{sign}{}{digits}", "0".repeat(zeros)))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = width.saturating_sub(s.chars().count());
            charge(state, 4 * missing)?;
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Python puts the odd character to the left of a text in an odd width.
                _ => missing / 2 + (missing & width & 1),
            };
            let fill = |n: usize| fill.unwrap_or(' ').to_string().repeat(n);
            Value::from(format!("{}{s}{}", fill(left), fill(missing - left)))
        }
        "format" => Value::from(format_braces(state, s, args)?),
        "casefold" => {
            let () = from_args(args)?;
            Value::from(s.to_lowercase().replace('ß', "ss"))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            Value::from(s.chars().map(swap).collect::<String>())
        }
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!s.is_empty() && s.chars().all(is_space))
        }
        _ => return Ok(None),
    }))
}

/// Whether Python regards a character as white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The parts of a text between separators, or between white space, with at most `limit` splits from the left or right.
fn split<'a>(s: &'a str, separator: Option<&str>, limit: usize, from_right: bool) -> Vec<&'a str> {
    let parts = limit.saturating_add(1);
    match (separator, from_right) {
        (Some(separator), false) => s.splitn(parts, separator).collect(),
        (Some(separator), true) => {
            let mut parts: Vec<_> = s.rsplitn(parts, separator).collect();
            parts.reverse();
            parts
        }
        (None, _) => {
            let (mut rest, mut words) = (s.trim_matches(is_space), Vec::new());
            while !rest.is_empty() && words.len() < limit {
                let (word, others) = match from_right {
                    false => rest.split_once(is_space).unwrap_or((rest, "")),
                    true => rest.rsplit_once(is_space).map_or((rest, ""), |(others, word)| (word, others)),
                };
                words.push(word);
                rest = others.trim_matches(is_space);
            }
            if !rest.is_empty() {
                // What is not split keeps the white space at its other end.
                let at = rest.as_ptr() as usize - s.as_ptr() as usize;
                words.push(if from_right { &s[..at + rest.len()] } else { &s[at..] });
            }
            if from_right {
                words.reverse();
            }
            words
        }
    }
}

/// The lines of a text, with or without their ends.
pub(super) fn lines(s: &str, with_ends: bool) -> Vec<&str> {
    let breaks = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut rest, mut lines) = (s, Vec::new());
    while !rest.is_empty() {
        let end = rest.find(breaks).unwrap_or(rest.len());
        let length = match rest[end..].chars().next() {
            Some('\r') if rest[end..].starts_with("\r\n") => 2,
            other => other.map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if with_ends { end + length } else { end }]);
        rest = &rest[end + length..];
    }
    lines
}

/// Replaces the first `count` occurrences of a text, or all of them.
pub(super) fn replace(
    state: &mut State,
    s: &str,
    old: &str,
    new: &str,
    count: Option<i64>,
) -> Outcome<String> {
    let count = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let replaced = s.matches(old).take(count).count();
    charge(state, replaced.saturating_mul(new.len()).saturating_add(s.len()))?;
    Ok(s.replacen(old, new, replaced))
}

/// Joins items. As a method of a string, it takes strings alone.
pub(super) fn join(
    state: &mut State,
    items: impl Iterator<Item = Outcome<Value>>,
    separator: &str,
    strings: bool,
) -> Outcome<String> {
    let mut joined = String::new();
    for (at, item) in items.enumerate() {
        let item = item?;
        if strings && item.as_str().is_none() {
            return Err(failed(format!("join: item {at} is a {}, not a string", item.kind())));
        }
        let item = text(state, &item)?;
        if at > 0 {
            charge(state, separator.len())?;
            joined.push_str(separator);
        }
        joined.push_str(&item);
    }
    Ok(joined)
}
