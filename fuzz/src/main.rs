//! The fuzz target: libFuzzer's inputs for the reader that `GD_READER` names; scripts/ci/fuzz.sh runs it.
#![no_main]

mod readers;

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use peak_alloc::PeakAlloc;
use readers::ReaderFolder;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

static READER: LazyLock<String> = LazyLock::new(|| std::env::var("GD_READER").expect("GD_READER"));
static FOLDER: LazyLock<ReaderFolder> = LazyLock::new(|| {
    ReaderFolder::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")).expect("a folder for the inputs")
});

fuzz_target!(|input: &[u8]| {
    FOLDER.run(&READER, input, &MEMORY);
});
