//! The functions, filters and tests that transformers or Jinja2 define and minijinja lacks, or defines otherwise.

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, State, filters};

use super::json::to_json;
use super::limits::{Outcome, attribute, charge, failed, limited, text};
use super::methods::{join, lines, replace};
use super::rewrite::{ATTRIBUTE, LIMITED, MODULO};

/// The maximal number of digits of the width and of the precision of a formatted value.
const MAX_WIDTH_DIGITS: usize = 5;

/// Adds all of them to an environment.
pub(super) fn register(environment: &mut Environment) {
    environment.add_function(LIMITED, limited);
    environment.add_function(ATTRIBUTE, attribute);
    environment.add_function(MODULO, modulo);
    environment.add_function("raise_exception", |reason: String| -> Outcome<Value> { Err(failed(reason)) });
    environment.add_function("strftime_now", |form: &str| strftime(Local::now().naive_local(), form));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |state: &mut State, value: &Value| text(state, value));
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter("replace", replace_filter);
    environment.add_filter("join", join_filter);
    environment.add_filter("indent", indent);
    environment.add_filter("format", |state: &mut State, value: &Value, args: Rest<ValueOrKwargs>| {
        let form = text(state, value)?;
        format_percent(state, &form, &args.into_values())
    });
    environment.add_filter("batch", |state: &mut State, value: Value, count: usize, fill: Option<Value>| {
        charge(state, count)?;
        filters::batch(state, value, count, fill)
    });
    environment.add_filter("slice", |state: &mut State, value: Value, count: usize, fill: Option<Value>| {
        charge(state, count)?;
        filters::slice(state, value, count, fill)
    });
    // A list that is computed when it is read is a list in Python. Text and dictionaries are sequences in Jinja2.
    let sequence =
        |kind| matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map);
    environment.add_test("iterable", move |value: &Value| value.is_undefined() || sequence(value.kind()));
    environment.add_test("sequence", move |value: &Value| value.is_undefined() || sequence(value.kind()));
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// `a % b`: the remainder, with the sign of `b`, or a formatted text.
fn modulo(state: &mut State, a: &Value, b: &Value) -> Outcome<Value> {
    if let Some(form) = a.as_str() {
        let args = match b.downcast_object_ref::<Tuple>() {
            Some(tuple) => tuple.to_vec(),
            None => vec![b.clone()],
        };
        return format_percent(state, form, &args).map(Value::from);
    }
    let zero = || failed("division by zero");
    if let (Ok(x), Ok(y)) = (i128::try_from(a.clone()), i128::try_from(b.clone())) {
        let remainder = x.checked_rem(y).ok_or_else(zero)?;
        let sum = if remainder != 0 && (remainder < 0) != (y < 0) { remainder + y } else { remainder };
        return Ok(i64::try_from(sum).map_or_else(|_| Value::from(sum), Value::from));
    }
    match (f64::try_from(a.clone()), f64::try_from(b.clone())) {
        (Ok(_), Ok(0.0)) => Err(zero()),
        (Ok(x), Ok(y)) => {
            let remainder = x % y;
            Ok(Value::from(if remainder != 0.0 && (remainder < 0.0) != (y < 0.0) {
                remainder + y
            } else {
                remainder
            }))
        }
        _ => Err(failed(format!("% of a value of type {} and one of type {}", a.kind(), b.kind()))),
    }
}

/// Formats as `form % args` of Python.
fn format_percent(state: &mut State, form: &str, args: &[Value]) -> Outcome<String> {
    let (mut args, mut plain, mut next, mut rest) = (args.to_vec(), String::new(), 0, form);
    while let Some((before, specifier)) = rest.split_once('%') {
        let named = specifier.starts_with('(');
        let key = if named { specifier.find(')').map_or(0, |at| at + 1) } else { 0 };
        let length = specifier[key..].find(|c: char| c.is_alphabetic() || c == '%').unwrap_or(0);
        check_width(&specifier[key..key + length])?;
        let (options, conversion) = specifier.split_at(key + length);
        let (conversion, after) = conversion.split_at(conversion.chars().next().map_or(0, char::len_utf8));
        // What minijinja has under another name.
        let conversion = match (conversion, args.get_mut(next)) {
            ("r" | "a", Some(arg)) if !named => {
                *arg = Value::from(format!("{arg:?}"));
                "s"
            }
            ("i" | "u", _) => "d",
            (other, _) => other,
        };
        next += usize::from(conversion != "%" && !named);
        plain.extend([before, "%", options, conversion]);
        rest = after;
    }
    plain.push_str(rest);
    let mapping = args.len() == 1 && args[0].kind() == ValueKind::Map;
    if next < args.len() && !mapping {
        return Err(failed("not all arguments converted during string formatting"));
    }
    for arg in &args {
        limited(state, arg.clone())?;
    }
    let formatted = format(FormatStyle::Printf, &plain, &args)?;
    charge(state, formatted.len())?;
    Ok(formatted)
}

/// Formats as `form.format(args)` of Python.
pub(super) fn format_braces(state: &mut State, form: &str, args: &[Value]) -> Outcome<String> {
    let mut fields = form.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    fields.try_for_each(check_width)?;
    for arg in args {
        limited(state, arg.clone())?;
    }
    let formatted = format(FormatStyle::StrFormat, form, args)?;
    charge(state, formatted.len())?;
    Ok(formatted)
}

/// Checks that the width and the precision in a format specifier are not too large.
fn check_width(specifier: &str) -> Outcome<()> {
    match specifier.split(|c: char| !c.is_ascii_digit()).find(|digits| digits.len() > MAX_WIDTH_DIGITS) {
        Some(width) => Err(failed(format!("format: the width {width} is too large"))),
        None => Ok(()),
    }
}

