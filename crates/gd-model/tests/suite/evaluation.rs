//! Bits per byte and losses that are not finite.

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::Error;
use gd_model::config::{ModelConfig, Recipe};
use gd_model::data::Tokens;
use gd_model::eval::evaluate;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;

const CPU: Device = Device::Cpu;
const DOCUMENTS: [&str; 4] = ["bcd", "the cat", "ok go", "x"];

fn config() -> ModelConfig {
    let mut model = Recipe::load("tiny").unwrap().model;
    (model.hidden_size, model.intermediate_size, model.num_hidden_layers) = (16, 24, 1);
    (model.num_attention_heads, model.num_key_value_heads, model.head_dim) = (2, 1, 8);
    model.vocab_size = 258;
    model
}

/// The tokenizer of bytes with a begin token 256 and an end token 257 around every text, as far as they are wanted.
fn tokenizer(begin: bool, end: bool) -> Tokenizer {
    let mut json: serde_json::Value =
        serde_json::from_str(&Tokenizer::bytes().unwrap().to_json().unwrap()).unwrap();
    let token = |id: u32, content: &str| {
        serde_json::json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                            "normalized": false, "special": true })
    };
    json["added_tokens"] = serde_json::json!([token(256, "<s>"), token(257, "<end>")]);
    let special = |name: &str| serde_json::json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let mut single = vec![serde_json::json!({ "Sequence": { "id": "A", "type_id": 0 } })];
    if begin {
        single.insert(0, special("<s>"));
    }
    if end {
        single.push(special("<end>"));
    }
    let ids = |name: &str, id: u32| serde_json::json!({ "id": name, "ids": [id], "tokens": [name] });
    json["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": { "<s>": ids("<s>", 256), "<end>": ids("<end>", 257) },
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(&path).unwrap()
}

/// The losses of a document alone, of all tokens but the first.
fn losses(model: &Transformer, ids: &[u32]) -> Vec<f64> {
    let n = ids.len() - 1;
    let inputs = Tensor::new(&ids[..n], &CPU).unwrap().unsqueeze(0).unwrap();
    let targets = Tensor::new(&ids[1..], &CPU).unwrap().unsqueeze(0).unwrap();
    let losses = model.token_losses(&inputs, &targets, &Pass::new(&Mask::causal(0))).unwrap();
    losses.into_iter().map(f64::from).collect()
}

#[test]
fn bits_per_byte_count_text_tokens_over_bytes() {
    let params = Params::new(3, DType::F32, &CPU);
    let model = Transformer::new(&config(), params.builder()).unwrap();
    let bytes: usize = DOCUMENTS.iter().map(|text| text.len()).sum();
    for (begin, end) in [(false, false), (true, false), (false, true), (true, true)] {
        let tokenizer = tokenizer(begin, end);
        let ids: Vec<Vec<u32>> =
            DOCUMENTS.iter().map(|text| tokenizer.encode_document(text).unwrap()).collect();
        let extra = usize::from(begin) + usize::from(end);
        assert!(ids.iter().zip(DOCUMENTS).all(|(ids, text)| ids.len() == text.len() + extra), "{ids:?}");
        // One token per byte. Without a begin token the first byte of a document is not predicted.
        let (mut nats, mut counted) = (0.0, 0);
        for ids in ids.iter().filter(|ids| ids.len() > 1) {
            let losses = losses(&model, ids);
            let text = &losses[..losses.len() - usize::from(end)];
            nats += text.iter().sum::<f64>();
            counted += text.len();
        }
        assert_eq!(counted, if begin { bytes } else { bytes - DOCUMENTS.len() });
        let expected = nats / counted as f64 / std::f64::consts::LN_2;
        let tokens = Tokens::documents(ids).with_framing(tokenizer.framing().unwrap());
        for context in [64, 5, 3] {
            let result = evaluate(&model, &tokens, bytes, context, 2, &CPU).unwrap();
            assert_eq!(result.text_tokens, counted, "{begin} {end} {context}");
            assert!((result.text_bytes - counted as f64).abs() < 1e-9, "{}", result.text_bytes);
            if context == 64 {
                assert!(
                    (result.bits_per_byte - expected).abs() < 1e-5,
                    "{} {expected}",
                    result.bits_per_byte
                );
            }
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_is_an_error() {
    let params = Params::new(3, DType::F32, &CPU);
    let model = Transformer::new(&config(), params.builder()).unwrap();
    let tokens = Tokens::from(vec![1, 2, 3, 4, 5]);
    assert!(evaluate(&model, &tokens, 5, 64, 1, &CPU).unwrap().loss.is_finite());
    let (_, norm) = params.vars().into_iter().find(|(name, _)| name == "model.norm.weight").unwrap();
    norm.set(&(norm.as_detached_tensor() * f64::NAN).unwrap()).unwrap();
    let error = evaluate(&model, &tokens, 5, 64, 1, &CPU).unwrap_err();
    assert!(matches!(error, Error::NotFinite { token: 1, .. }), "{error}");
    assert_eq!(error.to_string(), "the loss of token 1 is NaN");
}
