//! Generation on an emulated GPU: what is cached changes nothing, a batch gives each prompt what it gets alone, and the
//! texts are those of the CPU.

use candle_core::{D, DType, Device, Result, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::infer::generate::{generate, generate_batch};
use gd_model::infer::sampler::{Sampler, Sampling};
use serde_json::Value;

use crate::model_training::{config, filled, models};
use crate::targets;

const PROMPTS: [&str; 3] = ["It was the best of times", "A", "Call me Ishmael"];
const NEW: usize = 9;

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.iter().map(|p| p.bytes().map(u32::from).collect()).collect()
}

/// The greedy continuations of all prompts together, and what the full pass over each text would have chosen.
fn continued(gd: &Value) -> Result<[Vec<Vec<u32>>; 2]> {
    let (model, _params) = filled(&config(gd), DType::F32)?;
    let greedy = || Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0).unwrap();
    let mut samplers = vec![greedy(); PROMPTS.len()];
    // The second text ends early.
    let mut count = 0;
    let new = generate_batch(&model, &prompts(), NEW, &mut samplers, &Device::Cpu, |place, _| {
        count += usize::from(place == 1);
        Ok(place != 1 || count < 4)
    })
    .unwrap();
    let alone = generate(&model, &prompts()[0], NEW, &mut greedy(), &Device::Cpu, |_| Ok(true)).unwrap();
    assert_eq!(alone, new[0], "alone and in a batch");
    let mut full = Vec::new();
    for (prompt, new) in prompts().iter().zip(&new) {
        let text = [&prompt[..], new].concat();
        let ids = Tensor::new(&text[..text.len() - 1], &Device::Cpu)?.unsqueeze(0)?;
        let logits = model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?;
        let best = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1::<u32>()?;
        full.push(best[prompt.len() - 1..].to_vec());
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
