//! SmolLM2-135M-Instruct as a GGUF file against golden values, see tests/fixtures/README.md of the repository. Skipped unless
//! `GD_SMOLLM2` or target/smollm2 is the folder that scripts/data/fetch_smollm2.sh creates.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::data::Tokens;
use gd_model::eval::evaluate;
use gd_model::infer::generate::generate;
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::io::files::read_text;
use gd_model::model::pretrained;
use gd_testing::log_cases;

const CPU: Device = Device::Cpu;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The folder of the model; `None` if it has not been fetched.
fn folder() -> Option<PathBuf> {
    let set = std::env::var_os("GD_SMOLLM2").map(PathBuf::from);
    let folder = set.or_else(|| Some(root().join("target/smollm2")).filter(|path| path.exists()));
    if folder.is_none() {
        println!("skipped: scripts/data/fetch_smollm2.sh target/smollm2 fetches the model");
    }
    folder
}

#[test]
fn golden_values_of_smollm2() -> Result<()> {
    let Some(folder) = folder() else { return Ok(()) };
    let loaded = pretrained::load(&folder.join("SmolLM2-135M-Instruct.Q4_1.gguf"), &CPU)?;
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let count = loaded.params.count();
    ensure!(count == 134_515_008, "{count} parameters");
    // <|im_end|>, which the file names, and <|endoftext|>, a control token that ends a text in any vocabulary.
    ensure!(loaded.end_tokens()? == [2, 0], "{:?}", loaded.end_tokens()?);
    let mut cases = 0;

    let prompt = tokenizer.encode("The capital of France is")?;
    ensure!(prompt == [504, 3575, 282, 4649, 314], "{prompt:?}");
    let ids = Tensor::new(prompt.as_slice(), &CPU)?.unsqueeze(0)?;
    let logits = model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?.flatten_to(1)?.get(4)?;
    let mut ranked: Vec<(usize, f32)> = logits.to_vec1::<f32>()?.into_iter().enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    let golden = [(7042, 17.3713), (260, 14.8886), (4528, 13.2450), (2250, 13.0095), (1315, 12.9515)];
    for ((id, logit), (golden_id, golden)) in ranked.iter().zip(golden) {
        ensure!(
            *id == golden_id && (logit - golden).abs() < 1e-3,
            "{id} {logit} instead of {golden_id} {golden}"
        );
        cases += 1;
    }

    let mut greedy = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0)?;
    let new = generate(model, &prompt, 10, &mut greedy, &CPU, |_| Ok(true))?;
    let text = tokenizer.decode(&new)?;
    ensure!(text == " Paris.\n\nThe answer is: 2", "{text:?}");
    cases += 1;

    let mut texts = vec![
        (folder.join("1790_george_washington_n.txt"), usize::MAX, 256, 37.2210),
        (folder.join("2016_barack_obama_d.txt"), usize::MAX, 256, 25.8265),
        (folder.join("chapter_1.txt"), usize::MAX, 256, 70.7693),
    ];
    let wikitext = root().join("../shared/bench/wikitext2-valid.txt");
    if wikitext.exists() {
        texts.push((wikitext, 12_000, 1024, 12.7259));
    } else {
        println!("skipped: {} does not exist", wikitext.display());
    }
    for (path, characters, context, golden) in texts {
        let text: String = read_text(&path)?.chars().take(characters).collect();
        let ids = tokenizer.encode(&text)?[..context].to_vec();
        let bytes = tokenizer.decode(&ids)?.len();
        let perplexity = evaluate(model, &Tokens::from(ids), bytes, context, 1, &CPU)?.perplexity;
        println!("{}: perplexity {perplexity:.4}, golden {golden}", path.display());
        ensure!(
            (perplexity / golden - 1.0).abs() < 1e-3,
            "{}: {perplexity} instead of {golden}",
            path.display()
        );
        cases += 1;
    }

    let chat = loaded.chat()?.context("the model has a chat template")?.render(None, "Hello")?;
    let golden = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                  <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    ensure!(chat == golden, "{chat:?}");
    let ids = tokenizer.encode_written(&chat)?;
    ensure!(ids.iter().filter(|id| **id == 1).count() == 3, "special tokens are not split: {ids:?}");
    log_cases("smollm2", cases + 1);
    Ok(())
}
