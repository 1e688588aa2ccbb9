//! Kernels by name: which ones exist, for which element types, head dimensions and targets, and in which source file
//! each is compiled.
//!
//! A kernel's symbol is `OP[_ELEMENT][_dHEAD_DIM]_TARGET`, such as `scan_top1_bf16_d128_sm80`. A test of the emulator
//! compares [`Kernel::all`] with the kernels that the sources define.

use std::fmt;

use candle_core::DType;

use crate::backend::gpu::{Arch, require_compute};
use crate::error::{Error, Result};

/// Head dimensions for which kernels are compiled; others are padded to the next.
pub const HEAD_DIMS: [usize; 6] = [32, 64, 96, 128, 192, 256];

/// The compiled head_dim for `head_dim`.
pub(crate) fn padded_dim(op: &str, head_dim: usize) -> Result<usize> {
    let fits = HEAD_DIMS.into_iter().find(|&d| d >= head_dim).filter(|_| head_dim.is_multiple_of(8));
    fits.filter(|_| head_dim > 0).ok_or_else(|| {
        Error::Unsupported(format!(
            "{op}: head_dim {head_dim} on a GPU; multiples of 8 from 8 to 256 are supported"
        ))
    })
}

/// Element type of a kernel's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The element type for tensors of `dtype` in operator `op`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names operator and dtype where there are no kernels for it.
    pub fn new(op: &str, dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::Bf16),
            _ => Err(Error::Unsupported(format!(
                "{op}: dtype {} on a GPU; f32, f16 and bf16 are supported",
                dtype.as_str()
            ))),
        }
    }

    /// Its name in symbols and source files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Instruction set for which a kernel is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelTarget {
    /// CUDA, compute capability 8.0 or later.
    Sm80,
    /// CUDA, compute capability 9.0 with Hopper's TMA and warpgroup instructions.
    Sm90a,
    /// Apple GPUs.
    Metal,
}

impl KernelTarget {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sm80, Self::Sm90a, Self::Metal];

    /// Its name at the end of symbols.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm80",
            Self::Sm90a => "sm90a",
            Self::Metal => "metal",
        }
    }
}

/// Over which parameters the kernels of an operation are instantiated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Instances {
    /// One kernel.
    One,
    /// One per element type.
    Elements,
    /// One per element type and head dimension.
    HeadDims,
}

/// Where kernels of an operation exist.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Targets {
    /// CUDA and Metal.
    Portable,
    /// CUDA, Metal, and for 16-bit elements a kernel for Hopper.
    PortableAndHopper,
    /// CUDA.
    Cuda,
    /// Metal.
    Metal,
}

/// Declares [`KernelOp`] and its table.
macro_rules! kernel_ops {
    ($($(#[$doc:meta])* $op:ident, $symbol:literal, $source:literal, $instances:ident, $targets:ident;)*) => {
        /// An operation that kernels implement.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum KernelOp { $($(#[$doc])* $op,)* }

        impl KernelOp {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$op),*];

            /// How its symbols begin.
            pub fn symbol(self) -> &'static str {
                match self { $(Self::$op => $symbol,)* }
            }

            /// How the names of its source files begin.
            fn source(self) -> &'static str {
                match self { $(Self::$op => $source,)* }
            }

            fn instances(self) -> Instances {
                match self { $(Self::$op => Instances::$instances,)* }
            }

            fn targets(self) -> Targets {
                match self { $(Self::$op => Targets::$targets,)* }
            }
        }
    };
}

