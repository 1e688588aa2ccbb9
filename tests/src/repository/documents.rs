//! What the documents name exists: files, links, headings, scripts and the packages and targets of cargo commands.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{FETCHED, SKIPPED, Violation};

/// A command line of a fenced block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The document, relative to the root.
    pub file: String,
    /// The line in it, from 1.
    pub line: usize,
    /// The words of the command, without variables before and comments after it.
    pub words: Vec<String>,
}

/// Fences whose lines are commands.
const SHELLS: [&str; 5] = ["", "sh", "bash", "console", "shell"];
/// Commands that run another one, with the number of words before it.
const WRAPPERS: [&str; 4] = ["sudo", "time", "nice", "env"];

/// The commands in the fenced blocks of a document, one per line; a line that ends with `\` continues in the next
/// one. A line that starts with two spaces belongs to an output.
pub fn commands(file: &str, text: &str) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut fence: Option<&str> = None;
    let mut pending: Option<(usize, String)> = None;
    for (n, line) in text.lines().enumerate() {
        if let Some(info) = line.trim_start().strip_prefix("```") {
            fence =
                if fence.is_some() { None } else { Some(info.split(',').next().unwrap_or_default().trim()) };
            continue;
        }
        if !fence.is_some_and(|info| SHELLS.contains(&info)) {
            continue;
        }
        let line = line.trim_start().strip_prefix("$ ").unwrap_or(line);
        let (start, mut whole) = pending.take().unwrap_or((n + 1, String::new()));
        whole.push_str(if whole.is_empty() { line } else { line.trim_start() });
        if let Some(open) = whole.strip_suffix('\\') {
            pending = Some((start, open.trim_end().to_owned() + " "));
            continue;
        }
        for part in whole.split(" | ").flat_map(|part| part.split(" && ")) {
            let words = words(part);
            if !words.is_empty() {
                commands.push(Command { file: file.to_owned(), line: start, words });
            }
        }
    }
    commands
}

/// The words of a command as a shell splits them, up to a comment, a redirection or an explanation after it.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote, mut started) = (String::new(), None, false);
    let mut spaces = 0;
    for c in line.trim().chars() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (Some(_), c) => word.push(c),
            (None, '"' | '\'') => (quote, started) = (Some(c), true),
            (None, ' ') => {
                spaces += 1;
                if started || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                    started = false;
                }
                // Three spaces separate the command from its explanation.
                if spaces == 3 {
                    break;
                }
                continue;
            }
            (None, '#' | '>') if word.is_empty() => {
                started = false;
                break;
            }
            (None, c) => word.push(c),
        }
        spaces = 0;
    }
    if started || !word.is_empty() {
        words.push(word);
    }
    let is_variable = |word: &&String| {
        let name = word.split('=').next().unwrap_or_default();
        word.contains('=') && !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    let before = words.iter().take_while(|w| is_variable(w) || WRAPPERS.contains(&w.as_str())).count();
    words.split_off(before)
}

/// Checks one Markdown document; `file` is its path from `root`.
pub(super) fn check(root: &Path, file: &str, text: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    let folder = root.join(file).parent().unwrap_or(root).to_path_buf();
    let mut report =
        |line: usize, rule: String| violations.push(Violation { file: file.to_owned(), line, rule });
    // Other documents, such as origins of data, may name files of other projects.
    let names_paths = !file.contains('/') || file.starts_with("docs/") || file.starts_with("crates/");
    let mut fenced = false;
    for (n, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let paths = line.split('`').skip(1).step_by(2).filter(|path| names_paths && is_path(root, path));
            for path in paths {
                if !folder.join(path).exists() && !exists(root, path) {
                    report(n + 1, format!("`{path}` does not exist"));
                }
            }
            for target in links(line) {
                if let Err(rule) = check_link(&folder, text, target) {
                    report(n + 1, rule);
                }
            }
        }
    }
    for command in commands(file, text) {
        if let Err(rule) = check_command(root, &command.words) {
            report(command.line, rule);
        }
    }
    if file.ends_with("/SUMMARY.md") {
        for page in missing_pages(&folder, text) {
            report(1, format!("the page `{page}` is not listed"));
        }
    }
    violations
}

/// The targets of the Markdown links of a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let prose = line.split('`').step_by(2);
    prose.flat_map(|text| text.split("](").skip(1)).filter_map(|rest| {
        let target = rest.split([')', ' ']).next()?;
        let is_web = target.contains("://") || target.starts_with("mailto:");
        (!is_web && !target.is_empty()).then_some(target)
    })
}

