//! Imports point downwards: between crates, between the modules of a crate, and between operators.

use std::collections::HashMap;

use super::Violation;
use super::tokens::{Token, tokens};

/// The modules of one crate, lowest first. A module imports from earlier ones and from itself.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// The folder of the sources, with a slash at its end.
    pub sources: &'static str,
    /// Modules as paths below that folder, such as `ops/scan`; those of one group do not import each other.
    pub groups: &'static [&'static [&'static str]],
    /// Modules that share no code with the others, each with what it may import.
    pub isolated: &'static [(&'static str, &'static [&'static str])],
}

/// The paths by which `crate::Name` is reached through a `pub use` of the crate's root.
pub type Exports = HashMap<String, Vec<String>>;

/// The names that the root of a crate exports, from the text of its lib.rs.
pub fn exports(lib: &str) -> Exports {
    let tokens = tokens(lib);
    let mut exports = Exports::new();
    for (at, token) in tokens.iter().enumerate() {
        if token.text == "use" && at > 0 && matches!(tokens[at - 1].text, "pub" | ")") {
            let mut paths = Vec::new();
            path(&tokens, at + 1, &[], &mut paths);
            for (_, path) in paths {
                let path: Vec<String> =
                    path.into_iter().filter(|name| *name != "crate").map(str::to_owned).collect();
                if let Some(name) = path.last() {
                    exports.insert(name.clone(), path);
                }
            }
        }
    }
    exports
}

/// The imports of `text` that point upwards. `file` is its path from the root.
pub fn check(order: &Order, exports: &Exports, file: &str, text: &str) -> Vec<Violation> {
    let Some(own) = module(order, file) else { return Vec::new() };
    let own_place = place(order, &own);
    let mut violations = Vec::new();
    let mut report = |line: usize, rule: String| {
        let violation = Violation { file: file.to_owned(), line, rule };
        if !violations.contains(&violation) {
            violations.push(violation);
        }
    };
    let aggregate = own.is_empty() || (own_place.is_none() && is_aggregate(order, &own));
    if own_place.is_none() && !aggregate {
        report(1, format!("the module `{}` has no place in the order of imports", own.join("/")));
    }
    let tokens = tokens(text);
    for (line, path) in imports(&without_tests(&tokens), &own) {
        let path = resolve(order, exports, &path);
        let Some(target) = place(order, &path) else { continue };
        let name = path.join("::");
        match own_place {
            Some(own) if own == target => {}
            Some(own) if order.allowed(own, target) => {}
            Some(_) => report(line, format!("`{name}`: an upward import")),
            None => {}
        }
    }
    violations
}

/// A module's place: its group and its number there, or one of the isolated modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Group(usize, usize),
    Isolated(usize),
}

impl Order {
    /// Whether a module at `own` may import one at another place.
    fn allowed(&self, own: Place, target: Place) -> bool {
        match (own, target) {
            (Place::Group(own, _), Place::Group(target, _)) => target < own,
            (Place::Isolated(own), Place::Group(group, number)) => {
                self.isolated[own].1.contains(&self.groups[group][number])
            }
            (_, Place::Isolated(_)) => false,
        }
    }
}

/// The place of the module that holds `path`: the longest entry that it begins with.
fn place(order: &Order, path: &[String]) -> Option<Place> {
    (1..=path.len()).rev().find_map(|length| {
        let name = path[..length].join("/");
        let isolated = order.isolated.iter().position(|(module, _)| *module == name);
        let group = order.groups.iter().enumerate().find_map(|(group, modules)| {
            modules.iter().position(|module| *module == name).map(|number| Place::Group(group, number))
        });
        isolated.map(Place::Isolated).or(group)
    })
}

/// Whether a module only holds modules of the order: `ops` of `ops/scan`.
fn is_aggregate(order: &Order, own: &[String]) -> bool {
    let prefix = own.join("/") + "/";
    order.groups.iter().flat_map(|group| group.iter()).any(|module| module.starts_with(&prefix))
}

