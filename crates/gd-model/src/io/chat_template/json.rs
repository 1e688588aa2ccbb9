//! The filter `tojson`, which writes as `json.dumps` of Python with the arguments that transformers passes on.

use minijinja::State;
use minijinja::value::{Kwargs, Value, ValueKind};

use super::limits::{Outcome, charge, failed, number};

/// How `json.dumps` writes.
struct Options {
    /// The indentation of a level. Without it everything is on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    /// Whether characters outside ASCII are escaped.
    ensure_ascii: bool,
}

/// The maximal depth of nested values.
const MAX_DEPTH: usize = 128;

/// The filter `tojson` with the arguments `ensure_ascii`, `indent`, `separators` and `sort_keys`.
pub(super) fn to_json(
    state: &mut State,
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    options: Kwargs,
) -> Outcome<Value> {
    let ensure_ascii =
        ensure_ascii.map_or_else(|| options.get::<Option<bool>>("ensure_ascii"), |a| Ok(Some(a)))?;
    let indent = indent.map_or_else(|| options.get::<Option<Value>>("indent"), |i| Ok(Some(i)))?;
    let indent = match indent.filter(|indent| !indent.is_none() && !indent.is_undefined()) {
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) => {
                charge(state, width)?;
                " ".repeat(width)
            }
            (None, None) => {
                return Err(failed(format!("tojson: indent is {indent}, not a number or a string")));
            }
        }),
        None => None,
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let default = if indent.is_some() { "," } else { ", " };
    let [item_separator, key_separator] = match separators {
        Some(separators) => separators.try_into().map_err(|_| failed("tojson: separators are two texts"))?,
        None => [default.to_owned(), ": ".to_owned()],
    };
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let ensure_ascii = ensure_ascii.unwrap_or(false);
    let form = Options { indent, item_separator, key_separator, sort_keys, ensure_ascii };
    let mut out = String::new();
    write(state, &form, value, 0, &mut out)?;
    Ok(Value::from(out))
}

/// Adds text to the output.
fn push(state: &mut State, out: &mut String, text: &str) -> Outcome<()> {
    charge(state, text.len())?;
    out.push_str(text);
    Ok(())
}

fn write(state: &mut State, form: &Options, value: &Value, depth: usize, out: &mut String) -> Outcome<()> {
    if depth > MAX_DEPTH {
        return Err(failed(format!("tojson: more than {MAX_DEPTH} nested values")));
    }
    match value.kind() {
        ValueKind::None => push(state, out, "null"),
        ValueKind::Bool => push(state, out, if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let number = number(value);
            let number = match number.as_str() {
                "nan" | "NaN" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                finite => finite,
            };
            push(state, out, number)
        }
        ValueKind::String => string(state, form, value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.checked();
            list(state, form, items, ["[", "]"], depth, out, |state, item, out| {
                write(state, form, &item, depth + 1, out)
            })
        }
        ValueKind::Map => {
            let mut keys = value.try_iter()?.checked().collect::<Outcome<Vec<_>>>()?;
            if form.sort_keys {
                keys.sort();
            }
            list(state, form, keys.into_iter().map(Ok), ["{", "}"], depth, out, |state, key, out| {
                match key.as_str() {
                    Some(key) => string(state, form, key, out)?,
                    None => {
                        let mut text = String::new();
                        write(state, form, &key, depth + 1, &mut text)?;
                        string(state, form, &text, out)?;
                    }
                }
                push(state, out, &form.key_separator)?;
                write(state, form, &value.get_item(&key)?, depth + 1, out)
            })
        }
        kind => Err(failed(format!("tojson: a value of type {kind} is not JSON"))),
    }
}

/// Writes the items of a list or dictionary.
fn list(
    state: &mut State,
    form: &Options,
    items: impl Iterator<Item = Outcome<Value>>,
    [open, close]: [&str; 2],
    depth: usize,
    out: &mut String,
    mut write_item: impl FnMut(&mut State, Value, &mut String) -> Outcome<()>,
) -> Outcome<()> {
    let new_line = |state: &mut State, out: &mut String, depth: usize| -> Outcome<()> {
        let Some(indent) = &form.indent else { return Ok(()) };
        charge(state, 1 + depth * indent.len())?;
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(indent));
        Ok(())
    };
    push(state, out, open)?;
    let mut empty = true;
    for item in items {
        if !std::mem::replace(&mut empty, false) {
            push(state, out, &form.item_separator)?;
        }
        new_line(state, out, depth + 1)?;
        write_item(state, item?, out)?;
    }
    if !empty {
        new_line(state, out, depth)?;
    }
    push(state, out, close)
}

fn string(state: &mut State, form: &Options, text: &str, out: &mut String) -> Outcome<()> {
    charge(state, text.len() + 2)?;
    let quoted = serde_json::to_string(text).map_err(|e| failed(e.to_string()))?;
    if !form.ensure_ascii {
        return push(state, out, &quoted);
    }
    let mut units = [0; 2];
    for c in quoted.chars() {
        match c.is_ascii() && c != '\u{7f}' {
            true => out.push(c),
            false => {
                c.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")))
            }
        }
    }
    Ok(())
}
