//! From a preset's name or a file to a checked recipe.

use std::path::Path;

use super::{PRESETS, Recipe};
use crate::error::{Error, Result};

impl Recipe {
    /// A preset by name, or a JSON file.
    ///
    /// # Errors
    /// Names the file and the key or value that does not fit.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
            return Self::parse(text, Path::new(name));
        }
        let path = Path::new(name);
        if !path.exists() {
            let names: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
            return Err(Error::Invalid(format!(
                "config {name:?} is neither a file nor a preset ({})",
                names.join(", ")
            )));
        }
        Self::parse(&crate::data::read_text(path)?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let recipe: Self =
            serde_json::from_str(text).map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))?;
        let named = |e: Error| Error::Invalid(format!("{}: {e}", path.display()));
        recipe.model.validate().map_err(named)?;
        recipe.train.validate().map_err(named)?;
        if recipe.train.context > recipe.model.max_position_embeddings {
            return Err(Error::Invalid(format!(
                "{}: train.context {} exceeds max_position_embeddings {}",
                path.display(),
                recipe.train.context,
                recipe.model.max_position_embeddings
            )));
        }
        Ok(recipe)
    }
}