/// A link's file exists, and so does the heading it names. `document` is the text of the document with the link.
fn check_link(folder: &Path, document: &str, target: &str) -> Result<(), String> {
    let (path, heading) = target.split_once('#').unwrap_or((target, ""));
    let file = folder.join(path);
    if !path.is_empty() && !file.exists() {
        return Err(format!("the link `{target}` leads nowhere"));
    }
    if heading.is_empty() || !(path.is_empty() || path.ends_with(".md")) {
        return Ok(());
    }
    let text = match path {
        "" => document.to_owned(),
        _ => fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?,
    };
    let named = headings(&text).contains(heading);
    named.then_some(()).ok_or_else(|| format!("the link `{target}` names a heading that does not exist"))
}

/// The anchors of a document's headings, as GitHub and mdBook name them.
fn headings(text: &str) -> HashSet<String> {
    let mut fenced = false;
    let mut anchors = HashSet::new();
    for line in text.lines() {
        fenced ^= line.trim_start().starts_with("```");
        let title = line.trim_start_matches('#');
        if !fenced && line.starts_with('#') && title.starts_with(' ') {
            let lowercase = title.trim().to_lowercase();
            let anchor = lowercase.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            anchors.insert(anchor.map(|c| if c == ' ' { '-' } else { c }).collect());
        }
    }
    anchors
}

/// Pages in the folder of a summary that it does not link.
fn missing_pages(folder: &Path, summary: &str) -> Vec<String> {
    let linked: HashSet<PathBuf> = summary.lines().flat_map(links).map(|page| folder.join(page)).collect();
    let mut pages = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(&current).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md")
                && !path.ends_with("SUMMARY.md")
                && !linked.contains(&path)
            {
                pages.push(path.strip_prefix(folder).unwrap_or(&path).display().to_string());
            }
        }
    }
    pages.sort();
    pages
}

/// What a command names of the repository exists: its program, a package, a test, an example.
fn check_command(root: &Path, words: &[String]) -> Result<(), String> {
    let program = words[0].trim_start_matches("./");
    let scripts: Vec<&str> = words.iter().map(String::as_str).filter(|w| w.starts_with("scripts/")).collect();
    if let Some(script) = scripts.iter().find(|script| !root.join(script).exists()) {
        return Err(format!("`{script}` does not exist"));
    }
    if program.starts_with(".ci/") && !root.join(program).exists() {
        return Err(format!("`{program}` does not exist"));
    }
    if program != "cargo" {
        return Ok(());
    }
    let cargo_words = words.split(|word| word == "--").next().unwrap_or_default();
    for pair in cargo_words.windows(2) {
        let (flag, value) = (pair[0].as_str(), pair[1].as_str());
        let candidates: Vec<String> = match flag {
            "-p" | "--package" if value == "gd-tests" => vec!["tests".into()],
            "-p" | "--package" if value == "gd-examples" => vec!["examples".into()],
            "-p" | "--package" if value.starts_with("gd-") => vec![format!("crates/{value}")],
            "--path" => vec![value.to_owned()],
            "--example" | "--test" => targets(root, flag.trim_start_matches('-'), value),
            _ => continue,
        };
        if !candidates.iter().any(|path| root.join(path).exists()) {
            return Err(format!("`{flag} {value}` does not exist"));
        }
    }
    Ok(())
}

/// The possible paths of an example or a test with this name.
fn targets(root: &Path, kind: &str, name: &str) -> Vec<String> {
    let crates = fs::read_dir(root.join("crates")).into_iter().flatten().flatten();
    let mut packages: Vec<String> =
        crates.map(|entry| format!("crates/{}/", entry.file_name().display())).collect();
    packages.extend([String::new(), "tests/".into()]);
    let files = |package: &String| {
        [format!("{package}{kind}s/{name}.rs"), format!("{package}{kind}s/{name}/main.rs")]
    };
    packages.iter().flat_map(files).collect()
}

/// Whether a path exists below the root or below one of the crates.
fn exists(root: &Path, path: &str) -> bool {
    let crates = fs::read_dir(root.join("crates")).into_iter().flatten().flatten();
    root.join(path).exists() || crates.into_iter().any(|entry| entry.path().join(path).exists())
}

