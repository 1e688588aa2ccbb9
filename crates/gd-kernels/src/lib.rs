//! Selection-attention operators for candle.
#![doc = include_str!("../README.md")]
#![cfg_attr(
    all(feature = "gpu", not(feature = "emulate")),
    allow(dead_code, unreachable_pub, reason = "tests use more of the launches, through the module gpu")
)]

mod backend;
mod cache;
mod error;
mod mask;
mod ops;
mod options;
pub mod reference;

pub use backend::Backend;
pub use backend::cpu::isa::Isa;
pub use backend::cpu::product::{MatmulPrecision, with_matmul_precision};
pub use backend::dispatch::on_pool;
pub use backend::graph::with_backward;
#[doc(hidden)]
pub use backend::support::{CANDIDATES, support_table};
pub use cache::{
    AppendBuffer, CachedKeys, DecodeUse, Int8Keys, KeyBias, KeyCache, KeyShape, PagedCache, SequenceCache,
    WritePosition, rounded_for_cache,
};
pub use error::{Error, Result};
pub use mask::Mask;
pub use ops::adamw;
pub use ops::causal_conv::{causal_conv, packed_causal_conv};
pub use ops::cross_entropy;
pub use ops::decode::{decode, decode_paged, decode_reads_protected, scan_select};
pub use ops::embedding::embedding;
pub use ops::feed_forward::feed_forward;
pub use ops::gated_sum::gated_sum;
pub use ops::heads::{HeadProjection, Rotation, project_from_heads, project_to_heads};
pub use ops::linear::{Dropout, LowRank, linear, linears, low_rank_linear};
pub use ops::masked_softmax::masked_softmax;
pub use ops::newton_schulz::newton_schulz;
pub use ops::quantized_linear::{QuantizedMatrix, quantized_linear, quantized_linears};
pub use ops::rms_norm::rms_norm;
pub use ops::rotary::rotary;
pub use ops::running_average::{AverageState, running_average};
pub use ops::scan::options::Scan;
pub use ops::scan::plan::{CpuScanPlan, ScanPlan, Walk};
pub use ops::scan::problem::Problem;
pub use ops::scan::rescored::Rescored;
pub use ops::scan::{Candidates, plan, scan, scan_all};
pub use ops::select::{MAX_PICKS, Pick, Round, Select, Selected, above_runner_up, select};
pub use ops::softmax_attention::softmax_attention;
pub use ops::swiglu::swiglu;
pub use options::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Precision, Score, TieBreak};

/// Devices and kernels of NVIDIA GPUs.
#[cfg(feature = "cuda")]
pub mod cuda {
    #[doc(hidden)]
    pub use crate::backend::cuda::{Buffer, Cuda};
    pub use crate::backend::cuda::{count, describe, kernel_hash, open};
}

/// Devices and kernels of Apple GPUs.
#[cfg(feature = "metal")]
pub mod metal {
    #[doc(hidden)]
    pub use crate::backend::metal::{Buffer, Metal};
    pub use crate::backend::metal::{describe, kernel_hash, open};
}

/// Launches over buffers, which tests run on an emulated device and on GPUs.
#[cfg(feature = "emulate")]
#[doc(hidden)]
pub mod gpu {
    pub use crate::backend::gpu::emulate;
    pub use crate::backend::gpu::{
        Arch, Constants, Gpu, Kernel, KernelOp, Launch, Prior, RowSizes, Slice, Tensor4, TensorMap, kernel,
        params, tensor_map,
    };
    pub use crate::cache::int8_keys::launch as quantize;
    pub use crate::ops::adamw::gpu::launch as adamw;
    pub use crate::ops::causal_conv::gpu::launch as conv;
    pub use crate::ops::cross_entropy::gpu::launch as cross_entropy;
    pub use crate::ops::decode::gpu::launch as decode;
    pub use crate::ops::rms_norm::gpu::launch as norm;
    pub use crate::ops::rotary::gpu::launch as rotary;
    pub use crate::ops::running_average::gpu::launch as average;
    pub use crate::ops::scan::gpu::certified as scan_certified;
    pub use crate::ops::select::gpu::{inverse_index as inverse, launch as select};
    pub use crate::ops::swiglu::gpu::launch as swiglu;

    /// Whether operators on tensors of `device` run on the CPU, and not on an emulated GPU.
    pub fn on_cpu(device: &candle_core::Device) -> bool {
        crate::backend::dispatch::on_cpu(device)
    }

    /// Launches of a scan.
    pub mod scan {
        pub use crate::backend::gpu::Prior;
        pub use crate::backend::gpu::kernel::HEAD_DIMS;
        pub use crate::cache::key_bias::launch::{BiasInputs, key_bias};
        pub use crate::ops::scan::gpu::launch::*;
    }
}
