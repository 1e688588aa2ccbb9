//! Chat templates: Jinja as transformers renders it.
//!
//! `trim_blocks` and `lstrip_blocks` are on, values have the methods of Python's types that do not change them, `tojson`
//! writes as Python's `json.dumps`, `raise_exception` is an error with its text, `strftime_now` is the local time, and
//! `{% generation %}` blocks are rendered as their content and mark what the assistant wrote.
//!
//! Templates are untrusted. The number of their steps, their time, and the size of the texts and lists that they make are
//! limited.

mod functions;
mod json;
mod limits;
mod methods;
mod rewrite;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::io::checkpoint::{CHAT_TEMPLATE, TOKENIZER_CONFIG};

/// The name of the template in its environment.
const TEMPLATE_NAME: &str = "chat_template";

/// The role of the model.
const ASSISTANT: &str = "assistant";

/// The keys of `tokenizer_config.json` whose tokens a template can use by the same name.
const TOKEN_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who wrote it: `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    fn value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

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
    environment: Arc<Environment<'static>>,
    /// Whether it has `{% generation %}` blocks.
    has_generation: bool,
    /// The variables besides the chat.
    variables: BTreeMap<String, Value>,
}

impl ChatTemplate {
    /// The template among the files of a checkpoint folder, by file name; `None` if there is none.
    /// `chat_template.jinja` takes precedence over the key `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// A template that cannot be parsed, or a `tokenizer_config.json` of another form.
    pub fn find(files: &BTreeMap<String, Vec<u8>>) -> Result<Option<Self>> {
        let settings = settings(files)?;
        let Some(text) = text(files, &settings)? else { return Ok(None) };
        // A token is a string, or an object with the string as `content`.
        let token = |name: &&str| {
            let value = settings.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(((*name).to_owned(), text.to_owned()))
        };
        Self::new(text.to_owned(), TOKEN_KEYS.iter().filter_map(token).collect()).map(Some)
    }

    /// The text of the template among the files of a model, which is not parsed; `None` if there is none.
    ///
    /// # Errors
    /// A `tokenizer_config.json` of another form.
    pub(crate) fn source(files: &BTreeMap<String, Vec<u8>>) -> Result<Option<String>> {
        Ok(text(files, &settings(files)?)?.map(str::to_owned))
    }

    /// Parses a template. `tokens` are the special tokens by the names that the template uses, such as `bos_token`.
    ///
    /// # Errors
    /// A syntax error, with its line; a template of more than 1 MiB.
    pub fn new(template: String, tokens: BTreeMap<String, String>) -> Result<Self> {
        let fuel = limits::instructions(&template)?;
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| invalid(&e))?);
        environment.set_unknown_method_callback(methods::call);
        environment.set_formatter(limits::write_value);
        environment.set_fuel(Some(fuel));
        functions::register(&mut environment);
        // Jinja2 knows three line breaks and writes one of them.
        let template = rewrite::rewrite(&template.replace("\r\n", "\n").replace('\r', "\n"));
        let has_generation = template.contains(rewrite::GENERATION[0]);
        environment.add_template_owned(TEMPLATE_NAME, template).map_err(|e| invalid(&e))?;
        let tokens = tokens.into_iter().map(|(name, token)| (name, Value::from(token)));
        let (add_generation_prompt, none) = (Value::from(true), Value::from(()));
        let defaults =
            [("add_generation_prompt", add_generation_prompt), ("tools", none.clone()), ("documents", none)];
        let defaults = defaults.map(|(name, value)| (name.to_owned(), value));
        let variables = defaults.into_iter().chain(tokens).collect();
        Ok(Self { environment: environment.into(), has_generation, variables })
    }

    /// Adds variables that the template can use, such as `enable_thinking`: the keys of a JSON object. They take precedence
    /// over the special tokens and over `tools`, `documents` and `add_generation_prompt`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a text that is not a JSON object, and for the variable `messages`.
    pub fn with_variables(mut self, object: &str) -> Result<Self> {
        let variables: BTreeMap<String, Value> = serde_json::from_str(object).map_err(|e| {
            Error::Invalid(format!("the variables of a chat template are a JSON object: {e}"))
        })?;
        if variables.contains_key("messages") {
            return Err(Error::Invalid(
                "messages is no variable of a chat template, because it is the chat itself".into(),
            ));
        }
        self.variables.extend(variables);
        Ok(self)
    }

    /// Renders a chat of an optional system message and a user message, followed by the prompt for the model's answer.
    ///
    /// # Errors
    /// An error that the template raises, for example if it does not support system messages, or a limit that it exceeds.
    pub fn render(&self, system: Option<&str>, user: &str) -> Result<String> {
        let chat = [system.map(|text| Message::new("system", text)), Some(Message::new("user", user))];
        self.render_chat(&chat.into_iter().flatten().collect::<Vec<_>>())
    }

    /// Renders a chat, followed by the prompt for the model's answer.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_chat(&self, chat: &[Message]) -> Result<String> {
        let messages: Value = chat.iter().map(Message::value).collect();
        self.render_with([("messages", messages)])
    }

    /// Renders a chat as a text to train on or to measure: the messages under the key `messages` of the JSON object
    /// `record`, with the tools under `tools` if there are any, and without a prompt for an answer.
    ///
    /// # Errors
    /// A message without a role, or an error that the template raises.
    pub fn render_record(&self, record: &[u8]) -> Result<String> {
        self.render_part(&Record::parse(record)?, usize::MAX, false)
    }

    /// As [`ChatTemplate::render_record`], with the byte ranges of what the assistant wrote. They are the contents of the
    /// `{% generation %}` blocks of a template that has them. Those of other templates are found by rendering the chat up to
    /// each turn of the assistant: a turn is what follows the prompt for it, with the text that ends it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_record`], and [`Error::Invalid`] for a template without such blocks that writes a message in
    /// another way if others follow, or with one that writes a part of a block.
    pub fn render_turns(&self, record: &[u8]) -> Result<(String, Vec<Range<usize>>)> {
        if self.has_generation {
            return self.render_blocks(record);
        }
        let record = Record::parse(record)?;
        let text = self.render_part(&record, usize::MAX, false)?;
        let mut turns = Vec::new();
        for (at, message) in record.messages.iter().enumerate() {
            if message.get_attr("role").ok().as_ref().and_then(Value::as_str) != Some(ASSISTANT) {
                continue;
            }
            let before = self.render_part(&record, at, true)?;
            if !text.starts_with(&before) {
                return Err(Error::Invalid(format!(
                    "the chat template writes the messages before message {} in another way if others follow, so that what \
                     the assistant wrote cannot be marked",
                    at + 1
                )));
            }
            let after = self.render_part(&record, at + 1, false)?;
            let common = text.chars().zip(after.chars()).take_while(|(a, b)| a == b);
            let end: usize = common.map(|(c, _)| c.len_utf8()).sum();
            if end > before.len() {
                turns.push(before.len()..end);
            }
        }
        Ok((text, turns))
    }

    /// A chat and the byte ranges of its `{% generation %}` blocks that are not empty.
    fn render_blocks(&self, record: &[u8]) -> Result<(String, Vec<Range<usize>>)> {
        // Marks that neither the chat nor the template can contain, without characters that filters change.
        let nonce = blake3::hash(record).to_hex();
        let marks = [format!("\u{e000}{nonce}<\u{e001}"), format!("\u{e000}{nonce}>\u{e001}")];
        let mut marked = self.clone();
        let variables = rewrite::GENERATION.iter().zip(&marks);
        marked.variables.extend(variables.map(|(name, mark)| ((*name).into(), Value::from(mark.as_str()))));
        let rendered = marked.render_record(record)?;
        let (mut text, mut blocks, mut rest) = (String::new(), Vec::new(), rendered.as_str());
        while let Some((before, from)) = rest.split_once(&marks[0]) {
            // A block inside another one is a part of it.
            let (mut depth, mut inner) = (1, from);
            text.push_str(before);
            let start = text.len();
            while depth > 0 {
                let [open, close] = [0, 1].map(|i| inner.find(&marks[i]));
                let Some(close) = close else { return Err(cut_block()) };
                let at = open.filter(|open| *open < close).unwrap_or(close);
                depth = if at == close { depth - 1 } else { depth + 1 };
                text.push_str(&inner[..at]);
                inner = &inner[at + marks[0].len()..];
            }
            if text.len() > start {
                blocks.push(start..text.len());
            }
            rest = inner;
        }
        if rest.contains(&marks[1]) {
            return Err(cut_block());
        }
        text.push_str(rest);
        Ok((text, blocks))
    }

    /// The first `count` messages of a chat, with the prompt for an answer or without.
    fn render_part(&self, record: &Record, count: usize, prompt: bool) -> Result<String> {
        let messages = record.messages.iter().take(count).cloned().collect::<Value>();
        let chat = [
            ("messages", messages),
            ("tools", record.tools.clone()),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        self.render_with(chat)
    }

    /// Renders the template with these variables, which take precedence over all others.
    fn render_with<const N: usize>(&self, chat: [(&str, Value); N]) -> Result<String> {
        let mut variables = self.variables.clone();
        variables.extend(chat.map(|(name, value)| (name.to_owned(), value)));
        let environment = self.environment.clone();
        let render = move || environment.get_template(TEMPLATE_NAME)?.render(Value::from_pairs(variables));
        limits::timed(render).map_err(|e| invalid(&e))
    }
}

