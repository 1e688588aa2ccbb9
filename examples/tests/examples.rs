//! Every example program runs to its end.

#[path = "../convert_checkpoint.rs"]
mod convert_checkpoint;
#[path = "../decode_with_cache.rs"]
mod decode_with_cache;
#[path = "../drop_in_layer.rs"]
mod drop_in_layer;
#[path = "../load_and_generate.rs"]
mod load_and_generate;
#[path = "../trace_generation.rs"]
mod trace_generation;
#[path = "../train_layer.rs"]
mod train_layer;

#[test]
fn drop_in_layer_runs() -> anyhow::Result<()> {
    drop_in_layer::main()
}

#[test]
fn train_layer_runs() -> anyhow::Result<()> {
    train_layer::main()
}

#[test]
fn decode_with_cache_runs() -> anyhow::Result<()> {
    decode_with_cache::main()
}

#[test]
fn load_and_generate_runs() -> anyhow::Result<()> {
    load_and_generate::main()
}

#[test]
fn convert_checkpoint_runs() -> anyhow::Result<()> {
    convert_checkpoint::main()
}

#[test]
fn trace_generation_runs() -> anyhow::Result<()> {
    trace_generation::main()
}
