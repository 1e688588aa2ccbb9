//! The Rust side of `kernels/shared/params.h` is the one generated from the header, and has the same layout as in C++.

#[path = "../../build/params_header.rs"]
mod params_header;

use std::fs;
use std::path::{Path, PathBuf};

use gd_kernels::gpu::params::LAYOUTS;
use gd_testing::layouts;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn rust_params_are_generated_from_the_header() {
    let header = fs::read_to_string(root().join("kernels/shared/params.h")).unwrap();
    let items = params_header::parse(&header).unwrap();
    let generated = params_header::rust(&items);
    let path = root().join("crates/gd-kernels/src/backend/gpu/params.rs");
    if std::env::var_os("UPDATE_PARAMS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let current = fs::read_to_string(&path).unwrap();
    assert!(
        current == generated,
        "{} is not what params.h generates: run `UPDATE_PARAMS=1 cargo test -p gd-testing params`",
        path.display()
    );
}

#[test]
fn every_field_has_the_same_offset_in_rust_and_cpp() {
    let rust_layouts: Vec<_> = LAYOUTS
        .iter()
        .map(|(name, size, fields)| {
            let fields = fields.iter().map(|(f, at)| ((*f).to_owned(), *at)).collect::<Vec<_>>();
            ((*name).to_owned(), *size, fields)
        })
        .collect();
    assert!(
        rust_layouts.len() >= 3 && rust_layouts.iter().all(|(_, size, fields)| fields.len() * 4 <= *size)
    );
    assert_eq!(layouts(), rust_layouts);
}

#[test]
fn unknown_forms_are_refused_with_their_line() {
    let refused = |text: &str, line: &str| match params_header::parse(text) {
        Err(e) => assert!(e.contains(line), "{e} does not name {line}"),
        Ok(items) => panic!("{items:?} from {text}"),
    };
    refused("struct A {\n    u64 x;\n};\n", "params.h:2");
    refused("struct A {\n    u32 x[2];\n};\n", "params.h:2");
    refused("struct A {\n    Later x;\n};\n", "params.h:2");
    refused("struct A {\n    u32 x;\n", "A does not end");
    refused("// An enum.\nenum Other : u32 {\n    OTHER_X = 0,\n};\n", "params.h:3");
    refused("enum ScoreCode : u32 {\n    SCORE_X,\n};\n", "params.h:2");
    refused("enum ScoreCode {\n};\n", "params.h:1");
    refused("constexpr CONSTANT u32 X = 1 << 2;\n", "params.h:1");
    refused("#define X 1\n", "params.h:1");
    refused("typedef float f32;\n", "params.h:1");
    let items = params_header::parse("struct A {\n    f32 x;  // one\n};\n").unwrap();
    assert!(params_header::offset_table(&items).contains("offsetof(A, x)"));
}
