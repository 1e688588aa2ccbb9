//! The files of the repository follow its rules, and the check reports every kind of violation.

use gd_tests::repository::{check, check_text, root};

#[test]
fn every_file_follows_the_rules() -> anyhow::Result<()> {
    let (files, violations) = check(&root())?;
    assert!(files >= 20, "only {files} files below {}", root().display());
    let list: Vec<_> = violations.iter().map(ToString::to_string).collect();
    assert!(list.is_empty(), "{} broken rules:\n{}", list.len(), list.join("\n"));
    println!("{files} files checked");
    Ok(())
}

/// A file, its text, the line of the violation and a word of the message.
fn bad_files() -> Vec<(&'static str, String, usize, &'static str)> {
    let head = "//! Header.\n";
    let line2 = |text: &str| format!("{head}{text}\n");
    vec![
        ("crates/gd-model/src/x.rs", "use std::fs;\n".into(), 1, "header"),
        ("kernels/cuda/x.cu", "\n// late\n".into(), 1, "header"),
        ("crates/gd-model/src/x.rs", format!("{head}{}", "\n".repeat(600)), 601, "601 lines"),
        ("kernels/cuda/x.cuh", format!("// Header.\n{}", "\n".repeat(800)), 801, "801 lines"),
        ("README.md", concat!("\n\nTO", "DO: more\n").into(), 3, "unfinished"),
        ("crates/gd-layer/src/x.rs", line2(concat!("db", "g!(1);")), 2, "unfinished"),
        ("crates/gd-layer/src/x.rs", line2(concat!("to", "do!()")), 2, "unfinished"),
        ("crates/gd-layer/src/x.rs", line2(concat!("unimple", "mented!()")), 2, "unfinished"),
        ("tests/tests/x.rs", line2(concat!("#[ig", "nore]")), 2, "unfinished"),
        (".ci/run", concat!("#!/bin/sh\ncd /ho", "me/me\n").into(), 2, "machine"),
        ("scripts/x.sh", concat!("cd /wo", "rk/x\n").into(), 1, "machine"),
        ("scripts/x.py", concat!("u = 'https://py", "pi.org/x'\n").into(), 1, "registry"),
        ("Cargo.toml", concat!("# from crates", ".io\n").into(), 1, "registry"),
        ("crates/gd-kernels/src/x.rs", line2("use gd_layer::Beacon;"), 2, "upward"),
        ("crates/gd-kernels/Cargo.toml", "gd-model.workspace = true\n".into(), 1, "upward"),
        ("crates/gd-layer/src/x.rs", line2("use gd_model::Config;"), 2, "upward"),
        ("crates/gd-model/src/x.rs", line2("use gd_cli::Context;"), 2, "upward"),
        ("crates/gd-model/Cargo.toml", "gd-cli = { path = \"../gd-cli\" }\n".into(), 1, "upward"),
        ("crates/gd-model/src/x.rs", line2(concat!("uns", "afe { p.read() }")), 2, "unsafe"),
        ("crates/gd-model/src/data/x.rs", line2(concat!("uns", "afe { p.read() }")), 2, "unsafe"),
    ]
}

#[test]
fn each_kind_of_violation_is_reported_at_its_line() {
    for (file, text, line, word) in bad_files() {
        let violations = check_text(file, &text);
        assert_eq!(violations.len(), 1, "{file}: {word}: {violations:?}");
        assert_eq!(violations[0].line, line, "{file}: {}", violations[0]);
        assert!(violations[0].to_string().contains(word), "{}", violations[0]);
    }
}

#[test]
fn unsafe_code_is_allowed_in_its_folders() {
    let text = format!("//! Header.\n{}\n", concat!("uns", "afe { p.read() }"));
    for file in ["crates/gd-kernels/src/x.rs", "crates/gd-model/src/data/map.rs"] {
        assert_eq!(check_text(file, &text), []);
    }
}

#[test]
fn a_readme_that_names_a_missing_path_is_reported() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let readme = "See `src/here.rs`, `gd train` and `out/tiny`.\n\n```\n`no/path`\n```\nAnd `src/gone.rs`.\n";
    std::fs::create_dir(dir.path().join("src"))?;
    std::fs::write(dir.path().join("src/here.rs"), "//! Here.\n")?;
    std::fs::write(dir.path().join("README.md"), readme)?;
    let (files, violations) = check(dir.path())?;
    assert_eq!(files, 2);
    let violations: Vec<_> = violations.iter().map(ToString::to_string).collect();
    assert_eq!(violations, ["README.md:6: `src/gone.rs` does not exist"]);
    Ok(())
}
