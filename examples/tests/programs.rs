//! Every example program runs to its end.

use std::process::Command;

/// Runs a program without arguments and returns what it prints.
fn run(program: &str) -> String {
    let output = Command::new(program).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_layer_replaces_multi_head_attention() {
    let text = run(env!("CARGO_BIN_EXE_drop_in_layer"));
    assert!(text.contains("[1, 12, 64]"), "{text}");
}

#[test]
fn the_layer_learns_with_candles_optimizer() {
    let text = run(env!("CARGO_BIN_EXE_train_layer"));
    assert!(text.contains("step 200"), "{text}");
}

#[test]
fn sequences_decode_alone_and_as_a_batch() {
    let text = run(env!("CARGO_BIN_EXE_decode_with_cache"));
    assert!(text.contains("[108, 48]"), "{text}");
}

#[test]
fn a_model_generates_text() {
    let text = run(env!("CARGO_BIN_EXE_load_and_generate"));
    assert!(text.contains("It was the "), "{text}");
}

#[test]
fn a_checkpoint_is_converted() {
    let text = run(env!("CARGO_BIN_EXE_convert_checkpoint"));
    assert!(text.contains(" 1 keys: perplexity"), "{text}");
}

#[test]
fn a_generation_is_traced_and_verified() {
    let text = run(env!("CARGO_BIN_EXE_trace_generation"));
    assert!(text.contains("verified"), "{text}");
}

#[test]
fn an_encoder_decoder_learns_with_every_mechanism_for_states() {
    let text = run(env!("CARGO_BIN_EXE_sort_and_reverse"));
    let share = |name: &str, task: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
        let after = line.split_once(task).unwrap_or_else(|| panic!("{text}")).1;
        after
            .split('%')
            .next()
            .and_then(|share| share.trim().parse().ok())
            .unwrap_or_else(|| panic!("{text}"))
    };
    for name in ["luong", "bahdanau", "pointer"] {
        for task in ["copying", "reversing"] {
            assert!(share(name, task) >= 90.0, "{text}");
        }
    }
    // The dot product of states does not learn to sort in so few steps; how far Bahdanau attention comes depends on the last
    // bits.
    assert!(share("pointer", "sorting") >= 90.0 && share("bahdanau", "sorting") >= 60.0, "{text}");
    // It never goes back to an earlier digit.
    assert!(share("monotonic", "copying") >= 90.0 && share("monotonic", "reversing") < 60.0, "{text}");
}
