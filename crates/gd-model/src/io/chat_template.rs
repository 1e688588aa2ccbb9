//! Chat templates: Jinja as transformers runs it.
//!
//! Lines that hold only a block leave no trace (`trim_blocks`, `lstrip_blocks`), values have Python's methods,
//! `tojson` writes as Python's `json.dumps`, and `raise_exception` ends with its text. There is no
//! `strftime_now`: a template that asks for the date takes the one written in it, so that the same chat is
//! the same text tomorrow.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::{Error, Result};
use crate::io::checkpoint::{CHAT_TEMPLATE, TOKENIZER_CONFIG};

/// The only template of its environment.
const NAME: &str = "chat_template";

/// The most steps of a template: thousands of times what a chat takes.
const FUEL: u64 = 10_000_000;

/// A chat template that has been parsed.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens by their names, such as `bos_token`.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template among the files of a checkpoint folder, if there is one: that of its own file before that of
    /// the tokenizer's settings.
    ///
    /// # Errors
    /// A template that cannot be parsed, or settings of another form.
    pub fn find(files: &BTreeMap<String, Vec<u8>>) -> Result<Option<Self>> {
        let named = |name: &str, e: &dyn std::fmt::Display| Error::Invalid(format!("{name}: {e}"));
        let settings: serde_json::Value = match files.get(TOKENIZER_CONFIG) {
            Some(text) => serde_json::from_slice(text).map_err(|e| named(TOKENIZER_CONFIG, &e))?,
            None => serde_json::Value::Null,
        };
        let text = match (files.get(CHAT_TEMPLATE), settings.get("chat_template")) {
            (Some(text), _) => std::str::from_utf8(text).map_err(|e| named(CHAT_TEMPLATE, &e))?,
            (None, None | Some(serde_json::Value::Null)) => return Ok(None),
            (None, Some(serde_json::Value::String(text))) => text,
            // Several by name: the one for a plain chat.
            (None, Some(several)) => {
                let default = several.as_array().into_iter().flatten().find(|t| t["name"] == "default");
                default.and_then(|t| t["template"].as_str()).ok_or_else(|| {
                    named(TOKENIZER_CONFIG, &"chat_template is neither a text nor a list with a default")
                })?
            }
        };
        // A token is its text, or an object that has it.
        let token = |name: &&str| {
            let value = settings.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(((*name).to_owned(), text.to_owned()))
        };
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].iter().filter_map(token).collect();
        Self::new(text.to_owned(), tokens).map(Some)
    }

    /// Parses a template, which may use the special `tokens` by name.
    ///
    /// # Errors
    /// Names what in the template cannot be parsed.
    pub fn new(template: String, tokens: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| invalid(&e))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |text: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
            },
        );
        environment.add_filter("tojson", to_json);
        // A template comes from whoever made the model: one that would run for hours is refused.
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned(NAME, template).map_err(|e| invalid(&e))?;
        Ok(Self { environment, tokens })
    }

    /// The text that asks the model to answer `user`.
    ///
    /// # Errors
    /// What the template raises, such as that it knows no system message.
    pub fn render(&self, system: Option<&str>, user: &str) -> Result<String> {
        let turn = |(role, content): (&str, &str)| Value::from_pairs([("role", role), ("content", content)]);
        let turns = [system.map(|text| ("system", text)), Some(("user", user))];
        let values = context! {
            messages => turns.into_iter().flatten().map(turn).collect::<Vec<_>>(),
            add_generation_prompt => true,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_pairs(self.tokens.clone())
        };
        self.environment.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| invalid(&e))
    }
}

fn invalid(e: &minijinja::Error) -> Error {
    Error::Invalid(format!("chat template: {e}"))
}

/// JSON with Python's spaces.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    fn write<F: Formatter>(value: &Value, form: F) -> std::result::Result<Value, minijinja::Error> {
        let mut text = Vec::new();
        let failed = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
        value
            .serialize(&mut Serializer::with_formatter(&mut text, form))
            .map_err(|e| failed(e.to_string()))?;
        let text = String::from_utf8(text).map_err(|e| failed(e.to_string()))?;
        Ok(Value::from_safe_string(text))
    }
    // Escapes of characters beyond ASCII are off in transformers, too.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    match options.get::<Option<usize>>("indent")? {
        Some(indent) => write(value, PrettyFormatter::with_indent(" ".repeat(indent.min(16)).as_bytes())),
        None => write(value, Python),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, system: Option<&str>) -> Result<String> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new(template.to_owned(), tokens)?.render(system, " Hi\n<there> ")
    }

    #[test]
    fn lines_of_blocks_leave_no_trace_and_values_have_methods() {
        let template = "{{ bos_token }}\n{% for message in messages %}\n    {% if message.role == 'system' %}\n\
                        S:{{ message['content'].upper() }}\n    {% elif message['role'] == 'user' %}\n\
                        U:{{ message.content.strip() }}|{{ loop.first }}\n    {% endif %}\n{% endfor %}\n\
                        {% if add_generation_prompt and not tools %}A:{% endif %}";
        assert_eq!(render(template, None).unwrap(), "<s>\nU:Hi\n<there>|True\nA:");
        assert_eq!(render(template, Some("be kind")).unwrap(), "<s>\nS:BE KIND\nU:Hi\n<there>|False\nA:");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let text = render("{{ messages | tojson }}{{ [1, 'ü<'] | tojson(indent=2) }}", None).unwrap();
        assert_eq!(text, "[{\"content\": \" Hi\\n<there> \", \"role\": \"user\"}][\n  1,\n  \"ü<\"\n]");
    }

    #[test]
    fn a_template_of_its_own_comes_before_the_settings_and_a_list_gives_its_default() {
        let settings = serde_json::json!({
            "bos_token": { "content": "<s>" },
            "eos_token": "</s>",
            "chat_template": [
                { "name": "tool_use", "template": "tools" },
                { "name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}" },
            ],
        });
        let mut files = BTreeMap::from([(TOKENIZER_CONFIG.to_owned(), settings.to_string().into_bytes())]);
        let render = |files: &BTreeMap<_, _>| {
            let template = ChatTemplate::find(files).unwrap().unwrap();
            template.render(None, "Hi").unwrap()
        };
        assert_eq!(render(&files), "<s>Hi</s>");
        files.insert(CHAT_TEMPLATE.to_owned(), b"own {{ messages|length }}".to_vec());
        assert_eq!(render(&files), "own 1");
        assert!(ChatTemplate::find(&BTreeMap::new()).unwrap().is_none());
        files = BTreeMap::from([(TOKENIZER_CONFIG.to_owned(), b"{\"chat_template\": 3}".to_vec())]);
        let error = ChatTemplate::find(&files).unwrap_err().to_string();
        assert!(error.starts_with("tokenizer_config.json: chat_template"), "{error}");
    }

    #[test]
    fn a_template_that_would_not_end_is_stopped() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let error = render(loops, None).unwrap_err().to_string();
        assert!(error.contains("fuel"), "{error}");
    }

    #[test]
    fn what_a_template_raises_and_what_cannot_be_parsed_is_named() {
        let error = render("{{ raise_exception('no system turn') }}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("no system turn"), "{error}");
        let error = render("{% for %}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
    }
}