/// The module of a file: `[ops, scan, plan]` of ops/scan/plan.rs and `[ops, scan]` of ops/scan/mod.rs.
fn module(order: &Order, file: &str) -> Option<Vec<String>> {
    let path = file.strip_prefix(order.sources)?.strip_suffix(".rs")?;
    let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
    let binary = parts[0] == "bin" || path == "main";
    if parts.last().is_some_and(|last| ["mod", "lib"].contains(&last.as_str())) {
        parts.pop();
    }
    (!binary).then_some(parts)
}

/// The path of the item that a path names, which may be an export of the root.
fn resolve(order: &Order, exports: &Exports, path: &[String]) -> Vec<String> {
    let first = path.first().map(String::as_str).unwrap_or_default();
    let is_module = place(order, &path[..path.len().min(1)]).is_some()
        || is_aggregate(order, std::slice::from_ref(&first.to_owned()));
    match exports.get(first) {
        Some(real) if path.len() == 1 || !is_module => [real, &path[1..]].concat(),
        _ => path.to_vec(),
    }
}

/// The paths that begin with `crate` or `super`, from the root of the crate.
fn imports(tokens: &[Token<'_>], own: &[String]) -> Vec<(usize, Vec<String>)> {
    let mut paths = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let begins = at == 0 || tokens[at - 1].text != ":";
        if begins && matches!(token.text, "crate" | "super") && is_separator(tokens, at + 1) {
            path(tokens, at, &[], &mut paths);
        }
    }
    let absolute = |path: Vec<&str>| {
        let ups = path.iter().take_while(|name| **name == "super").count();
        let base = if ups > 0 { &own[..own.len().saturating_sub(ups)] } else { &[] };
        let rest = path.into_iter().filter(|name| !["crate", "super", "self"].contains(name));
        base.iter().cloned().chain(rest.map(str::to_owned)).collect()
    };
    paths.into_iter().map(|(line, path)| (line, absolute(path))).collect()
}

