//! The table of `/trace`.

use std::collections::BTreeMap;

use gd_model::infer::engine::Source;
use gd_model::io::tokenizer::Tokenizer;

use crate::generation::token_text;
use crate::render::table::{TERMINAL, plain_table};

/// Number of positions that are shown for a token.
const SHOWN: usize = 4;

/// For each token of an answer the positions that most heads read when it was predicted, with the number of heads.
pub(super) fn table(tokenizer: &Tokenizer, prompt: &[u32], answer: &[(u32, Vec<Source>)]) -> String {
    let all: Vec<u32> = prompt.iter().copied().chain(answer.iter().map(|(id, _)| *id)).collect();
    let text = |id: u32| format!("{:?}", token_text(tokenizer, id));
    let mut table = plain_table(TERMINAL, &["token", "read by most heads"]);
    for (id, sources) in answer {
        let mut counts: BTreeMap<Option<usize>, usize> = BTreeMap::new();
        for source in sources {
            *counts.entry(source.position).or_default() += 1;
        }
        let mut ranked: Vec<_> = counts.into_iter().collect();
        ranked.sort_by_key(|(position, count)| (std::cmp::Reverse(*count), *position));
        let shown = ranked.iter().take(SHOWN).map(|(position, count)| match position {
            Some(at) => format!("{at} {} x{count}", all.get(*at).map_or_else(String::new, |id| text(*id))),
            None => format!("none x{count}"),
        });
        table.add_row([text(*id), shown.collect::<Vec<_>>().join(", ")]);
    }
    table.to_string()
}
