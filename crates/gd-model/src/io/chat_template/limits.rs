//! Limits on what a template may do. Each of them is far above what a chat needs.

use std::fmt::{self, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use minijinja::value::{DynObject, Value, ValueKind};
use minijinja::{ErrorKind, Output, State, escape_formatter};

use crate::error::{Error, Result};
use crate::io::panic::catch_panic;

/// The result of a function that a template calls.
pub(super) type Outcome<T> = std::result::Result<T, minijinja::Error>;

/// The maximal length of a template in bytes.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// The maximal number of instructions of a template (minijinja's fuel); a chat takes a few thousand.
const MAX_INSTRUCTIONS: u64 = 10_000_000;
/// The maximal number of bytes that the instructions of a template may copy from the template itself.
const MAX_COPIED_BYTES: u64 = 1 << 30;
/// The maximal number of bytes of the texts and lists that a template makes. Unit tests reach a smaller one sooner.
const MAX_BYTES: usize = if cfg!(test) { 1 << 22 } else { 1 << 26 };
/// The maximal number of bytes of a single text or list. An operation may make a list of its characters before its size is
/// counted, which takes 50 times as much.
const MAX_VALUE_BYTES: usize = MAX_BYTES / 4;
/// The maximal time of a rendering.
const MAX_TIME: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
/// The stack of the thread of a rendering, as that of a main thread: templates may nest calls.
const STACK_BYTES: usize = 8 << 20;
/// The number of bytes that a value counts besides its text.
pub(super) const VALUE_BYTES: usize = 32;
/// The maximal depth of lists and dictionaries in each other.
const MAX_DEPTH: usize = 100;

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

/// What a rendering has used so far.
struct Spent {
    bytes: usize,
    start: Instant,
}

impl Default for Spent {
    fn default() -> Self {
        Self { bytes: 0, start: Instant::now() }
    }
}

/// Runs `render` in a thread of its own and returns its result, or an error after 10 seconds. The thread then ends at the next
/// value that it makes, or when its steps are used up.
pub(super) fn timed<T: Send + 'static>(render: impl FnOnce() -> Outcome<T> + Send + 'static) -> Outcome<T> {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        // After the time is up, nobody receives.
        let _ = sender.send(catch_panic(render).unwrap_or_else(|panic| Err(failed(panic))));
    };
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work);
    thread.map_err(|e| failed(format!("no thread to render in: {e}")))?;
    receiver.recv_timeout(MAX_TIME).unwrap_or_else(|e| {
        Err(match e {
            mpsc::RecvTimeoutError::Timeout => too_slow(),
            mpsc::RecvTimeoutError::Disconnected => failed("the template cannot be rendered"),
        })
    })
}

fn too_slow() -> minijinja::Error {
    failed(format!("the template takes more than {} seconds", MAX_TIME.as_secs()))
}

/// The error of an operation with this text.
pub(super) fn failed(text: impl Into<std::borrow::Cow<'static, str>>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, text)
}

fn too_large() -> minijinja::Error {
    failed(format!(
        "the template makes texts and lists of more than {} MiB, or one of more than {} MiB",
        MAX_BYTES >> 20,
        MAX_VALUE_BYTES >> 20
    ))
}

/// The number of bytes that the rendering may still make.
pub(super) fn available(state: &mut State) -> usize {
    (MAX_BYTES - state.get_or_insert_extension(Spent::default()).bytes).min(MAX_VALUE_BYTES)
}

/// Counts bytes that are made. To be called before they are allocated.
pub(super) fn charge(state: &mut State, bytes: usize) -> Outcome<()> {
    let spent = state.get_or_insert_extension(Spent::default());
    if spent.start.elapsed() > MAX_TIME {
        return Err(too_slow());
    }
    if bytes > MAX_VALUE_BYTES {
        return Err(too_large());
    }
    spent.bytes = spent.bytes.checked_add(bytes).filter(|sum| *sum <= MAX_BYTES).ok_or_else(too_large)?;
    Ok(())
}

/// Returns a value after its size was counted.
pub(super) fn limited(state: &mut State, value: Value) -> Outcome<Value> {
    let mut left = available(state);
    let before = left;
    if !subtract_size(&value, &mut left, 0)? {
        return Err(too_large());
    }
    charge(state, before - left)?;
    Ok(value)
}

