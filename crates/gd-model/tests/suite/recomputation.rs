//! Recomputation of blocks in the backward pass (gradient checkpointing): the gradients are equal to the bit.

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_kernels::cross_entropy::IGNORE;
use gd_layer::Pass;
use gd_model::config::{Mechanism, ModelConfig, Recipe};
use gd_model::model::Transformer;
use gd_model::model::params::Params;

fn model(mechanism: Vec<Mechanism>, tied: bool) -> ModelConfig {
    let mut config = Recipe::load("tiny").unwrap().model;
    (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (32, 48, 3);
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (4, 2, 8);
    config.tie_word_embeddings = tied;
    config.gd.mechanism = mechanism;
    config.gd.select.threshold = Some(1.2);
    config
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn gradients_are_equal_to_the_bit_with_recomputation() {
    use Mechanism::{Gd, Softmax};
    for (mechanism, tied, hardness) in
        [(vec![Gd], true, 1.0), (vec![Gd, Softmax, Gd], false, 0.3), (vec![Softmax], true, 1.0)]
    {
        let params = Params::new(5, DType::F32, &Device::Cpu);
        let config = model(mechanism, tied);
        let model = Transformer::new(&config, params.builder()).unwrap();
        let frozen = Transformer::new(&config, params.frozen()).unwrap();
        let vars = params.vars();
        // A matrix of zeros would set the gradients that pass through it to zero.
        for (i, (_, var)) in vars.iter().enumerate() {
            let noise: Vec<f32> =
                (0..var.elem_count()).map(|j| ((i + j * 7) as f32 * 12.9898).sin() * 0.05).collect();
            let noise = Tensor::from_vec(noise, var.shape(), &Device::Cpu).unwrap();
            var.set(&(var.as_detached_tensor() + noise).unwrap()).unwrap();
        }
        let ids: Vec<u32> = (0..2 * 40).map(|i| i * 37 % 251).collect();
        let mut next: Vec<u32> = ids.iter().map(|i| i * 5 % 256).collect();
        next[7] = IGNORE;
        let tensor = |ids: Vec<u32>| Tensor::from_vec(ids, (2, 40), &Device::Cpu).unwrap();
        let (ids, targets) = (tensor(ids), tensor(next));
        let mask = Mask::causal(0);
        let pass = Pass { hardness, ..Pass::new(&mask) };
        let plain = (model.loss(&ids, &targets, &pass).unwrap() * 0.75).unwrap();
        let grads = plain.backward().unwrap();
        let head = |hidden: &Tensor| model.head_loss(hidden, &targets)? * 0.75;
        let (loss, again) = model.checkpointed(&frozen, &vars, &ids, &pass, &head).unwrap();
        assert_eq!(bits(&loss), bits(&plain));
        for (name, var) in &vars {
            let (a, b) = (again.get(var).expect(name), grads.get(var).expect(name));
            assert!(bits(b).iter().any(|&x| x << 1 != 0), "{name} has no gradient");
            assert!(bits(a) == bits(b), "{name}, {hardness}");
        }
        // The frozen model shares the parameters, and its outputs have no graph.
        let same = frozen.loss(&ids, &targets, &pass).unwrap();
        assert_eq!(bits(&same), bits(&model.loss(&ids, &targets, &pass).unwrap()));
        assert!(!same.track_op() && plain.track_op());
    }
}
