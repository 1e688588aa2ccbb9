//! Chat templates: Jinja with the options of transformers.
//!
//! `trim_blocks` and `lstrip_blocks` are on, values have the methods of Python's types, `tojson` writes as Python's
//! `json.dumps`, and `raise_exception` is an error with its text. The function `strftime_now` is not defined, so that the
//! same chat always gives the same text; templates that test for it use their default date.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::{Error, Result};
use crate::io::checkpoint::{CHAT_TEMPLATE, TOKENIZER_CONFIG};

/// The name of the template in its environment.
const TEMPLATE_NAME: &str = "chat_template";

/// The maximal number of instructions of a template (minijinja's fuel); a chat takes a few thousand.
const MAX_INSTRUCTIONS: u64 = 10_000_000;

/// A parsed chat template.
///
/// ```
/// use std::collections::BTreeMap;
/// use gd_model::io::chat_template::ChatTemplate;
///
/// let text = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";
/// let template = ChatTemplate::new(text.into(), BTreeMap::new())?;
/// assert_eq!(template.render(Some("Be brief."), "Hi")?, "system: Be brief.\nuser: Hi\nassistant:");
/// # Ok::<(), gd_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The special tokens by name, such as `bos_token`.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template among the files of a checkpoint folder, by file name; `None` if there is none.
    /// `chat_template.jinja` takes precedence over the key `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// A template that cannot be parsed, or a `tokenizer_config.json` of another form.
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
            // A list of named templates.
            (None, Some(named_templates)) => {
                let default =
                    named_templates.as_array().into_iter().flatten().find(|t| t["name"] == "default");
                default.and_then(|t| t["template"].as_str()).ok_or_else(|| {
                    named(TOKENIZER_CONFIG, &"chat_template is neither a text nor a list with a default")
                })?
            }
        };
        // A token is a string, or an object with the string as `content`.
        let token = |name: &&str| {
            let value = settings.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(((*name).to_owned(), text.to_owned()))
        };
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].iter().filter_map(token).collect();
        Self::new(text.to_owned(), tokens).map(Some)
    }

    /// Parses a template. `tokens` are the special tokens by the names that the template uses, such as `bos_token`.
    ///
    /// # Errors
    /// A syntax error, with its line.
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
        // Templates are untrusted, and one could otherwise run without end.
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        environment.add_template_owned(TEMPLATE_NAME, template).map_err(|e| invalid(&e))?;
        Ok(Self { environment, tokens })
    }

    /// Renders a chat of an optional system message and a user message, followed by the prompt for the model's answer.
    ///
    /// # Errors
    /// An error that the template raises, for example if it does not support system messages.
    pub fn render(&self, system: Option<&str>, user: &str) -> Result<String> {
        let turn = |(role, content): (&str, &str)| Value::from_pairs([("role", role), ("content", content)]);
        let turns = [system.map(|text| ("system", text)), Some(("user", user))];
        let messages: Vec<_> = turns.into_iter().flatten().map(turn).collect();
        self.render_messages(messages.into(), Value::from(()), true)
    }

    /// Renders a chat as a text to train on or to measure: the messages under the key `messages` of `record`, with the
    /// tools under `tools` if there are any, and without a prompt for an answer.
    ///
    /// # Errors
    /// A message without a role, or an error that the template raises.
    pub fn render_record(&self, record: &serde_json::Value) -> Result<String> {
        let messages = record.get("messages").and_then(serde_json::Value::as_array);
        let is_message =
            |message: &serde_json::Value| message.get("role").is_some_and(|role| role.is_string());
        match messages {
            Some(messages) if !messages.is_empty() && messages.iter().all(is_message) => {
                let tools = record.get("tools").map_or(Value::from(()), |tools| Value::from(Serde(tools)));
                self.render_messages(Value::from(Serde(messages)), tools, false)
            }
            _ => Err(Error::Invalid("\"messages\" is not a list of messages with a role each".into())),
        }
    }

    fn render_messages(&self, messages: Value, tools: Value, add_generation_prompt: bool) -> Result<String> {
        let values = context! {
            messages,
            tools,
            add_generation_prompt,
            documents => Value::from(()),
            ..Value::from_pairs(self.tokens.clone())
        };
        self.environment.get_template(TEMPLATE_NAME).and_then(|t| t.render(values)).map_err(|e| invalid(&e))
    }
}

fn invalid(e: &minijinja::Error) -> Error {
    Error::Invalid(format!("chat template: {e}"))
}

/// Formats JSON on one line with a space after `,` and `:`, as Python's `json.dumps`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
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

/// The filter `tojson` of transformers, with its options `indent` and `ensure_ascii`.
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
    // Accepted without effect: characters outside ASCII are never escaped, which is the default of transformers.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    match options.get::<Option<usize>>("indent")? {
        Some(indent) => write(value, PrettyFormatter::with_indent(" ".repeat(indent.min(16)).as_bytes())),
        None => write(value, PythonFormatter),
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
    fn block_lines_are_trimmed_and_values_have_python_methods() {
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
    fn the_template_file_takes_precedence_and_a_list_gives_its_default() {
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
    fn a_template_with_too_many_steps_is_stopped() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let error = render(loops, None).unwrap_err().to_string();
        assert!(error.contains("fuel"), "{error}");
    }

    #[test]
    fn raised_and_syntax_errors_are_reported() {
        let error = render("{{ raise_exception('no system turn') }}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("no system turn"), "{error}");
        let error = render("{% for %}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
    }
}
