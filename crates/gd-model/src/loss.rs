//! The losses of training, in nats: those of [`gd_kernels::cross_entropy`].

pub use gd_kernels::cross_entropy::{
    IGNORE, chunk_rows, count_targets, cross_entropy, linear_cross_entropy, linear_distillation,
    linear_token_losses, token_losses,
};