/// Files that the walk-throughs of the book have their reader create.
const CREATED: [&str; 1] = ["crates/gd-kernels/tests/suite/squared_relu.rs"];

/// `crates/gd-model`, `.ci/run` or `README.md`, but not `out/tiny` (written by a command), `ops/scan` (below another
/// folder), `kernels/cuda/NAME.cu` (a placeholder) or `gd train`.
fn is_path(root: &Path, s: &str) -> bool {
    let plain = !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let Some((first, rest)) = s.split_once('/') else {
        return plain && s.len() > 3 && s.ends_with(".md");
    };
    let placeholder = |part: &str| {
        let stem = part.split('.').next().unwrap_or_default();
        stem.len() > 1 && !part.ends_with(".md") && stem.chars().all(|c| c.is_ascii_uppercase())
    };
    // What begins with a slash is an endpoint of the server or a command of a chat.
    plain
        && !first.is_empty()
        && !SKIPPED.contains(&first)
        && first != FETCHED
        && root.join(first).is_dir()
        && !rest.split('/').any(placeholder)
        && !CREATED.contains(&s)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["docs/src", "crates/gd-model/examples", "crates/gd-model/tests/suite", "scripts/ci"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for (file, text) in [
            ("docs/src/a.md", "# A title, with `code`\n## Second\n"),
            ("docs/src/b.md", "# B\n"),
            ("crates/gd-model/examples/load.rs", "//! E.\n"),
            ("crates/gd-model/tests/suite/main.rs", "//! T.\n"),
            ("scripts/ci/check.sh", "\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        dir
    }

    fn rules(file: &str, text: &str) -> Vec<(usize, String)> {
        let dir = repository();
        let all = check(dir.path(), file, text);
        all.into_iter().map(|violation| (violation.line, violation.rule)).collect()
    }

    #[test]
    fn what_exists_passes() {
        let text = "[a](docs/src/a.md#a-title-with-code), [here](#top), [web](https://a.b/c), `[x](y.md)`\n# Top\n\
                    ```sh\nA=1 scripts/ci/check.sh x # [no](link.md)\ncargo test -p gd-model --test suite -- --test x\n\
                    cargo run --release \\\n    --example load\ngd train   --flag of an explanation\n```\n\
                    ```rust\nscripts/none.sh\n```\n";
        assert_eq!(rules("README.md", text), []);
        assert_eq!(rules("docs/src/SUMMARY.md", "[a](a.md) [b](b.md)\n"), []);
    }

    #[test]
    fn what_is_missing_is_named_at_its_line() {
        for (file, text, line, word) in [
            ("docs/src/b.md", "\n[a](c.md)", 2, "c.md"),
            ("docs/src/b.md", "[a](a.md#third)", 1, "third"),
            ("docs/src/b.md", "[a](#c)\n# B", 1, "#c"),
            ("docs/src/b.md", "[a](a.md#a-title)", 1, "#a-title"),
            ("docs/src/SUMMARY.md", "[a](a.md)", 1, "b.md"),
            ("README.md", "```\nscripts/check.sh\n```", 2, "scripts/check.sh"),
            ("README.md", "```\npython3 scripts/check.py | cat\n```", 2, "scripts/check.py"),
            ("README.md", "```sh\n./.ci/run\n```", 2, ".ci/run"),
            ("README.md", "```sh\ncargo test -p gd-none\n```", 2, "gd-none"),
            ("README.md", "```sh\ncargo test \\\n  --test none\n```", 2, "none"),
            ("README.md", "```sh\ncargo run --example none\n```", 2, "none"),
            ("README.md", "See `docs/gone.rs`.", 1, "docs/gone.rs"),
            ("docs/src/b.md", "See `a.md` and `c.md`.", 1, "c.md"),
        ] {
            let violations = rules(file, text);
            assert_eq!(violations.len(), 1, "{text}: {violations:?}");
            assert_eq!(violations[0].0, line, "{text}");
            assert!(violations[0].1.contains(word), "{text}: {violations:?}");
        }
    }

    #[test]
    fn commands_are_split_into_words() {
        let text = "```\nRAYON_NUM_THREADS=1 gd generate out --prompt \"It was\" --json > x.json\n$ gd doctor && gd report out\n```\n";
        let all: Vec<String> = commands("a.md", text).into_iter().map(|c| c.words.join("|")).collect();
        assert_eq!(all, ["gd|generate|out|--prompt|It was|--json", "gd|doctor", "gd|report|out"]);
    }
}
