//! File formats: checkpoints, safetensors, GGUF, tokenizers and chat templates.

pub mod added_tokens;
pub mod chat_template;
pub mod checkpoint;
pub mod files;
pub mod gguf;
pub mod hub;
pub(crate) mod panic;
pub mod safetensors;
mod sentencepiece;
pub mod tokenizer;
