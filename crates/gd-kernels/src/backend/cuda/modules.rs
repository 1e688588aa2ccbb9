//! The compiled kernels, loaded into a context when they are first launched.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DriverError, PinnedHostSlice, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use crate::backend::cuda::{failed, limits};
use crate::backend::gpu::{Arch, Kernel};
use crate::error::{Error, Result};

/// The modules that the build script compiled.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
}

/// A hash of the code of all kernels in this program.
pub fn kernel_hash() -> &'static str {
    compiled::HASH
}

/// The kernels of one context.
pub(super) struct Loaded {
    context: Arc<CudaContext>,
    arch: Arch,
    /// One per source, loaded with its first kernel.
    modules: Vec<OnceLock<Arc<CudaModule>>>,
    kernels: RwLock<HashMap<Kernel, Arc<Function>>>,
    /// Unused page-locked host memory for asynchronous copies.
    pinned: Mutex<Vec<PinnedHostSlice<f32>>>,
}

/// A kernel in a context.
pub(super) struct Function {
    function: CudaFunction,
    /// Dynamic shared memory, in bytes, that it may use.
    shared: AtomicU32,
}

impl Function {
    pub(super) fn function(&self) -> sys::CUfunction {
        self.function.cu_function()
    }

    /// Raises the limit of its dynamic shared memory.
    pub(super) fn allow_shared(&self, bytes: u32) -> std::result::Result<(), DriverError> {
        if self.shared.load(Ordering::Acquire) < bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(attribute, bytes.cast_signed())?;
            self.shared.fetch_max(bytes, Ordering::Release);
        }
        Ok(())
    }
}

impl Loaded {
    /// The kernels of a context, shared by all that use it.
    pub(super) fn of(context: &Arc<CudaContext>) -> Result<Arc<Self>> {
        static CONTEXTS: Mutex<Vec<Arc<Loaded>>> = Mutex::new(Vec::new());
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = contexts.iter().find(|l| l.context == *context) {
            return Ok(loaded.clone());
        }
        let arch = limits(context).map_err(|e| failed("the limits of the CUDA device", e))?;
        let loaded = Arc::new(Self {
            context: context.clone(),
            arch,
            modules: compiled::MODULES.iter().map(|_| OnceLock::new()).collect(),
            kernels: RwLock::default(),
            pinned: Mutex::default(),
        });
        contexts.push(loaded.clone());
        Ok(loaded)
    }

    pub(super) fn arch(&self) -> Arch {
        self.arch
    }

    /// Page-locked host memory for exactly `count` numbers, since cudarc fills the whole slice. Allocating and freeing it
    /// may wait for the device, so it is returned with [`Loaded::reuse`].
    #[allow(unsafe_code)] // undefined contents, which a copy fills
    pub(super) fn pinned(&self, count: usize) -> std::result::Result<PinnedHostSlice<f32>, DriverError> {
        let mut unused = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        match unused.iter().position(|one| one.len() == count) {
            Some(at) => Ok(unused.swap_remove(at)),
            None => unsafe { self.context.alloc_pinned_with_flags(count, 0) },
        }
    }

    /// Returns memory of [`Loaded::pinned`] for reuse.
    pub(super) fn reuse(&self, pinned: PinnedHostSlice<f32>) {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner).push(pinned);
    }

    /// The loaded code of a kernel.
    pub(super) fn kernel(&self, kernel: Kernel) -> Result<Arc<Function>> {
        let cached = self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(&kernel).cloned();
        if let Some(function) = cached {
            return Ok(function);
        }
        let function = Arc::new(Function { function: self.load(kernel)?, shared: AtomicU32::new(0) });
        let mut kernels = self.kernels.write().unwrap_or_else(PoisonError::into_inner);
        Ok(kernels.entry(kernel).or_insert(function).clone())
    }

    fn load(&self, kernel: Kernel) -> Result<CudaFunction> {
        let missing = |reason: String| {
            Error::Device(format!(
                "no kernel {kernel} for compute capability {}.{} in this program: {reason}",
                self.arch.compute / 10,
                self.arch.compute % 10
            ))
        };
        let source = kernel.source();
        let at = compiled::MODULES.iter().position(|(name, _)| *name == source);
        let at = at.ok_or_else(|| missing(format!("{source} was not compiled")))?;
        // A source may have no code for this GPU, such as Hopper's on another one.
        let module = self.module(at).map_err(|e| missing(format!("{source} does not load: {e}")))?;
        module.load_function(&kernel.to_string()).map_err(|e| missing(e.to_string()))
    }

    fn module(&self, at: usize) -> std::result::Result<&Arc<CudaModule>, DriverError> {
        if let Some(module) = self.modules[at].get() {
            return Ok(module);
        }
        let module = self.context.load_module(Ptx::from_binary(compiled::MODULES[at].1.to_vec()))?;
        Ok(self.modules[at].get_or_init(|| module))
    }
}