kernel_ops! {
    /// The nearest key of every query, optionally with its value row.
    ScanTop1, "scan_top1", "scan", HeadDims, PortableAndHopper;
    /// The K nearest keys of every query and protected keys.
    ScanTopK, "scan_topk", "scan", HeadDims, PortableAndHopper;
    /// Both, with 8-bit keys whose bounds exclude most keys.
    ScanCertified, "scan_certified", "scan_certified", HeadDims, Cuda;
    /// The bias of every key.
    KeyBias, "key_bias", "scan", Elements, Portable;
    /// A few queries against a long cache.
    Decode, "decode", "decode", HeadDims, Portable;
    /// The same, with 8-bit keys whose bounds exclude most keys.
    DecodeCertified, "decode_certified", "decode_certified", HeadDims, Cuda;
    /// Merges the results of all splits where there are no 64-bit atomics.
    DecodeMerge, "decode_merge", "decode", Elements, Metal;
    /// Quantises keys to 8-bit integers.
    Quantize, "quantize", "quantize", Elements, Cuda;
    /// The choice of every row and its output.
    SelectForward, "select_forward", "select", Elements, Portable;
    /// Gradients of energies, value weights and thresholds.
    SelectBackward, "select_backward", "select", Elements, Portable;
    /// The candidates without the winner.
    SelectRemaining, "select_remaining", "select", One, Portable;
    /// Gradient of the values, summed over the readers of each.
    ValueGradient, "value_gradient", "select", Elements, Portable;
    /// Energies of given candidates.
    EnergyForward, "energy_forward", "select", Elements, Portable;
    /// Gradients of queries and beta from those of the energies.
    EnergyBackward, "energy_backward", "select", Elements, Portable;
    /// Gradient of the keys from that of the energies.
    EnergyKeyGradient, "energy_key_gradient", "select", Elements, Portable;
    /// Gradient of the prior per key and prior head.
    PriorRows, "prior_rows", "select", One, Portable;
    /// Gradient of the prior in its own shape.
    PriorGradient, "prior_gradient", "select", One, Portable;
    /// Mixture density at the coherence point, and the point.
    DensityForward, "density_forward", "select", Elements, Portable;
    /// Gradients of queries, beta and alpha from that of the density.
    DensityBackward, "density_backward", "select", Elements, Portable;
    /// Gradient of the keys from that of the density.
    DensityKeyGradient, "density_key_gradient", "select", Elements, Portable;
    /// Queries without their component along the jump.
    ResidualForward, "residual_forward", "select", Elements, Portable;
    /// Gradient of the queries through the residual.
    ResidualBackward, "residual_backward", "select", Elements, Portable;
    /// Gradient of the keys through the residual.
    ResidualKeyGradient, "residual_key_gradient", "select", Elements, Portable;
    /// Adds the partial sums of keys that several warps summed.
    AddPartials, "add_partials", "select", Elements, Portable;
    /// Sums rows into heads.
    HeadSums, "head_sums", "select", One, Portable;
    /// Energies after the barrier.
    BarrierForward, "barrier_forward", "select", One, Portable;
    /// Gradient of the energies before the barrier.
    BarrierBackward, "barrier_backward", "select", One, Portable;
    /// Radix sort: the key of every slot.
    SortInit, "sort_init", "select", One, Portable;
    /// Radix sort: digit counts of every block.
    SortHistogram, "sort_histogram", "select", One, Portable;
    /// Radix sort: exclusive sums of the counts.
    SortOffsets, "sort_offsets", "select", One, Portable;
    /// Radix sort: moves every entry.
    SortScatter, "sort_scatter", "select", One, Portable;
    /// Where the entries of every key start.
    SortSegmentStarts, "sort_segment_starts", "select", One, Portable;
    /// Running average: weights of every step.
    RunningAverageWeights, "running_average_weights", "running_average", Elements, Portable;
    /// Running average: every block of steps from zero.
    RunningAveragePartial, "running_average_partial", "running_average", Elements, Portable;
    /// Running average: the start of every block.
    RunningAverageCarry, "running_average_carry", "running_average", One, Portable;
    /// Running average: the means.
    RunningAverageRows, "running_average_rows", "running_average", Elements, Portable;
    /// Running average, backward: every block of steps from zero.
    RunningAveragePartialBackward, "running_average_partial_backward", "running_average", Elements, Portable;
    /// Running average, backward: what reaches every block from those after it.
    RunningAverageCarryBackward, "running_average_carry_backward", "running_average", One, Portable;
    /// Running average, backward: gradients of the values and the shares.
    RunningAverageRowsBackward, "running_average_rows_backward", "running_average", Elements, Portable;
    /// Running average, backward: gradients of decay and write.
    RunningAverageWeightsBackward, "running_average_weights_backward", "running_average", Elements, Portable;
    /// Causal convolution.
    CausalConvForward, "causal_conv_forward", "causal_conv", Elements, Portable;
    /// Causal convolution, gradients of x and of the weight per chunk of rows.
    CausalConvBackward, "causal_conv_backward", "causal_conv", Elements, Portable;
    /// Causal convolution, gradient of the weight.
    CausalConvWeightGradient, "causal_conv_weight_gradient", "causal_conv", Elements, Portable;
    /// RMS normalisation.
    RmsNormForward, "rms_norm_forward", "rms_norm", Elements, Portable;
    /// RMS normalisation, gradients of x and of the weight per block of rows.
    RmsNormBackward, "rms_norm_backward", "rms_norm", Elements, Portable;
    /// RMS normalisation, gradient of the weight.
    RmsNormWeightGradient, "rms_norm_weight_gradient", "rms_norm", Elements, Portable;
    /// Rotary position embedding, and its gradient by the negative angle.
    Rotary, "rotary", "rotary", Elements, Portable;
    /// SwiGLU.
    SwigluForward, "swiglu_forward", "swiglu", Elements, Portable;
    /// SwiGLU, gradients of both inputs.
    SwigluBackward, "swiglu_backward", "swiglu", Elements, Portable;
    /// Cross entropy of every row.
    CrossEntropyForward, "cross_entropy_forward", "cross_entropy", Elements, Portable;
    /// Cross entropy, gradient of the logits.
    CrossEntropyBackward, "cross_entropy_backward", "cross_entropy", Elements, Portable;
    /// Partial sums of squares of a gradient.
    Squares, "squares", "adamw", Elements, Portable;
    /// The factor of clipped gradients, or that the update is skipped.
    Clip, "clip", "adamw", One, Portable;
    /// AdamW update of a parameter.
    Adamw, "adamw", "adamw", Elements, Portable;
}