/// A chat in a record.
struct Record {
    messages: Vec<Value>,
    tools: Value,
}

impl Record {
    /// Reads the messages of a JSON object, each with a role, and its tools.
    fn parse(record: &[u8]) -> Result<Self> {
        let invalid = || Error::Invalid("\"messages\" is not a list of messages with a role each".into());
        // Not by way of serde_json's values, which lose the order of keys.
        let mut record: BTreeMap<String, Value> = serde_json::from_slice(record).map_err(|_| invalid())?;
        let messages = record.remove("messages").unwrap_or_default();
        let has_role = |message: Value| message.get_attr("role").is_ok_and(|role| role.as_str().is_some());
        if messages.len().is_none_or(|n| n == 0)
            || !messages.try_iter().is_ok_and(|mut all| all.all(has_role))
        {
            return Err(invalid());
        }
        let tools = record.remove("tools").unwrap_or(Value::from(()));
        let messages = messages.try_iter().map_err(|_| invalid())?.collect();
        Ok(Self { messages, tools })
    }
}

fn cut_block() -> Error {
    Error::Invalid(
        "the chat template writes a part of a generation block, so that its text cannot be marked".into(),
    )
}

fn invalid(e: &minijinja::Error) -> Error {
    Error::Invalid(format!("chat template: {e}"))
}

