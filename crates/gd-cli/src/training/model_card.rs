//! The values of a trained model's card.

use gd_kernels::Estimator;
use gd_model::config::{Mechanism, Recipe};
use gd_model::eval::Evaluation;
use gd_model::train::Trainer;
use gd_model::train::run::About;

/// The placeholders of the model card template and their values.
pub(super) fn entries(
    about: &About,
    recipe: &Recipe,
    trainer: &Trainer,
    result: &Evaluation,
) -> Vec<(&'static str, String)> {
    let summary = match &recipe.train.uptrain {
        Some(uptrain) => {
            let teacher = uptrain.teacher.file_name().unwrap_or(uptrain.teacher.as_os_str());
            format!("{} with its attention replaced and trained again.", teacher.to_string_lossy())
        }
        None => "A small language model trained with gd.".into(),
    };
    let data: Vec<_> = about.data.iter().map(|p| p.display().to_string()).collect();
    let data = if data.is_empty() { "the sample text of the repository".to_owned() } else { data.join(", ") };
    vec![
        ("name", about.name.clone()),
        ("summary", summary),
        ("parameters", trainer.params.count().to_string()),
        ("mechanism", mechanism(recipe)),
        ("tokenizer", format!("`tokenizer.json`, {} tokens", recipe.model.vocab_size)),
        ("context", recipe.model.max_position_embeddings.to_string()),
        ("data", data),
        ("steps", recipe.train.steps.to_string()),
        ("loss", format!("{:.4} nats per token, {:.4} bits per byte", result.loss, result.bits_per_byte)),
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
