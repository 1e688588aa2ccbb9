//! Records which position every head reads while a model generates text, and verifies the trace.
//!
//! `cargo run --release -p gd-examples --bin trace_generation [MODEL]`. Without a model a small one is trained
//! first.

use std::fs::File;

use candle_core::Device;
use gd_examples::model_or_demo;
use gd_model::infer::sampler::Sampling;
use gd_model::model::pretrained;
use gd_model::trace::{Generation, Header, Trace, Writer, hex, record, replay, verify};

fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = model_or_demo("gd", &folder.path().join("model"))?;
    let device = Device::Cpu;
    let loaded = pretrained::load(&path, &device)?;

    // Record a generation.
    let (seed, sampling) = (7, Sampling { temperature: 0.7, ..Sampling::default() });
    let prompt = loaded.tokenizer.encode("It was the ")?;
    let generation = Generation { sampling, seed, max_tokens: 20, end_tokens: loaded.end_tokens()? };
    let header = Header::new(&loaded, "demo", &prompt, Some(&generation), &[], &device)?;
    let file = folder.path().join("demo.trace");
    let mut out = File::create(&file)?;
    let mut writer = Writer::new(&file, &mut out, &header)?;
    let mut last = None;
    let (_, ending) = record(&loaded, &header, &prompt, &device, |record| {
        writer.push(&record)?;
        last = Some(record);
        Ok(())
    })?;
    let seal = writer.finish(ending)?;
    println!("{} positions up to {ending}, head {}", seal.count, hex(&seal.head));

    // The record of the last token has one row for every selecting layer and head.
    let last = last.expect("the prompt has tokens");
    println!("position {} ({:?})", last.position, last.text);
    let heads = header.selecting().flat_map(|layer| (0..layer.heads).map(move |head| (layer.layer, head)));
    for ((layer, head), row) in heads.zip(&last.rows) {
        match row.selected {
            -1 => println!("  layer {layer} head {head} abstains"),
            position => {
                println!("  layer {layer} head {head} reads position {position}, margin {:.3}", row.margin);
            }
        }
    }

    // The verification needs the file and its head, the replay also the model.
    let trace = Trace::read(&file)?;
    verify(&trace, Some(seal.head), None)?;
    let outcome = replay(&trace.header, &trace.decoded()?, trace.ending, &loaded, 1e-3, &device)?;
    println!(
        "verified; replayed {} selections: {} ambiguous, {} contradictions",
        outcome.selections, outcome.ambiguous, outcome.contradictions
    );
    Ok(())
}
