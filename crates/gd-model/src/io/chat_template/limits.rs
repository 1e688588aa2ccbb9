//! Limits on what a template may do. Each of them is far above what a chat needs.

use std::fmt::{self, Write};

use minijinja::value::{Value, ValueKind};
use minijinja::{ErrorKind, Output, State, escape_formatter};

use crate::error::{Error, Result};

/// The result of a function that a template calls.
pub(super) type Outcome<T> = std::result::Result<T, minijinja::Error>;

/// The maximal length of a template in bytes.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// The maximal number of instructions of a template (minijinja's fuel); a chat takes a few thousand.
const MAX_INSTRUCTIONS: u64 = 10_000_000;
/// The maximal number of bytes that the instructions of a template may copy from the template itself.
const MAX_COPIED_BYTES: u64 = 1 << 30;
/// The maximal number of bytes of the texts and lists that a template makes.
const MAX_BYTES: usize = 1 << 26;
/// The number of bytes that a value counts besides its text.
const VALUE_BYTES: usize = 32;

/// The number of instructions that a template may take.
///
/// # Errors
/// A template of more than 1 MiB.
pub(super) fn instructions(template: &str) -> Result<u64> {
    if template.len() > MAX_TEMPLATE_BYTES {
        let (bytes, limit) = (template.len(), MAX_TEMPLATE_BYTES);
        return Err(Error::Invalid(format!(
            "chat template: its {bytes} bytes are more than the {limit} that are allowed"
        )));
    }
    Ok(MAX_INSTRUCTIONS.min(MAX_COPIED_BYTES / template.len().max(1) as u64))
}

/// The bytes that a rendering has made so far.
#[derive(Default)]
struct Spent(usize);

/// The error of an operation with this text.
pub(super) fn failed(text: impl Into<std::borrow::Cow<'static, str>>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, text)
}

fn too_large() -> minijinja::Error {
    failed(format!("the template makes texts and lists of more than {} MiB", MAX_BYTES >> 20))
}

/// The number of bytes that the rendering may still make.
pub(super) fn available(state: &mut State) -> usize {
    MAX_BYTES - state.get_or_insert_extension(Spent::default()).0
}

/// Counts bytes that are made. To be called before they are allocated.
pub(super) fn charge(state: &mut State, bytes: usize) -> Outcome<()> {
    let Spent(spent) = state.get_or_insert_extension(Spent::default());
    *spent = spent.checked_add(bytes).filter(|sum| *sum <= MAX_BYTES).ok_or_else(too_large)?;
    Ok(())
}

/// Returns a value after its size was counted.
pub(super) fn limited(state: &mut State, value: Value) -> Outcome<Value> {
    let mut left = available(state);
    let before = left;
    if !subtract_size(&value, &mut left)? {
        return Err(too_large());
    }
    charge(state, before - left)?;
    Ok(value)
}

/// Subtracts the size of a value, with all that it contains, from `left`. Returns whether it is at most `left`.
fn subtract_size(value: &Value, left: &mut usize) -> Outcome<bool> {
    let own = match value.as_str() {
        Some(text) => VALUE_BYTES + text.len(),
        None => VALUE_BYTES,
    };
    if own > *left {
        return Ok(false);
    }
    *left -= own;
    // Namespaces and macros are not of these kinds.
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(true);
    }
    if value.len().is_some_and(|items| items > *left / VALUE_BYTES) {
        return Ok(false);
    }
    for item in value.try_iter()?.checked() {
        let item = item?;
        let fits = subtract_size(&item, left)?
            && (value.kind() != ValueKind::Map || subtract_size(&value.get_item(&item)?, left)?);
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The text of a number, as `repr()` of Python gives it.
pub(super) fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() && float.is_finite() => {
            // Rust writes the exponent without sign and padding.
            let text = format!("{float:?}");
            match text
                .split_once('e')
                .and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?)))
            {
                Some((digits, exponent)) => format!("{digits}e{exponent:+03}"),
                None => text,
            }
        }
        _ => value.to_string(),
    }
}

/// The text of a value, as `str()` gives it.
pub(super) fn text(state: &mut State, value: &Value) -> Outcome<String> {
    /// Writes up to a number of bytes.
    struct Limited(String, usize);
    impl Write for Limited {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.1 = self.1.checked_sub(text.len()).ok_or(fmt::Error)?;
            self.0.push_str(text);
            Ok(())
        }
    }
    let mut out = Limited(String::new(), available(state));
    match value.kind() {
        ValueKind::Number => write!(out, "{}", number(value)),
        _ => write!(out, "{value}"),
    }
    .map_err(|_| too_large())?;
    charge(state, out.0.len())?;
    Ok(out.0)
}

