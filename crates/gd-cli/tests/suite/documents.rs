//! The program accepts every `gd` command in the documents and in the help texts.

use anyhow::{Result, ensure};
use gd_cli::commands::definition;
use gd_tests::repository::{commands, root, text_files};

/// The arguments of `gd` in a command line that calls `gd`, its path, or `cargo run .. --`. `None` for other commands.
fn arguments(words: &[String]) -> Option<&[String]> {
    if words.first().is_some_and(|word| word == "cargo") {
        let runs = words.get(1).is_some_and(|word| word == "run" || word == "r");
        let other = words.iter().any(|word| word == "--bin" || word == "--example" || word == "gd-examples");
        let split = words.iter().position(|word| word == "--")?;
        return (runs && !other).then(|| &words[split + 1..]);
    }
    let program = words.iter().position(|word| word == "gd" || word.ends_with("/gd"))?;
    // In `type gd` and similar commands `gd` is an argument.
    let runs = program == 0 || words[program] != "gd" || words[0] == "mpirun";
    runs.then(|| &words[program + 1..])
}

/// Parses the arguments with the definition of the commands. Returns the first line of the error message.
fn check(arguments: &[String]) -> std::result::Result<(), String> {
    let line = [&["gd".to_owned()][..], arguments].concat();
    match definition().try_get_matches_from(line) {
        Err(e) if e.use_stderr() => Err(e.to_string().lines().next().unwrap_or_default().to_owned()),
        _ => Ok(()),
    }
}

#[test]
fn every_command_of_the_documents_is_accepted() -> Result<()> {
    let mut refused = Vec::new();
    let mut count = 0;
    for file in text_files(&root())?.into_iter().filter(|file| file.name.ends_with(".md")) {
        for command in commands(&file.name, &file.text) {
            let Some(arguments) = arguments(&command.words) else { continue };
            count += 1;
            if let Err(e) = check(arguments) {
                refused.push(format!("{}:{}: {}: {e}", command.file, command.line, command.words.join(" ")));
            }
        }
    }
    ensure!(refused.is_empty(), "{} of {count} commands:\n{}", refused.len(), refused.join("\n"));
    ensure!(count >= 20, "only {count} commands found");
    println!("{count} commands accepted");
    Ok(())
}

/// Whether a line of a help text is an example. The contenders of `gd bench` are listed there, too, as `gd k=8`.
fn is_example(line: &str) -> bool {
    line.strip_prefix("  gd ")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()) && !rest.starts_with("k="))
}

#[test]
fn every_example_of_the_help_texts_is_accepted() -> Result<()> {
    let mut refused = Vec::new();
    let mut count = 0;
    let mut pending = vec![definition()];
    while let Some(command) = pending.pop() {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let examples: Vec<&str> = text.lines().filter(|line| is_example(line)).map(str::trim).collect();
        for command in commands("help", &format!("```\n{}\n```\n", examples.join("\n"))) {
            count += 1;
            if let Some(Err(e)) = arguments(&command.words).map(check) {
                refused.push(format!("{}: {e}", command.words.join(" ")));
            }
        }
        pending.extend(command.get_subcommands().cloned());
    }
    ensure!(refused.is_empty(), "{} of {count} examples:\n{}", refused.len(), refused.join("\n"));
    ensure!(count >= 10, "only {count} examples found");
    Ok(())
}

#[test]
fn a_command_with_an_unknown_flag_is_refused() {
    let words = |line: &str| commands("x", &format!("```\n{line}\n```\n")).remove(0).words;
    for line in
        ["gd train --stepz 3", "cargo run --release -- trian", "mpirun -n 2 target/release/gd train --seed x"]
    {
        let words = words(line);
        let result = arguments(&words).map(check);
        assert!(matches!(result, Some(Err(_))), "{line}: {result:?}");
    }
    for line in ["cargo run -p gd-examples --bin load_and_generate -- out/tiny", "type gd", "cargo test -- x"]
    {
        assert!(arguments(&words(line)).is_none(), "{line}");
    }
}
