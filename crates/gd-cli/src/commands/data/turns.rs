//! `gd data inspect --model`: what a training learns of chats.

use std::path::Path;

use anyhow::Result;
use gd_model::config::DocumentFormat;
use gd_model::data::{Documents, encode_turns};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::pretrained;
use serde_json::{Value, json};

use crate::context::{Context, usage};
use crate::data_source::document_error;
use crate::generation::token_text;

/// Number of chats that are shown.
const SHOWN: usize = 3;

/// Counts the tokens of all chats that are learned, and shows the first chats.
///
/// # Errors
/// Names the file or record that cannot be read, or a model without a chat template.
pub(super) fn print(file: &Path, model: &Path, ctx: &Context) -> Result<()> {
    let parts = pretrained::read(model, &ctx.device)?;
    let Some(template) = ChatTemplate::find(&parts.files)? else {
        return Err(usage(format!("--model {} has no chat template", model.display())));
    };
    let documents = Documents::open(&[file.to_path_buf()], &DocumentFormat::default())?;
    let (mut count, mut tokens, mut learned, mut shown) = (0, 0, 0, Vec::new());
    for document in documents.with_chat_template(Some(template)).with_marked_turns() {
        let document = document.map_err(document_error)?;
        let turns = document.turns.as_deref().unwrap_or_default();
        let ids = encode_turns(&parts.tokenizer, &document.text, turns)?;
        (count, tokens) = (count + 1, tokens + ids.len());
        learned += ids.iter().filter(|(_, learned)| *learned).count();
        if shown.len() < SHOWN {
            shown.push(ids);
        }
    }
    let text = |id: u32| token_text(&parts.tokenizer, id);
    if ctx.json {
        let token = |&(id, learned): &(u32, bool)| json!({ "id": id, "text": text(id), "learned": learned });
        let chats: Vec<Value> = shown.iter().map(|ids| ids.iter().map(token).collect()).collect();
        return ctx.print(json!({ "chats": count, "tokens": tokens, "learned": learned, "shown": chats }));
    }
    for ids in &shown {
        // Neighbouring tokens with the same mark are one part.
        let part = |part: &[(u32, bool)]| {
            let ids: Vec<u32> = part.iter().map(|(id, _)| *id).collect();
            // Special tokens have a name and no text.
            let whole: String = match parts.tokenizer.special_tokens().values().any(|id| ids.contains(id)) {
                true => ids.iter().map(|id| text(*id)).collect(),
                false => parts.tokenizer.decode(&ids).unwrap_or_default(),
            };
            if part[0].1 { format!("[[{whole}]]") } else { whole }
        };
        let shown: String = ids.chunk_by(|a, b| a.1 == b.1).map(part).collect();
        ctx.write(format!("{shown}\n---\n"))?;
    }
    ctx.print(format_args!("{learned} of {tokens} tokens of {count} chats are learned"))
}