/// A kernel: an operation instantiated for element type, head dimension and target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    op: KernelOp,
    element: Option<ElementType>,
    head_dim: Option<usize>,
    target: KernelTarget,
}

impl Kernel {
    /// What it computes.
    pub fn op(&self) -> KernelOp {
        self.op
    }

    /// For which instruction set it is written.
    pub fn target(&self) -> KernelTarget {
        self.target
    }

    /// The source file that defines it, without folder and extension.
    pub fn source(&self) -> String {
        let source = self.op.source();
        match (self.element, self.target) {
            // The scans of every element type have a source of their own, so that they compile in parallel.
            (Some(element), KernelTarget::Sm90a) => format!("{source}_{}_sm90a", element.name()),
            (Some(element), _) if source.starts_with("scan") => format!("{source}_{}", element.name()),
            _ => source.to_owned(),
        }
    }

    /// Every kernel of all sources.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for &op in KernelOp::ALL {
            for target in KernelTarget::ALL {
                let instances = op.instances();
                for element in ElementType::ALL {
                    let variant = Variant { element, target };
                    for head_dim in HEAD_DIMS {
                        let kernel = variant.sized(op, head_dim);
                        if kernel.exists() && !all.contains(&kernel) {
                            all.push(kernel);
                        }
                        if instances != Instances::HeadDims {
                            break;
                        }
                    }
                }
            }
        }
        all
    }

    /// Whether the sources define it.
    fn exists(&self) -> bool {
        match (self.op.targets(), self.target) {
            (Targets::Portable | Targets::PortableAndHopper, KernelTarget::Sm80 | KernelTarget::Metal)
            | (Targets::Cuda, KernelTarget::Sm80)
            | (Targets::Metal, KernelTarget::Metal) => true,
            // Lists of candidates leave no shared memory for keys of 256 elements.
            (Targets::PortableAndHopper, KernelTarget::Sm90a) => {
                let too_large = self.op == KernelOp::ScanTopK && self.head_dim == Some(256);
                self.element != Some(ElementType::F32) && !too_large
            }
            _ => false,
        }
    }

    /// The same operation with Hopper's instructions, if there is such a kernel.
    pub fn on_hopper(self) -> Option<Self> {
        let kernel = Self { target: KernelTarget::Sm90a, ..self };
        (self.target == KernelTarget::Sm80 && kernel.exists()).then_some(kernel)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.op.symbol())?;
        if let Some(element) = self.element {
            write!(f, "_{}", element.name())?;
        }
        if let Some(head_dim) = self.head_dim {
            write!(f, "_d{head_dim}")?;
        }
        write!(f, "_{}", self.target.name())
    }
}

/// Element type and target for which an operator launches its kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) element: ElementType,
    pub(crate) target: KernelTarget,
}

impl Variant {
    /// The variant for tensors of `dtype`; refuses a device or a dtype without kernels in the name of operator `op`.
    pub(crate) fn new(op: &str, dtype: DType, arch: &Arch) -> Result<Self> {
        require_compute(op, arch)?;
        Ok(Self { element: ElementType::new(op, dtype)?, target: arch.target() })
    }

    /// The kernel of an operation that has no head dimension.
    pub(crate) fn kernel(self, op: KernelOp) -> Kernel {
        debug_assert!(op.instances() != Instances::HeadDims, "{op:?} needs a head dimension");
        let element = (op.instances() == Instances::Elements).then_some(self.element);
        Kernel { op, element, head_dim: None, target: self.target }
    }

    /// The kernel of an operation for rows of `head_dim` elements, one of [`HEAD_DIMS`].
    pub(crate) fn sized(self, op: KernelOp, head_dim: usize) -> Kernel {
        match op.instances() {
            Instances::HeadDims => {
                Kernel { op, element: Some(self.element), head_dim: Some(head_dim), target: self.target }
            }
            _ => self.kernel(op),
        }
    }
}
