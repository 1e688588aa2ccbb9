//! The GPUs that a build with CUDA or Metal can use.

use std::fmt;

use serde::Serialize;

/// The CUDA support of a build with CUDA.
#[derive(Debug, Serialize)]
pub(super) struct Cuda {
    /// Hash of the code of all kernels in the program.
    kernels: &'static str,
    gpus: Vec<CudaGpu>,
    /// Why no GPU is available, or why one cannot be opened.
    missing: Option<String>,
}

#[derive(Debug, Serialize)]
struct CudaGpu {
    device: String,
    name: String,
    compute_capability: String,
    memory_mib: usize,
    free_mib: usize,
}

#[cfg(feature = "cuda")]
impl Cuda {
    /// Lists the GPUs; `None` for a build without CUDA.
    pub(super) fn detect() -> Option<Self> {
        use gd_kernels::cuda::{count, describe, kernel_hash, open};
        let mut gpus = Vec::new();
        let mut list = || -> gd_kernels::Result<()> {
            for number in 0..count()? {
                let gpu = describe(&open(number)?)?;
                let (major, minor) = gpu.compute_capability;
                gpus.push(CudaGpu {
                    device: format!("cuda:{number}"),
                    name: gpu.name,
                    compute_capability: format!("{major}.{minor}"),
                    memory_mib: gpu.memory >> 20,
                    free_mib: gpu.free >> 20,
                });
            }
            Ok(())
        };
        let missing = list().err().map(|e| e.to_string());
        Some(Self { kernels: kernel_hash(), gpus, missing })
    }
}

#[cfg(not(feature = "cuda"))]
impl Cuda {
    /// Lists the GPUs; `None` for a build without CUDA.
    pub(super) fn detect() -> Option<Self> {
        None
    }
}

impl fmt::Display for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "yes, kernels {}", self.kernels)?;
        for gpu in &self.gpus {
            let CudaGpu { device, name, compute_capability, memory_mib, free_mib } = gpu;
            write!(
                f,
                "\n              {device}: {name}, compute capability {compute_capability}, {memory_mib} MiB, \
                 {free_mib} MiB free"
            )?;
        }
        self.missing.as_ref().map_or(Ok(()), |reason| write!(f, "\n              {reason}"))
    }
}

/// The Metal support of a build with Metal.
#[derive(Debug, Serialize)]
pub(super) struct Metal {
    /// Hash of the source of all kernels in the program.
    kernels: &'static str,
    /// Name and memory of the GPU, or why it cannot be opened.
    gpu: String,
}

#[cfg(feature = "metal")]
impl Metal {
    /// Describes the GPU; `None` for a build without Metal.
    pub(super) fn detect() -> Option<Self> {
        use gd_kernels::metal::{describe, kernel_hash, open};
        let gpu = match open().and_then(|device| describe(&device)) {
            Ok(gpu) => {
                format!(
                    "{}, {} MiB available to this program, {} MiB of them in use",
                    gpu.name,
                    gpu.memory >> 20,
                    gpu.taken >> 20
                )
            }
            Err(e) => e.to_string(),
        };
        Some(Self { kernels: kernel_hash(), gpu })
    }
}

#[cfg(not(feature = "metal"))]
impl Metal {
    /// Describes the GPU; `None` for a build without Metal.
    pub(super) fn detect() -> Option<Self> {
        None
    }
}

impl fmt::Display for Metal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "yes, kernels {}\n              {}", self.kernels, self.gpu)
    }
}
