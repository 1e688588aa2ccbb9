//! The compiled kernels: loaded into a context once, found by name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DriverError, PinnedHostSlice, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use crate::backend::cuda::{failed, limits};
use crate::backend::gpu::Arch;
use crate::error::{Error, Result};

/// What the build script compiled.
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
    /// One for each source, loaded when its first kernel is asked for.
    modules: Vec<OnceLock<Arc<CudaModule>>>,
    kernels: RwLock<HashMap<String, Arc<Kernel>>>,
    /// Host memory for copies that the device makes while the host goes on.
    pinned: Mutex<Vec<PinnedHostSlice<f32>>>,
}

/// A kernel in a context.
pub(super) struct Kernel {
    function: CudaFunction,
    /// Dynamic shared memory that it has been allowed.
    shared: AtomicU32,
}

impl Kernel {
    pub(super) fn function(&self) -> sys::CUfunction {
        self.function.cu_function()
    }

    /// Lets it have more dynamic shared memory than is usual.
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
        if let Some(known) = contexts.iter().find(|l| l.context == *context) {
            return Ok(known.clone());
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

    /// Host memory for `count` numbers, which the device copies on its own: exactly as many, since cudarc copies as much
    /// as there is room for. To take and to free it may wait for the device, so it comes back by [`Loaded::keep`].
    #[allow(unsafe_code)] // undefined contents, which a copy fills
    pub(super) fn pinned(&self, count: usize) -> std::result::Result<PinnedHostSlice<f32>, DriverError> {
        let mut kept = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.iter().position(|one| one.len() == count) {
            Some(at) => Ok(kept.swap_remove(at)),
            None => unsafe { self.context.alloc_pinned_with_flags(count, 0) },
        }
    }

    pub(super) fn keep(&self, pinned: PinnedHostSlice<f32>) {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner).push(pinned);
    }

    /// The kernel of this name.
    pub(super) fn kernel(&self, name: &str) -> Result<Arc<Kernel>> {
        let known = self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        let kernel = Arc::new(Kernel { function: self.find(name)?, shared: AtomicU32::new(0) });
        let mut kernels = self.kernels.write().unwrap_or_else(PoisonError::into_inner);
        Ok(kernels.entry(name.to_owned()).or_insert(kernel).clone())
    }

    /// Looks through the sources; a kernel's name begins with that of its operator, and mostly of its source.
    fn find(&self, name: &str) -> Result<CudaFunction> {
        let mut order: Vec<usize> = (0..compiled::MODULES.len()).collect();
        order.sort_by_key(|&at| !name.starts_with(compiled::MODULES[at].0));
        let mut refused = None;
        for at in order {
            match self.module(at) {
                Ok(module) => {
                    if let Ok(function) = module.load_function(name) {
                        return Ok(function);
                    }
                }
                // A source without code for this GPU, such as Hopper's on another one.
                Err(e) => refused = Some((compiled::MODULES[at].0, e)),
            }
        }
        let reason = refused.map_or(String::new(), |(source, e)| format!("; {source} does not load: {e}"));
        Err(Error::Device(format!(
            "no kernel {name} for compute capability {}.{} in this program{reason}",
            self.arch.compute / 10,
            self.arch.compute % 10
        )))
    }

    fn module(&self, at: usize) -> std::result::Result<&Arc<CudaModule>, DriverError> {
        if let Some(module) = self.modules[at].get() {
            return Ok(module);
        }
        let module = self.context.load_module(Ptx::from_binary(compiled::MODULES[at].1.to_vec()))?;
        Ok(self.modules[at].get_or_init(|| module))
    }
}