fn is_separator(tokens: &[Token<'_>], at: usize) -> bool {
    tokens.len() > at + 1 && tokens[at].text == ":" && tokens[at + 1].text == ":"
}

/// Adds the paths that start at `at`, several where it has braces, to `paths`; returns where they end.
fn path<'a>(
    tokens: &[Token<'a>],
    mut at: usize,
    before: &[&'a str],
    paths: &mut Vec<(usize, Vec<&'a str>)>,
) -> usize {
    let mut names = before.to_vec();
    while let Some(token) = tokens.get(at) {
        if token.text == "{" {
            at += 1;
            while tokens.get(at).is_some_and(|token| token.text != "}") {
                let end = path(tokens, at, &names, paths);
                // Skips anything that is no path, such as `as name` or a comma.
                at = end.max(at + 1);
            }
            return at + 1;
        }
        if !token.is_name() {
            break;
        }
        names.push(token.text);
        let line = token.line;
        if !is_separator(tokens, at + 1) {
            // `use a as b` gives no further path.
            let renamed = tokens.get(at + 1).is_some_and(|next| next.text == "as");
            paths.push((line, names));
            return at + if renamed { 3 } else { 1 };
        }
        at += 3;
    }
    if let Some(token) = tokens.get(at).filter(|token| token.text == "*") {
        paths.push((token.line, names));
    }
    at
}

/// The tokens without the items that `#[cfg(test)]` marks.
fn without_tests<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    const TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut rest = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        let test = tokens[at..].iter().map(|token| token.text).take(TEST.len()).eq(TEST);
        if test {
            at = end_of_item(tokens, at + TEST.len());
        } else {
            rest.push(tokens[at]);
            at += 1;
        }
    }
    rest
}

/// The end of the item that starts at `at`, after its braces or its semicolon.
fn end_of_item(tokens: &[Token<'_>], at: usize) -> usize {
    let mut depth = 0usize;
    for (n, token) in tokens.iter().enumerate().skip(at) {
        match token.text {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && token.text == "}" {
                    return n + 1;
                }
            }
            ";" if depth == 0 => return n + 1,
            _ => {}
        }
    }
    tokens.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Order = Order {
        sources: "crates/x/src/",
        groups: &[
            &["error"],
            &["options", "mask"],
            &["backend"],
            &["cache"],
            &["ops/linear"],
            &["ops/scan", "ops/select"],
        ],
        isolated: &[("reference", &["options"])],
    };
    const LIB: &str = "//! A crate.\npub mod ops;\npub use error::{Error, Result};\n\
                       pub use ops::scan::{self, Scan, scan};\npub use ops::linear::matmul;\n";

    fn violations(file: &str, text: &str) -> Vec<(usize, String)> {
        let all = check(&ORDER, &exports(LIB), &format!("crates/x/src/{file}"), text);
        all.into_iter().map(|violation| (violation.line, violation.rule)).collect()
    }

    #[test]
    fn downward_imports_pass() {
        for (file, text) in [
            (
                "ops/scan/cpu/tile.rs",
                "use crate::{Error, backend::{self, lanes}, ops::linear};\nuse super::plan;",
            ),
            ("ops/scan/mod.rs", "use super::linear::matmul;\nfn f() { crate::matmul(); crate::scan(); }"),
            ("cache/paged.rs", "use crate::mask::Mask;\npub(crate) fn f() { crate::Result::Ok(()); }"),
            ("reference/scan.rs", "use crate::options::Score;\nuse super::dense;"),
            ("ops/mod.rs", "pub mod scan;\nuse crate::ops::select::select;"),
            ("lib.rs", LIB),
            ("main.rs", "use x::ops::scan;"),
            (
                "mask.rs",
                "#[cfg(test)]\nmod tests { use crate::ops::scan::Scan; fn f() {} }\n// crate::ops::scan\n",
            ),
            ("mask.rs", "#[cfg(test)]\nuse crate::ops::scan::Scan;\nconst A: &str = \"crate::ops::scan\";"),
        ] {
            assert_eq!(violations(file, text), [], "{file}: {text}");
        }
    }

    #[test]
    fn upward_imports_are_reported_at_their_line() {
        for (file, text, line, name) in [
            ("backend/cpu.rs", "//! H.\nuse crate::cache::KeyCache;", 2, "cache::KeyCache"),
            ("ops/linear.rs", "use super::scan::{A,\nB};", 1, "ops::scan::A"),
            ("ops/linear.rs", "fn f() {\n    crate::scan(x)\n}", 2, "ops::scan::scan"),
            ("ops/linear.rs", "fn f() {\n    crate::Scan::new(x)\n}", 2, "ops::scan"),
            ("ops/scan/cpu/a.rs", "use super::super::super::select::Choice;", 1, "ops::select::Choice"),
            ("ops/select/a.rs", "use crate::ops::{\n  linear, scan::*};", 2, "ops::scan"),
            ("mask.rs", "use crate::options::Score;", 1, "options::Score"),
            ("reference/scan.rs", "use crate::mask::Mask;", 1, "mask::Mask"),
            ("ops/scan/mod.rs", "use crate::reference::scan;", 1, "reference::scan"),
            ("mask.rs", "#[cfg(test)]\nmod tests {}\nuse crate::ops::scan::Scan;", 3, "ops::scan::Scan"),
        ] {
            let violations = violations(file, text);
            assert!(!violations.is_empty(), "{file}: {text}");
            assert_eq!(violations[0].0, line, "{file}: {text}: {violations:?}");
            assert!(
                violations[0].1.contains(name) && violations[0].1.contains("upward"),
                "{file}: {violations:?}"
            );
        }
    }

    #[test]
    fn a_module_without_a_place_is_named() {
        let violations = violations("utils.rs", "//! H.\n");
        assert_eq!(violations.len(), 1);
        assert!(violations[0].1.contains("`utils`"), "{violations:?}");
    }
}