/// The content of `tokenizer_config.json`; null if there is none.
fn settings(files: &BTreeMap<String, Vec<u8>>) -> Result<serde_json::Value> {
    match files.get(TOKENIZER_CONFIG) {
        Some(text) => serde_json::from_slice(text).map_err(|e| named(TOKENIZER_CONFIG, &e)),
        None => Ok(serde_json::Value::Null),
    }
}

/// The text of the template.
fn text<'a>(
    files: &'a BTreeMap<String, Vec<u8>>,
    settings: &'a serde_json::Value,
) -> Result<Option<&'a str>> {
    match (files.get(CHAT_TEMPLATE), settings.get("chat_template")) {
        (Some(text), _) => std::str::from_utf8(text).map(Some).map_err(|e| named(CHAT_TEMPLATE, &e)),
        (None, None | Some(serde_json::Value::Null)) => Ok(None),
        (None, Some(serde_json::Value::String(text))) => Ok(Some(text)),
        // A list of named templates.
        (None, Some(named_templates)) => {
            let default = named_templates.as_array().into_iter().flatten().find(|t| t["name"] == "default");
            default.and_then(|t| t["template"].as_str()).map(Some).ok_or_else(|| {
                named(TOKENIZER_CONFIG, &"chat_template is neither a text nor a list with a default")
            })
        }
    }
}