/// Returns a value that is assigned to an attribute of a namespace. A namespace in it could lead back to the first one, and
/// such a value has no end.
pub(super) fn attribute(state: &mut State, value: Value) -> Outcome<Value> {
    fn has_namespace(value: &Value) -> bool {
        let named = |object: &DynObject| object.type_name().ends_with("::Namespace");
        value.as_object().is_some_and(named)
            || (is_container(value)
                && value.try_iter().is_ok_and(|mut items| {
                    items.any(|item| {
                        let entry = value.kind() == ValueKind::Map;
                        has_namespace(&item)
                            || entry && value.get_item(&item).is_ok_and(|item| has_namespace(&item))
                    })
                }))
    }
    let value = limited(state, value)?;
    match has_namespace(&value) {
        true => Err(failed("a namespace cannot be an attribute of a namespace")),
        false => Ok(value),
    }
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// Subtracts the size of a value, with all that it contains, from `left`. Returns whether it is at most `left`.
fn subtract_size(value: &Value, left: &mut usize, depth: usize) -> Outcome<bool> {
    if depth > MAX_DEPTH {
        return Err(failed(format!("lists and dictionaries are nested in more than {MAX_DEPTH} others")));
    }
    let own = VALUE_BYTES + value.as_str().map_or(0, str::len);
    if own > *left {
        return Ok(false);
    }
    *left -= own;
    if !is_container(value) {
        return Ok(true);
    }
    if value.len().is_some_and(|items| items > *left / VALUE_BYTES) {
        return Ok(false);
    }
    for item in value.try_iter()?.checked() {
        let item = item?;
        let entry = match value.kind() {
            ValueKind::Map => Some(value.get_item(&item)?),
            _ => None,
        };
        for part in [Some(item), entry].iter().flatten() {
            if !subtract_size(part, left, depth + 1)? {
                return Ok(false);
            }
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
        let loops = "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}";
        // On a slow machine the time is up first.
        let reason = error(loops);
        assert!(reason.contains("fuel") || reason.contains("seconds"), "{reason}");
        let long = format!(
            "{{% set r = range(9999) %}}{{% for a in r %}}{{% for b in r %}}{}{{% endfor %}}{{% endfor %}}",
            "long text ".repeat(50_000)
        );
        let reason = error(&long);
        assert!(reason.contains("fuel"), "{reason}");
        assert!(error(&"x".repeat(2 << 20)).contains("2097152 bytes"));
    }

    /// A few instructions, each of which compares or searches a list, would take hours.
    #[test]
    fn time_is_limited() {
        let lists = "{% set a = range(9999)|list %}{% set b = range(9999)|list %}{% for i in range(9999) %}\
                     {% for j in range(900) %}{% if a == b and 'x' in a %}{% endif %}{% endfor %}{% endfor %}";
        let start = std::time::Instant::now();
        let error = error(lists);
        assert!(error.contains("seconds"), "{error}");
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
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
            "{% set a = [1] %}{% set b = [1] %}".to_owned()
                + &"{% set a = [a, a] %}{% set b = [b, b] %}".repeat(60)
                + "{{ a == b }}",
            "{% set s = 'ab' * 10000000 %}".to_owned() + &"{% set a = s|upper %}".repeat(1000),
            "{% set s = 'ab' * 10000000 %}{% set a = [".to_owned() + &"s[1:], ".repeat(1000) + "s] %}",
            "{% set ns = namespace(s='ab' * 1000000, p=none) %}{% for i in range(99999) %}{% set ns.p = namespace(p=ns.p, s=ns.s.upper()) %}{% endfor %}".into(),
            "{% set a = [1] %}".to_owned() + &"{% set a = a, a %}".repeat(60) + "{{ a }}",
            "{% set a = namespace(x=1) %}{% set a.b = [a] %}{{ a }}".into(),
            "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}".into(),
            "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}".into(),
            "{% set s = 'a' * 60000000 %}{{ s|list|length }}{{ s|sort|length }}".into(),
            "{% set s = 'a' * 16000000 %}{{ s.split('a')|length }}".into(),
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
                ["MiB", "too large", "recursion", "nested", "attribute of a namespace"]
                    .iter()
                    .any(|e| error.contains(e)),
                "{template}: {error}"
            );
        }
        gd_testing::log_cases("template-limits", templates.len());
    }
}
