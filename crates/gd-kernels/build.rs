//! With the feature `cuda`: compiles kernels/cuda/*.cu, each to one fatbin with code for every architecture,
//! and lists them for `src/backend/cuda`. With `metal`: puts the includes of kernels/metal/*.metal in place and lists
//! the texts for `src/backend/metal`, which Metal compiles at run time. Without these features it does nothing.
//!
//! nvcc is taken from `NVCC`, from `CUDA_HOME` (`CUDA_PATH`, `CUDA_ROOT`, `CUDA_TOOLKIT_ROOT_DIR`), from `PATH`, or from
//! /usr/local/cuda. `GD_CUDA_ARCHS` (default `80,86,89,90a`) lists the compute capabilities; a source `*_sm90a.cu`
//! has instructions that only Hopper supports and is compiled for `90a` only. Nothing is downloaded.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    exit_on_error(cuda::build());
    #[cfg(feature = "metal")]
    exit_on_error(metal::build());
}

#[cfg(any(feature = "cuda", feature = "metal"))]
fn exit_on_error(built: Result<(), String>) {
    if let Err(e) = built {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

/// The folder of the kernels. Tells cargo to run this script again when one of its `folders` changes.
#[cfg(any(feature = "cuda", feature = "metal"))]
fn kernel_root(folders: &[&str]) -> Result<std::path::PathBuf, String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let root = root.canonicalize().map_err(|e| format!("{}: {e}", root.display()))?;
    for folder in folders {
        println!("cargo:rerun-if-changed={}", root.join(folder).display());
    }
    Ok(root)
}

#[cfg(feature = "metal")]
mod metal {
    use std::collections::HashSet;
    use std::env;
    use std::fmt::Write;
    use std::fs;
    use std::path::{Path, PathBuf};

    /// The folders of the sources and their headers.
    const FOLDERS: [&str; 2] = ["metal", "shared"];

    type Result<T> = std::result::Result<T, String>;

    pub(super) fn build() -> Result<()> {
        let root = super::kernel_root(&FOLDERS)?;
        let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
        let folder = out.join("metal");
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut sources: Vec<PathBuf> = fs::read_dir(root.join("metal"))
            .and_then(|all| all.map(|entry| Ok(entry?.path())).collect())
            .map_err(|e| format!("{}: {e}", root.join("metal").display()))?;
        sources.retain(|path| path.extension().is_some_and(|e| e == "metal"));
        sources.sort();
        let mut hasher = blake3::Hasher::new();
        let mut list = String::from("pub(super) static SOURCES: &[(&str, &str)] = &[\n");
        for source in &sources {
            let mut text = String::new();
            flatten(&root, source, &mut HashSet::new(), &mut text)?;
            let target = folder.join(source.file_name().unwrap_or_default());
            fs::write(&target, &text).map_err(|e| format!("{}: {e}", target.display()))?;
            let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            hasher.update(name.as_bytes()).update(text.as_bytes());
            let _ = writeln!(list, "    ({name:?}, include_str!({target:?})),");
        }
        let hash = hasher.finalize().to_hex();
        let _ = writeln!(list, "];\npub(super) const HASH: &str = {:?};", &hash[..16]);
        fs::write(out.join("metal_sources.rs"), list).map_err(|e| format!("metal_sources.rs: {e}"))
    }

    /// Appends a file with its quoted includes inlined, each file once. `#line` directives preserve the line numbers.
    /// Includes from other folders are for other compilers and are left out.
    fn flatten(root: &Path, path: &Path, included: &mut HashSet<PathBuf>, out: &mut String) -> Result<()> {
        let at = |e: std::io::Error| format!("{}: {e}", path.display());
        let name = path.strip_prefix(root).unwrap_or(path).display();
        let text = fs::read_to_string(path).map_err(at)?;
        let _ = writeln!(out, "#line 1 \"kernels/{name}\"");
        for (number, line) in text.lines().enumerate() {
            let include = line.trim().strip_prefix("#include \"").and_then(|rest| rest.split_once('"'));
            match include {
                Some((file, _)) => {
                    let file = path.with_file_name(file);
                    let file = file.canonicalize().map_err(|e| format!("{}: {e}", file.display()))?;
                    let ours = FOLDERS.iter().any(|folder| file.starts_with(root.join(folder)));
                    if ours && included.insert(file.clone()) {
                        flatten(root, &file, included, out)?;
                    }
                    let _ = writeln!(out, "#line {} \"kernels/{name}\"", number + 2);
                }
                None if line.trim() == "#pragma once" => out.push('\n'),
                None => {
                    out.push_str(line);
                    out.push('\n');
                }
            }
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::fmt::Write;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Environment variables with the folder of a CUDA toolkit.
    const HOMES: [&str; 4] = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"];
    const DEFAULT_ARCHS: &str = "80,86,89,90a";
    /// The suffix of sources with instructions that only Hopper supports.
    const HOPPER: &str = "_sm90a";

    type Result<T> = std::result::Result<T, String>;

    pub(super) fn build() -> Result<()> {
        for name in HOMES.iter().chain(&["NVCC", "GD_CUDA_ARCHS"]) {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let root = super::kernel_root(&["cuda", "shared"])?;
        let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
        let (archs, nvcc) = (archs()?, nvcc()?);
        let sources = sources(&root.join("cuda"), &archs)?;
        compile_all(&nvcc, &root, &sources, &archs, &out)?;
        list(&sources, &out)
    }

    /// The architectures to compile for, such as `80` and `90a`.
    fn archs() -> Result<Vec<String>> {
        let text = env::var("GD_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
        let archs: Vec<String> =
            text.split(',').map(|a| a.trim().trim_start_matches("sm_").to_owned()).collect();
        let number = |a: &str| a.trim_end_matches(char::is_alphabetic).parse::<u32>().ok();
        match archs.iter().find(|a| number(a).is_none_or(|n| n < 80)) {
            Some(bad) => Err(format!(
                "GD_CUDA_ARCHS={text}: `{bad}` is not a compute capability of at least 80 (such as {DEFAULT_ARCHS})"
            )),
            None => Ok(archs),
        }
    }

    /// The compiler.
    fn nvcc() -> Result<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let mut candidates: Vec<PathBuf> = env::var_os("NVCC").into_iter().map(PathBuf::from).collect();
        candidates.extend(HOMES.iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin/nvcc")));
        candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
        candidates.push("/usr/local/cuda/bin/nvcc".into());
        candidates.into_iter().find(|nvcc| nvcc.is_file()).ok_or_else(|| {
            "the feature `cuda` needs nvcc (CUDA 12 or 13), which is neither in CUDA_HOME nor on the PATH. \
             Install the CUDA toolkit, or assemble one from Python wheels with \
             `eval \"$(scripts/hardware/cuda_toolchain.sh DIR)\"`; or build without `--features cuda`"
                .to_owned()
        })
    }

    /// The sources that have code for one of `archs`, in order.
    fn sources(folder: &Path, archs: &[String]) -> Result<Vec<PathBuf>> {
        let at = |e: std::io::Error| format!("{}: {e}", folder.display());
        let mut sources = Vec::new();
        for entry in fs::read_dir(folder).map_err(at)? {
            let path = entry.map_err(at)?.path();
            if path.extension().is_some_and(|e| e == "cu") && targets(&path, archs).next().is_some() {
                sources.push(path);
            }
        }
        sources.sort();
        Ok(sources)
    }

    fn stem(source: &Path) -> String {
        source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Those of `archs` for which a source is compiled.
    fn targets<'a>(source: &Path, archs: &'a [String]) -> impl Iterator<Item = &'a String> {
        let hopper = stem(source).ends_with(HOPPER);
        archs.iter().filter(move |a| !hopper || *a == "90a")
    }

    /// Compiles as many sources at a time as cargo allows.
    fn compile_all(
        nvcc: &Path,
        root: &Path,
        sources: &[PathBuf],
        archs: &[String],
        out: &Path,
    ) -> Result<()> {
        let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(e) = compile(nvcc, root, source, archs, out) {
                    failed.lock().expect("no thread panics").push(e);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, sources.len().max(1)) {
                scope.spawn(work);
            }
        });
        let failed = failed.into_inner().expect("no thread panics");
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
    }

    fn compile(nvcc: &Path, root: &Path, source: &Path, archs: &[String], out: &Path) -> Result<()> {
        let mut command = Command::new(nvcc);
        command.arg("--options-file").arg(root.join("cuda/nvcc.flags")).arg("-I").arg(root.join("shared"));
        let hopper = stem(source).ends_with(HOPPER);
        for arch in targets(source, archs) {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        // PTX, which the driver compiles for GPUs newer than all of these.
        if let (false, Some(least)) = (hopper, archs.iter().find(|a| a.parse::<u32>().is_ok())) {
            command.arg(format!("-gencode=arch=compute_{least},code=compute_{least}"));
        }
        let fatbin = out.join(stem(source)).with_extension("fatbin");
        command.arg("--fatbin").arg("-o").arg(&fatbin).arg(source);
        let run = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
        let report = String::from_utf8_lossy(&run.stderr);
        if !run.status.success() {
            return Err(format!("{command:?}: {}\n{report}", run.status));
        }
        // The compiler reports spills with one line per kernel. They cost speed but do not change results.
        let spills =
            report.lines().filter(|l| l.contains("spill stores") && !l.contains(" 0 bytes spill stores"));
        for line in spills {
            println!("cargo:warning={}: {}", source.display(), line.trim());
        }
        Ok(())
    }

    /// Writes the list that `src/backend/cuda` includes: name and code of every source, and a hash of all code.
    fn list(sources: &[PathBuf], out: &Path) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut text = String::from("pub(super) static MODULES: &[(&str, &[u8])] = &[\n");
        for source in sources {
            let fatbin = out.join(stem(source)).with_extension("fatbin");
            let bytes = fs::read(&fatbin).map_err(|e| format!("{}: {e}", fatbin.display()))?;
            hasher.update(stem(source).as_bytes()).update(&bytes);
            let _ = writeln!(text, "    ({:?}, include_bytes!({:?})),", stem(source), fatbin);
        }
        let hash = hasher.finalize().to_hex();
        let _ = writeln!(text, "];\npub(super) const HASH: &str = {:?};", &hash[..16]);
        fs::write(out.join("cuda_modules.rs"), text).map_err(|e| format!("cuda_modules.rs: {e}"))
    }
}
