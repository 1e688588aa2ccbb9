//! With the feature `emulator`: compiles the CUDA and Metal kernels as host C++ together with the emulator that runs
//! them, writes a table of the field offsets of `params.h`, and generates the Rust side of that header for a test.

#[cfg(feature = "emulator")]
mod params_header;

fn main() {
    println!("cargo:rerun-if-changed=build");
    #[cfg(feature = "emulator")]
    emulator::build();
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    use super::params_header;

    pub(super) fn build() {
        let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
        println!("cargo:rerun-if-changed={}", kernels.display());
        let out = PathBuf::from(env::var("OUT_DIR").unwrap());
        let table = out.join("params.cpp");
        let header = kernels.join("shared/params.h");
        let items = params_header::parse(&fs::read_to_string(&header).unwrap()).unwrap();
        fs::write(out.join("params.rs"), params_header::rust(&items)).unwrap();
        let include =
            format!("#include <cstddef>\n#include \"{}\"\n", header.canonicalize().unwrap().display());
        fs::write(&table, include + &params_header::offset_table(&items)).unwrap();

        let build = |name: &str, files: Vec<PathBuf>, flags: &[&str]| {
            let mut build = cc::Build::new();
            build.cpp(true).std("c++17").define("GD_EMULATE", None).opt_level(2).debug(false);
            // No contraction to fused multiply-adds: products and sums are rounded unless the source says fma.
            build.flag("-ffp-contract=off").flag_if_supported("-Wno-unknown-pragmas");
            for flag in flags {
                build.flag(flag);
            }
            // Kernels are registered by static constructors, which no other code references.
            build.files(files).link_lib_modifier("+whole-archive").compile(name);
        };
        let sources = |folder: &str, extension: &str| {
            let all = fs::read_dir(kernels.join(folder)).unwrap().map(|entry| entry.unwrap().path());
            let mut all: Vec<PathBuf> =
                all.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
            all.sort();
            all
        };
        // The compiler needs a .cpp file; Metal sources are wrapped in a namespace that has Metal's own names.
        let wrapped = |source: PathBuf| {
            let kind = source.extension().unwrap().to_str().unwrap();
            let wrapper =
                table.with_file_name(format!("{kind}_{}.cpp", source.file_stem().unwrap().display()));
            let include = |path: &Path| format!("#include \"{}\"\n", path.canonicalize().unwrap().display());
            let text = match kind {
                "cu" => include(&source),
                _ => {
                    let language = include(&kernels.join("emulate/metal.h"));
                    format!("{language}namespace gd_metal {{\n{}}}\n", include(&source))
                }
            };
            fs::write(&wrapper, text).unwrap();
            wrapper
        };
        let mut cuda: Vec<PathBuf> = sources("cuda", "cu").into_iter().map(wrapped).collect();
        cuda.extend(sources("emulate", "cpp"));
        cuda.push(table.clone());
        build("gd_emulate", cuda, &[]);
        // The host ignores Metal's attributes. Metal has no double: a promotion would hide rounding errors.
        let metal = sources("metal", "metal").into_iter().map(wrapped).collect();
        build("gd_emulate_metal", metal, &["-Wno-attributes", "-Werror=double-promotion"]);
    }
}