fn named(name: &str, e: &dyn std::fmt::Display) -> Error {
    Error::Invalid(format!("{name}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, system: Option<&str>) -> Result<String> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new(template.to_owned(), tokens)?.render(system, " Hi\n<there> ")
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
    fn the_turns_of_the_assistant_are_marked() {
        let template = |text: &str| ChatTemplate::new(text.to_owned(), BTreeMap::new()).unwrap();
        let record = r#"{"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "A"},
            {"role": "user", "content": "B"}, {"role": "assistant", "content": "Cé"}]}"#;
        let text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
        let (rendered, turns) = template(text).render_turns(record.as_bytes()).unwrap();
        assert_eq!(rendered, "<user>é?</><assistant>A</><user>B</><assistant>Cé</>");
        let marked: Vec<_> = turns.into_iter().map(|turn| &rendered[turn]).collect();
        assert_eq!(marked, ["A</>", "Cé</>"]);
        // A template that writes the end of the text after the last message alone.
        let (rendered, turns) =
            template(&format!("{text}{{% if not add_generation_prompt %}}!{{% endif %}}"))
                .render_turns(record.as_bytes())
                .unwrap();
        assert_eq!(turns.into_iter().map(|turn| &rendered[turn]).collect::<Vec<_>>(), ["A</>", "Cé</>!"]);
        let error =
            template("{{ messages|length }}{{ messages[0].content }}").render_turns(record.as_bytes());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("the messages before message 2"), "{error}");
    }

    #[test]
    fn generation_blocks_mark_what_the_assistant_wrote() {
        let turns = |template: &str| {
            let record = r#"{"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": " A "}]}"#;
            let (text, turns) =
                ChatTemplate::new(template.into(), BTreeMap::new())?.render_turns(record.as_bytes())?;
            let marked = turns.into_iter().map(|turn| text[turn].to_owned()).collect::<Vec<_>>();
            Ok::<_, Error>((text, marked))
        };
        let (text, marked) = turns(
            "{% for m in messages %}{% if m.role == 'user' %}u:{{ m.content }};{% else %}a:\n  {%- generation -%}\n \
             {{ m.content }}<end>\n {%- endgeneration %}\n;{% endif %}{% endfor %}",
        )
        .unwrap();
        assert_eq!((text.as_str(), marked), ("u:é?;a: A <end>;", vec![" A <end>".to_owned()]));
        // Blocks that are empty, nested, or written by a macro.
        let nested = "{% generation %}{% endgeneration %}{% macro m() %}{% generation %}a{% generation %}b\
                      {% endgeneration %}{% endgeneration %}{% endmacro %}x{{ m() }}y";
        assert_eq!(turns(nested).unwrap(), ("xaby".into(), vec!["ab".into()]));
        let error = turns("{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[:-3] }}");
        assert!(error.unwrap_err().to_string().contains("a part of a generation block"));
    }

    #[test]
    fn variables_are_given_as_a_json_object() {
        let template =
            "{{ bos_token }}{{ enable_thinking is defined and not enable_thinking }}{{ tools|tojson }}";
        let template = ChatTemplate::new(template.to_owned(), BTreeMap::new()).unwrap();
        assert_eq!(template.render(None, "Hi").unwrap(), "Falsenull");
        let variables =
            r#"{"enable_thinking": false, "tools": [{"name": "b", "about": "a"}], "bos_token": "<b>"}"#;
        let rendered = template.clone().with_variables(variables).unwrap().render(None, "Hi").unwrap();
        assert_eq!(rendered, r#"<b>True[{"name": "b", "about": "a"}]"#);
        for (variables, reason) in
            [("[1]", "a JSON object"), ("{", "a JSON object"), (r#"{"messages": []}"#, "the chat itself")]
        {
            let error = template.clone().with_variables(variables).unwrap_err().to_string();
            assert!(error.contains(reason), "{variables}: {error}");
        }
    }

    #[test]
    fn raised_and_syntax_errors_are_reported() {
        let error = render("{{ raise_exception('no system turn') }}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("no system turn"), "{error}");
        let error = render("{% for %}", None).unwrap_err().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
        let error = render("{{ 1 }}\n{{ [].append(1) }}", None).unwrap_err().to_string();
        assert!(error.contains("append") && error.contains("chat_template:2"), "{error}");
    }
}
