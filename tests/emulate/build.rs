//! Compiles the CUDA sources as host C++ together with what executes them, and a table of the offsets of
//! `params.h`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let table = PathBuf::from(env::var("OUT_DIR").unwrap()).join("params.cpp");
    let header = kernels.join("shared/params.h");
    fs::write(&table, offsets(&fs::read_to_string(&header).unwrap(), &header)).unwrap();

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").define("GD_EMULATE", None).opt_level(2).debug(false);
    // Products and sums keep their own rounding unless the source says fmaf.
    build.flag("-ffp-contract=off").flag_if_supported("-Wno-unknown-pragmas");
    for folder in ["cuda", "emulate"] {
        let mut sources: Vec<PathBuf> =
            fs::read_dir(kernels.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
        sources.sort();
        for source in sources {
            match source.extension().and_then(|e| e.to_str()) {
                // A file name that the compiler takes for C++.
                Some("cu") => {
                    let name = source.file_stem().unwrap().to_str().unwrap();
                    let wrapper = table.with_file_name(format!("cuda_{name}.cpp"));
                    fs::write(
                        &wrapper,
                        format!("#include \"{}\"\n", source.canonicalize().unwrap().display()),
                    )
                    .unwrap();
                    build.file(wrapper);
                }
                Some("cpp") => {
                    build.file(source);
                }
                _ => {}
            }
        }
    }
    // Kernels announce themselves from static constructors, which nothing else refers to.
    build.file(table).link_lib_modifier("+whole-archive").compile("gd_emulate");
}

/// C++ that tells name, size, and the fields with their offsets of every struct in `text`.
fn offsets(text: &str, header: &Path) -> String {
    let mut out = format!("#include <cstddef>\n#include \"{}\"\n", header.canonicalize().unwrap().display());
    out.push_str("extern \"C\" {\n");
    let mut list = String::new();
    let mut name = None;
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default().trim();
        if let Some(found) = code.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) {
            writeln!(list, "{{\"{found}\", nullptr, sizeof({found})}},").unwrap();
            name = Some(found.to_owned());
        } else if code == "};" {
            name = None;
        } else if let (Some(name), Some((_, field))) = (&name, code.trim_end_matches(';').split_once(' ')) {
            writeln!(list, "{{\"{name}\", \"{field}\", offsetof({name}, {field})}},").unwrap();
        }
    }
    out.push_str("struct GdField { const char *name; const char *field; size_t value; };\n");
    writeln!(out, "extern const GdField gd_fields[] = {{\n{list}{{nullptr, nullptr, 0}}\n}};\n}}").unwrap();
    out
}
