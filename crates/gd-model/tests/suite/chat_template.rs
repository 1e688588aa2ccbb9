//! Chat templates are rendered as by Jinja2 with the options of transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use gd_model::data::encode_turns;
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::log_cases;
use serde::Deserialize;

/// A rendering by Jinja2.
#[derive(Deserialize)]
struct Case {
    /// The name of the file with the template.
    file: Option<String>,
    /// The template, if it is not in a file.
    template: Option<String>,
    /// A JSON object. The order of its keys matters.
    variables: String,
    system: Option<String>,
    user: String,
    /// The rendered text; `None` for an error.
    text: Option<String>,
}

/// The renderings of scripts/golden/chat_templates.py: templates in the manner of public models, and one for each
/// construct.
#[test]
fn renderings_equal_those_of_jinja2() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates");
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(folder.join("golden.json"))?)?;
    let tokens: BTreeMap<_, _> =
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.into(), v.into())).into();
    let mut differences = Vec::new();
    for case in &cases {
        let template = match &case.file {
            Some(name) => fs::read_to_string(folder.join(name))?,
            None => case.template.clone().context("a template")?,
        };
        let rendered = ChatTemplate::new(template.clone(), tokens.clone())
            .and_then(|template| template.with_variables(&case.variables))
            .and_then(|template| template.render(case.system.as_deref(), &case.user));
        if rendered.as_ref().ok() != case.text.as_ref() {
            let name = case.file.as_ref().unwrap_or(&template);
            let (variables, expected) = (&case.variables, &case.text);
            differences.push(format!("{name} {variables}\n  is  {rendered:?}\n  not {expected:?}"));
        }
    }
    ensure!(differences.is_empty(), "{} of {}:\n{}", differences.len(), cases.len(), differences.join("\n"));
    log_cases("chat-templates", cases.len());
    Ok(())
}

/// The mask of the assistant's tokens by transformers.
#[derive(Deserialize)]
struct Masked {
    /// The path of the tokenizer in the repository.
    tokenizer: String,
    template: String,
    record: String,
    ids: Vec<u32>,
    mask: Vec<u8>,
}

/// Templates with generation blocks and the masks of scripts/golden/chat_templates.py.
#[test]
fn tokens_of_generation_blocks_are_those_of_transformers() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("tests/fixtures/chat_templates/masks.json");
    let cases: Vec<Masked> = serde_json::from_str(&fs::read_to_string(path)?)?;
    let tokens: BTreeMap<_, _> =
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.into(), v.into())).into();
    for Masked { tokenizer, template, record, ids, mask } in &cases {
        let tokenizer = Tokenizer::load(&root.join("../..").join(tokenizer))?;
        let chat = ChatTemplate::new(template.clone(), tokens.clone())?;
        let (text, turns) = chat.render_turns(record.as_bytes())?;
        let marked = encode_turns(&tokenizer, &text, &turns)?;
        let expected: Vec<_> = ids.iter().copied().zip(mask.iter().map(|m| *m == 1)).collect();
        ensure!(marked == expected, "{template} {record}: {marked:?}, not {expected:?}");
    }
    log_cases("generation-masks", cases.len());
    Ok(())
}

#[test]
fn the_current_time_is_available() -> Result<()> {
    let render = |template: &str| -> Result<String> {
        Ok(ChatTemplate::new(template.to_owned(), BTreeMap::new())?.render(None, "Hi")?)
    };
    let year: u32 = render("{{ strftime_now('%Y') }}")?.parse()?;
    ensure!((2024..3000).contains(&year), "{year}");
    let parts = render("{{ strftime_now('%d %b %Y').split()|length }}{{ strftime_now is defined }}")?;
    ensure!(parts == "3True", "{parts}");
    Ok(())
}
