//! Generation on an emulated GPU: with a cache and without, in a batch and alone, and on the CPU, a prompt has the same
//! continuation.

use candle_core::{D, DType, Device, Result, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::infer::generate::{generate, generate_batch};
use gd_model::infer::sampler::{Sampler, Sampling};
use serde_json::Value;

use crate::model_training::{config, models, perturbed};
use crate::targets;

const PROMPTS: [&str; 3] = ["It was the best of times", "A", "Call me Ishmael"];
const NEW: usize = 9;

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.iter().map(|p| p.bytes().map(u32::from).collect()).collect()
}

/// The greedy continuations of all prompts in a batch, and those that a forward pass over each whole text predicts.
fn continued(gd: &Value) -> Result<[Vec<Vec<u32>>; 2]> {
    let (model, _params) = perturbed(&config(gd), DType::F32)?;
    let greedy = || Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0).unwrap();
    let mut samplers = vec![greedy(); PROMPTS.len()];
    // The second text ends early.
    let mut count = 0;
    let new = generate_batch(&model, &prompts(), NEW, &mut samplers, &Device::Cpu, |row, _| {
        count += usize::from(row == 1);
        Ok(row != 1 || count < 4)
    })
    .unwrap();
    let alone = generate(&model, &prompts()[0], NEW, &mut greedy(), &Device::Cpu, |_| Ok(true)).unwrap();
    assert_eq!(alone, new[0], "alone and in a batch");
    let mut full = Vec::new();
    for (prompt, new) in prompts().iter().zip(&new) {
        let text = [&prompt[..], new].concat();
        let ids = Tensor::new(&text[..text.len() - 1], &Device::Cpu)?.unsqueeze(0)?;
        let logits = model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?;
        let predicted = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1::<u32>()?;
        full.push(predicted[prompt.len() - 1..].to_vec());
    }
    Ok([new, full])
}

#[test]
fn cached_batched_and_whole_texts_are_the_same_and_those_of_the_cpu() -> Result<()> {
    for (name, gd) in models() {
        let [want, _] = continued(&gd)?;
        assert_eq!(want.iter().map(Vec::len).collect::<Vec<_>>(), [NEW, 4, NEW]);
        for target in targets() {
            let [new, full] = target.run(|| continued(&gd))?;
            assert_eq!(new, full, "{name} on {}: with a cache and without", target.name());
            assert_eq!(new, want, "{name} on {}: not the text of the CPU", target.name());
            if name != "softmax" {
                target.count();
            }
        }
    }
    Ok(())
}
