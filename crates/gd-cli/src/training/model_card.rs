//! The values of a trained model's card.

use std::fs;
use std::path::Path;

use gd_kernels::Estimator;
use gd_model::config::{Mechanism, Recipe};
use gd_model::eval::Evaluation;
use gd_model::train::Trainer;
use gd_model::train::run::About;

use crate::render::numbers::grouped;

/// The placeholders of the model card template and their values, for the run in the folder `out`.
pub(super) fn entries(
    out: &Path,
    about: &About,
    recipe: &Recipe,
    trainer: &Trainer,
    result: Option<&Evaluation>,
) -> Vec<(&'static str, String)> {
    let summary = match (&recipe.train.uptrain, &recipe.train.lora) {
        (_, Some(lora)) => {
            let base = lora.base.file_name().unwrap_or(lora.base.as_os_str()).to_string_lossy();
            format!(
                "A LoRA adapter of {base} (r {}, alpha {}, {}).",
                lora.r,
                lora.alpha,
                lora.targets.join(", ")
            )
        }
        (Some(uptrain), None) => {
            let teacher = uptrain.teacher.file_name().unwrap_or(uptrain.teacher.as_os_str());
            format!("{} with its attention replaced and trained again.", teacher.to_string_lossy())
        }
        (None, None) => {
            format!("A small language model trained with gd from the configuration {}.", about.name)
        }
    };
    let data: Vec<_> = about.data.iter().map(|p| p.display().to_string()).collect();
    let data = if data.is_empty() { "the sample text of the repository".to_owned() } else { data.join(", ") };
    let loss = result.map_or("not measured: there is no validation text".to_owned(), |result| {
        format!("{:.4} nats per token, {:.4} bits per byte", result.loss, result.bits_per_byte)
    });
    // The canonical path has a last component even if the folder is given as `.`.
    let folder = fs::canonicalize(out).unwrap_or_else(|_| out.to_path_buf());
    let name = folder.file_name().map_or(about.name.clone(), |name| name.to_string_lossy().into_owned());
    vec![
        ("name", name),
        ("summary", summary),
        ("parameters", grouped(trainer.params.count() as u64)),
        ("mechanism", mechanism(recipe)),
        ("tokenizer", format!("`tokenizer.json`, {} tokens", recipe.model.vocab_size)),
        ("context", recipe.model.max_position_embeddings.to_string()),
        ("data", data),
        ("steps", grouped(recipe.train.steps)),
        ("loss", loss),
    ]
}

fn mechanism(recipe: &Recipe) -> String {
    let select = &recipe.model.gd.select;
    if !recipe.model.gd.mechanism.contains(&Mechanism::Gd) {
        let mut names: Vec<_> = recipe.model.gd.mechanism.iter().map(Mechanism::name).collect();
        names.dedup();
        names.join(", ")
    } else if select.estimator == Estimator::Blend && select.candidates > 1 {
        format!("softmax over the {} keys of least energy", select.candidates)
    } else {
        "selection (one key per head)".into()
    }
}
