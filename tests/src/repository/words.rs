//! Names in the crates' sources use the terms of the field. Words that have a meaning in this repository only are
//! refused, each with the terms to use instead.

use super::Violation;
use super::tokens::tokens;

/// Words that must not be a part of a name, each with the terms to use instead. Parts are separated by `_` or capitals.
const PARTS: [(&[&str], &str); 14] = [
    (&["few", "fewer"], "decode"),
    (&["best"], "top_k, lowest_… or least_…"),
    (&["settle", "settles", "settled", "settling"], "rescore"),
    (&["kept"], "cached, key_cache"),
    (&["growing"], "append_buffer"),
    (&["bar", "bars"], "threshold, progress or color_scale"),
    (&["stretch", "stretches"], "split, chunk or span"),
    (&["look", "looks", "glance", "glances"], "eval or lookback"),
    (&["told", "tell", "tells"], "report or log"),
    (&["original", "originals"], "teacher or source"),
    (&["launched"], "in_flight"),
    (&["known", "seen", "found"], "what it is: matches, visible, stored, entry, violations"),
    (&["room"], "capacity"),
    (&["piece", "pieces"], "chunk, segment or sequences"),
];
/// Names that are refused as a whole, because they are not specific.
const NAMES: [(&str, &str); 6] = [
    ("Plan", "ScanPlan, DecodePlan, NormPlan, …"),
    ("Ready", "Projected"),
    ("LIGHT", "MIN_PARALLEL_FLOPS"),
    ("AHEAD", "PREFETCH_DISTANCE_BYTES"),
    ("LOST", "SUBNORMAL_NORM_ERROR"),
    ("aligned", "layer_alignment"),
];
/// A part that is allowed only after another one: a bounded list is a term.
const QUALIFIED: (&str, &str) = ("bounded", "lists");
/// Names of the standard library and of dependencies.
const FOREIGN: [&str; 4] = ["NOT_FOUND", "NotFound", "ProgressBar", "is_aligned"];

/// The names of `text` that break the rule, once a line. `file` is its path from the root.
pub(super) fn check(file: &str, text: &str) -> Vec<Violation> {
    if !(file.starts_with("crates/") && file.contains("/src/") && file.ends_with(".rs")) {
        return Vec::new();
    }
    let stem = file.rsplit('/').next().unwrap_or(file).trim_end_matches(".rs");
    let folders = file.split('/').skip(3).chain([stem]).filter(|part| !part.contains('.'));
    let mut names: Vec<(usize, &str)> = folders.map(|name| (1, name)).collect();
    names.extend(tokens(text).iter().filter(|token| token.is_name()).map(|token| (token.line, token.text)));
    names.dedup();
    let mut violations = Vec::new();
    for (line, name) in names {
        if let Some((word, instead)) = private_word(name) {
            let rule = format!("`{word}` in the name `{name}`: use {instead}");
            let violation = Violation { file: file.to_owned(), line, rule };
            if !violations.contains(&violation) {
                violations.push(violation);
            }
        }
    }
    violations
}

/// The first refused word of a name, with what to use instead.
fn private_word(name: &str) -> Option<(String, &'static str)> {
    if FOREIGN.contains(&name) {
        return None;
    }
    if let Some((word, instead)) = NAMES.iter().find(|(word, _)| *word == name) {
        return Some(((*word).to_owned(), instead));
    }
    let parts = parts(name);
    for (at, part) in parts.iter().enumerate() {
        if part == QUALIFIED.1 && (at == 0 || parts[at - 1] != QUALIFIED.0) {
            return Some((part.clone(), "bounded_lists or heap"));
        }
        if let Some((_, instead)) = PARTS.iter().find(|(words, _)| words.contains(&part.as_str())) {
            return Some((part.clone(), instead));
        }
    }
    None
}

/// The parts of a name in lower case: `KeptKeys`, `kept_keys` and `KEPT_KEYS` have the same ones.
fn parts(name: &str) -> Vec<String> {
    let mut parts = Vec::new();
    for word in name.split('_').filter(|word| !word.is_empty()) {
        let chars: Vec<char> = word.chars().collect();
        let mut start = 0;
        for at in 1..=chars.len() {
            let ends = at == chars.len()
                || (chars[at].is_uppercase()
                    && (!chars[at - 1].is_uppercase()
                        || chars.get(at + 1).is_some_and(|next| next.is_lowercase())));
            if ends {
                parts.push(chars[start..at].iter().collect::<String>().to_lowercase());
                start = at;
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_underscores_and_capitals() {
        for name in ["few_keys", "FewKeys", "FEW_KEYS", "_few__keys"] {
            assert_eq!(parts(name), ["few", "keys"], "{name}");
        }
        assert_eq!(parts("GPUPlan8"), ["gpu", "plan8"]);
        assert_eq!(parts("x"), ["x"]);
    }

    #[test]
    fn every_refused_word_is_reported_in_every_spelling() {
        for word in PARTS.iter().flat_map(|(words, _)| *words) {
            let capital = word[..1].to_uppercase() + &word[1..];
            for name in [
                (*word).to_owned(),
                format!("is_{word}"),
                format!("{word}_keys"),
                word.to_uppercase(),
                format!("{capital}Keys"),
                format!("With{capital}"),
            ] {
                let text = format!("//! Header.\nfn f({name}: u8) {{}}\n");
                let violations = check("crates/gd-layer/src/x.rs", &text);
                assert_eq!(violations.len(), 1, "{name}: {violations:?}");
                assert_eq!(violations[0].line, 2, "{name}");
            }
        }
        for (name, _) in NAMES {
            assert!(private_word(name).is_some(), "{name}");
        }
    }

    #[test]
    fn longer_words_texts_and_terms_are_left_alone() {
        let text = concat!(
            "//! A best key.\nfn unknown(bounded_lists: ScanPlan, lookup: u8, barrier: u8, light: u8) {\n",
            "    /* few /* kept */ */ let x = \"best\"; let r#y = r#\"kept \"few\" \"#; let c = 'b'; let d = b'\\'';\n",
            "    let e: &'static str = \"a\\\"best\"; let n = 1.5e-3_f32; let b = b\"told\"; ErrorKind::NotFound;\n}\n",
        );
        assert_eq!(check("crates/gd-layer/src/x.rs", text), []);
        assert_eq!(check("tests/src/x.rs", "fn best() {}"), []);
        assert_eq!(check("crates/gd-layer/tests/x.rs", "fn best() {}"), []);
    }

    #[test]
    fn names_of_files_and_folders_count() {
        let files = ["crates/gd-layer/src/kept.rs", "crates/gd-kernels/src/ops/few/mod.rs"];
        for file in files {
            assert_eq!(check(file, "//! Header.\n").len(), 1, "{file}");
        }
    }

    #[test]
    fn lists_need_their_bound() {
        assert!(private_word("lists").is_some());
        assert!(private_word("KeyLists").is_some());
        assert!(private_word("BoundedLists").is_none());
    }
}