/// Writes the value of an expression.
pub(super) fn write_value(out: &mut Output, state: &mut State, value: &Value) -> Outcome<()> {
    match value.as_str() {
        Some(text) => {
            charge(state, text.len())?;
            escape_formatter(out, state, value)
        }
        None => {
            let text = text(state, value)?;
            escape_formatter(out, state, &Value::from(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::io::chat_template::ChatTemplate;

    fn error(template: &str) -> String {
        let template = ChatTemplate::new(template.to_owned(), BTreeMap::new());
        template.and_then(|template| template.render(None, "Hi")).unwrap_err().to_string()
    }

    #[test]
    fn steps_are_limited() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(error(loops).contains("fuel"), "{}", error(loops));
        let long = format!(
            "{{% for a in range(99999) %}}{{% for b in range(99999) %}}{}{{% endfor %}}{{% endfor %}}",
            "long text ".repeat(50_000)
        );
        assert!(error(&long).contains("fuel"), "{}", error(&long));
        assert!(error(&"x".repeat(2 << 20)).contains("2097152 bytes"));
    }

    /// Doubling in 60 steps, or one step that makes as much, must fail before the memory is taken.
    #[test]
    fn the_size_of_values_is_limited() {
        let doubling = |start: &str, doubled: &str| {
            format!(
                "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {doubled} %}}\
                 {{% endfor %}}{{{{ ns.x|length }}}}"
            )
        };
        let templates = [
            doubling("[1]", "ns.x + ns.x"),
            doubling("'ab'", "ns.x ~ ns.x"),
            doubling("'ab'", "ns.x + ns.x"),
            doubling("'ab'", "ns.x * 2"),
            doubling("(1,)", "ns.x * 2"),
            doubling("[1]", "[ns.x, ns.x]"),
            doubling("[1]", "{'a': ns.x, 'b': ns.x}"),
            doubling("'ab'", "'%s%s' % (ns.x, ns.x)"),
            doubling("'ab'", "[ns.x, ns.x]|join"),
            doubling("'ab'", "''.join([ns.x, ns.x])"),
            doubling("'ab'", "'{}{}'.format(ns.x, ns.x)"),
            doubling("'ab'", "ns.x|replace('a', 'aab')|replace('b', 'ba')"),
            doubling("'ab'", "ns.x.replace('a', 'aa').replace('b', 'bb')"),
            doubling("[1]", "[ns.x, ns.x]|tojson"),
            "{% macro m(s, n) %}{% if n %}{{ m(s ~ s, n - 1) }}{% else %}{{ s|length }}{% endif %}{% endmacro %}{{ m('ab', 60) }}".into(),
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}".into(),
            "{% set ns = namespace(l=[], s='ab' * 1000000) %}{% for i in range(99999) %}{% set ns.l = [ns.l, ns.s|upper] %}{% endfor %}".into(),
            "{{ '%999999999d' % 1 }}".into(),
            "{{ '%999999999d'|format(1) }}".into(),
            "{{ '{:999999999}'.format(1) }}".into(),
            "{{ 'a'.ljust(999999999) }}{{ 'a'.center(999999999) }}".into(),
            "{{ ('a\n' * 99999)|indent(999999) }}".into(),
            "{{ [1]|batch(999999999, 'x')|list }}".into(),
            "{{ [1]|slice(999999999, 'x')|list }}".into(),
            "{% set s = 'a' * 1000000 %}{{ s|replace('a', s) }}".into(),
            "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}".into(),
            "{% set s = 'a' * 1000000 %}{{ s.join(['b'] * 99999) }}".into(),
            "{% set s = 'a' * 1000000 %}{{ ([s] * 99999)|join }}".into(),
            "{% set s = 'a' * 1000000 %}{{ ([s] * 99999)|tojson }}{{ ([s] * 99999)|string }}".into(),
        ];
        for template in &templates {
            let error = error(template);
            assert!(
                ["MiB", "too large", "recursion"].iter().any(|e| error.contains(e)),
                "{template}: {error}"
            );
        }
        gd_testing::log_cases("template-limits", templates.len());
    }
}
