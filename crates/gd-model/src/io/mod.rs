//! File formats: checkpoints, safetensors, GGUF, tokenizers and chat templates.

pub mod chat_template;
pub mod checkpoint;
pub mod files;
pub mod gguf;
pub mod safetensors;
pub mod tokenizer;