/// The filter `escape`, which writes as markupsafe.
fn escape(state: &mut State, value: &Value) -> Outcome<Value> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let mut escaped = text(state, value)?;
    for (c, entity) in [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ("\"", "&#34;")] {
        escaped = replace(state, &escaped, c, entity, None)?;
    }
    Ok(Value::from_safe_string(escaped))
}

/// The filter `replace`, with an optional maximal number of replacements.
fn replace_filter(
    state: &mut State,
    value: &Value,
    old: &Value,
    new: &Value,
    count: Option<i64>,
) -> Outcome<String> {
    let [value, old, new] = [text(state, value)?, text(state, old)?, text(state, new)?];
    replace(state, &value, &old, &new, count)
}

/// The filter `join`, which takes the text of values of any type.
fn join_filter(
    state: &mut State,
    value: &Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Outcome<String> {
    let separator = separator.map_or_else(|| options.get::<Option<Value>>("d"), |d| Ok(Some(d)))?;
    let attribute = attribute.map_or_else(|| options.get::<Option<Value>>("attribute"), |a| Ok(Some(a)))?;
    options.assert_all_used()?;
    let separator = separator.map_or(Ok(String::new()), |separator| text(state, &separator))?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let item = |item: Value| match &attribute {
        Some(path) => path.to_string().split('.').try_fold(item, |value, key| match key.parse::<usize>() {
            Ok(index) => value.get_item_by_index(index),
            Err(_) => value.get_attr(key),
        }),
        None => Ok(item),
    };
    join(state, value.try_iter()?.checked().map(|value| value.and_then(&item)), &separator, false)
}

/// The filter `indent`: indents all lines but the first one and blank ones. The arguments are `width`, a number of spaces or
/// a text, and whether the `first` line and `blank` lines are indented.
fn indent(state: &mut State, value: &Value, args: Rest<ValueOrKwargs>) -> Outcome<String> {
    let (width, first, blank, options): (Option<Value>, Option<bool>, Option<bool>, Kwargs) =
        from_args(&args.into_values())?;
    let width = width.map_or_else(|| options.get::<Option<Value>>("width"), |w| Ok(Some(w)))?;
    let first = first.map_or_else(|| options.get::<Option<bool>>("first"), |f| Ok(Some(f)))?;
    let blank = blank.map_or_else(|| options.get::<Option<bool>>("blank"), |b| Ok(Some(b)))?;
    options.assert_all_used()?;
    let indentation = match width.as_ref().map(|width| (width.as_str(), width.as_usize())) {
        None => " ".repeat(4),
        Some((Some(text), _)) => text.to_owned(),
        Some((None, Some(width))) => {
            charge(state, width)?;
            " ".repeat(width)
        }
        Some(_) => return Err(failed("indent: the width is neither a number nor a string")),
    };
    // With a line break at the end, a text that ends with one has a last line that is blank.
    let value = text(state, value)? + "\n";
    let mut out = String::new();
    for (at, line) in lines(&value, false).into_iter().enumerate() {
        let indented = match at {
            0 => first.unwrap_or(false),
            _ => blank.unwrap_or(false) || !line.is_empty(),
        };
        charge(state, line.len() + indentation.len() + 1)?;
        if at > 0 {
            out.push('\n');
        }
        if indented {
            out.push_str(&indentation);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// A time in the form of Python's `strftime` in the C locale, for a time without a zone.
fn strftime(time: NaiveDateTime, form: &str) -> String {
    let mut out = String::new();
    let mut rest = form;
    while let Some((before, directive)) = rest.split_once('%') {
        out.push_str(before);
        let flag = directive.find(|c| !matches!(c, '-' | '_' | '0' | '^' | '#')).unwrap_or(directive.len());
        let end = directive[flag..].chars().next().map_or(flag, |c| flag + c.len_utf8());
        let start = out.len();
        let written = match &directive[flag..end] {
            "z" | "Z" => Ok(()),
            "f" => write!(out, "{}", time.format("%6f")),
            _ => write!(out, "{}", time.format(&format!("%{}", &directive[..end]))),
        };
        // A directive that does not exist stands for itself.
        if written.is_err() {
            out.truncate(start);
            out.push('%');
            out.push_str(&directive[..end]);
        }
        rest = &directive[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use chrono::NaiveDate;

    use super::*;

    /// The texts are those of Python 3.
    #[test]
    fn times_are_written_as_python_writes_them() {
        let time = NaiveDate::from_ymd_opt(2024, 7, 5).unwrap().and_hms_micro_opt(4, 3, 2, 1234).unwrap();
        for (form, expected) in [
            ("%d %b %Y", "05 Jul 2024"),
            ("%A, %B %d, %Y", "Friday, July 05, 2024"),
            ("%Y-%m-%d %H:%M:%S.%f", "2024-07-05 04:03:02.001234"),
            ("%-d/%-m/%y %I:%M %p %j %a", "5/7/24 04:03 AM 187 Fri"),
            ("%x %X | %c", "07/05/24 04:03:02 | Fri Jul  5 04:03:02 2024"),
            ("%F %T %D %e [%Z%z] 100%%", "2024-07-05 04:03:02 07/05/24  5 [] 100%"),
            ("%U %W %V %G %u %w", "26 27 27 2024 5 5"),
            ("Ende: %Q", "Ende: %Q"),
            ("ü %", "ü %"),
        ] {
            assert_eq!(strftime(time, form), expected, "{form}");
        }
    }
}
