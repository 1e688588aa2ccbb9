//! The bindings of the kernels in `kernels/metal`: params are buffer 0, and the other buffers are numbered in order.

use std::fs;
use std::path::Path;

/// The numbers that follow `word` in `text`.
fn numbers(text: &str, word: &str) -> Vec<usize> {
    text.split(word).skip(1).filter_map(|rest| rest.split(')').next()?.trim().parse().ok()).collect()
}

#[test]
fn buffers_are_numbered_in_order() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/metal");
    let mut kernels = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        // Expands the macros of select.metal.
        let text = text
            .replace("PARAMS_AT_0,", "[[buffer(0)]]")
            .replace("READERS,", "[[buffer(1)]] [[buffer(2)]] [[buffer(3)]] [[buffer(4)]]");
        // Skips the definition of the macro KERNEL.
        for kernel in text.split("KERNEL(").skip(1).filter(|rest| !rest.starts_with("threads)")) {
            let head = kernel.split('{').next().unwrap();
            let indices = numbers(head, "[[buffer(");
            let name = head.split([' ', '(']).nth(1).unwrap();
            assert_eq!(indices, (0..indices.len()).collect::<Vec<_>>(), "{name} in {}", path.display());
            assert!(indices.len() >= 2, "{name} in {}", path.display());
            kernels += 1;
        }
    }
    assert!(kernels >= 30, "{kernels} kernels");
}

#[test]
fn macros_of_select_expand_as_this_test_assumes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/metal");
    let text = fs::read_to_string(folder.join("select.metal")).unwrap();
    let macros = text.split("#define SELECT").next().unwrap();
    assert_eq!(numbers(macros, "[[buffer("), [0, 1, 2, 3, 4]);
}
