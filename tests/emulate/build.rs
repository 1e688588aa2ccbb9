//! Compiles the CUDA and the Metal sources as host C++ together with what executes them, and a table of the
//! offsets of `params.h`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let table = PathBuf::from(env::var("OUT_DIR").unwrap()).join("params.cpp");
    let header = kernels.join("shared/params.h");
    fs::write(&table, offsets(&fs::read_to_string(&header).unwrap(), &header)).unwrap();

    let build = |name: &str, files: Vec<PathBuf>, flags: &[&str]| {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").define("GD_EMULATE", None).opt_level(2).debug(false);
        // Products and sums keep their own rounding unless the source says fma.
        build.flag("-ffp-contract=off").flag_if_supported("-Wno-unknown-pragmas");
        for flag in flags {
            build.flag(flag);
        }
        // Kernels announce themselves from static constructors, which nothing else refers to.
        build.files(files).link_lib_modifier("+whole-archive").compile(name);
    };
    let sources = |folder: &str, extension: &str| {
        let all = fs::read_dir(kernels.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<PathBuf> =
            all.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
        all.sort();
        all
    };
    // A file name that the compiler takes for C++; Metal's words lie in a namespace.
    let wrapped = |source: PathBuf| {
        let kind = source.extension().unwrap().to_str().unwrap();
        let wrapper = table.with_file_name(format!("{kind}_{}.cpp", source.file_stem().unwrap().display()));
        let include = |path: &Path| format!("#include \"{}\"\n", path.canonicalize().unwrap().display());
        let text = match kind {
            "cu" => include(&source),
            _ => {
                let words = include(&kernels.join("emulate/metal.h"));
                format!("{words}namespace gd_metal {{\n{}}}\n", include(&source))
            }
        };
        fs::write(&wrapper, text).unwrap();
        wrapper
    };
    let mut cuda: Vec<PathBuf> = sources("cuda", "cu").into_iter().map(wrapped).collect();
    cuda.extend(sources("emulate", "cpp"));
    cuda.push(table.clone());
    build("gd_emulate", cuda, &[]);
    // Attributes of Metal mean nothing here; a double in its sources would hide what f32 loses.
    let metal = sources("metal", "metal").into_iter().map(wrapped).collect();
    build("gd_emulate_metal", metal, &["-Wno-attributes", "-Werror=double-promotion"]);
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
