//! The kernels of `kernels/metal`: compiled once per device and source, specialised once per kernel and constants.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_metal_kernels::metal::{ComputePipeline, Device};
use objc2::available;
use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_foundation::NSString;
use objc2_metal::{
    MTLCompileOptions, MTLDataType, MTLDevice, MTLFunctionConstantValues, MTLLibrary,
    MTLMathFloatingPointFunctions, MTLMathMode,
};

use crate::backend::gpu::Kernel;
use crate::error::{Error, Result};

/// The sources that the build script embedded, with their includes inlined.
mod embedded {
    include!(concat!(env!("OUT_DIR"), "/metal_sources.rs"));
}

/// A hash of the text of all kernels in this program.
pub fn kernel_hash() -> &'static str {
    embedded::HASH
}

/// The values of function constants 0, 1 and 2; see [`crate::backend::gpu::Gpu::launch`].
pub(super) type ConstantValues = [u32; 3];

/// A compiled source.
type Library = Retained<ProtocolObject<dyn MTLLibrary>>;

/// The kernels of one device.
pub(super) struct Loaded {
    registry_id: u64,
    device: Device,
    /// One per source, compiled with the first launch of one of its kernels.
    libraries: Vec<OnceLock<Library>>,
    pipelines: RwLock<HashMap<(Kernel, ConstantValues), ComputePipeline>>,
}

impl Loaded {
    /// The kernels of a device, shared by all that use it.
    pub(super) fn of(device: &Device) -> Arc<Self> {
        static DEVICES: Mutex<Vec<Arc<Loaded>>> = Mutex::new(Vec::new());
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let registry_id = device.registry_id();
        if let Some(loaded) = devices.iter().find(|l| l.registry_id == registry_id) {
            return loaded.clone();
        }
        let loaded = Arc::new(Self {
            registry_id,
            device: device.clone(),
            libraries: embedded::SOURCES.iter().map(|_| OnceLock::new()).collect(),
            pipelines: RwLock::default(),
        });
        devices.push(loaded.clone());
        loaded
    }

    /// A kernel specialised for these constants.
    pub(super) fn pipeline(&self, kernel: Kernel, constants: ConstantValues) -> Result<ComputePipeline> {
        let cached = self.pipelines.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = cached.get(&(kernel, constants)) {
            return Ok(pipeline.clone());
        }
        drop(cached);
        let source = kernel.source();
        let at = embedded::SOURCES.iter().position(|(name, _)| *name == source);
        let at = at.ok_or_else(|| Error::Device(format!("no Metal kernel {kernel} in this program")))?;
        let pipeline = self.specialise(self.library(at)?, kernel, constants)?;
        let mut pipelines = self.pipelines.write().unwrap_or_else(PoisonError::into_inner);
        Ok(pipelines.entry((kernel, constants)).or_insert(pipeline).clone())
    }

    fn library(&self, at: usize) -> Result<&Library> {
        if let Some(library) = self.libraries[at].get() {
            return Ok(library);
        }
        let (source, text) = embedded::SOURCES[at];
        let compiled = self
            .device
            .as_ref()
            .newLibraryWithSource_options_error(&NSString::from_str(text), Some(&options()));
        let code = compiled.map_err(|e| {
            Error::Device(format!("Metal does not compile kernels/metal/{source}.metal: {e}"))
        })?;
        Ok(self.libraries[at].get_or_init(|| code))
    }

    fn specialise(
        &self,
        library: &Library,
        kernel: Kernel,
        constants: ConstantValues,
    ) -> Result<ComputePipeline> {
        let refused = |e: &dyn std::fmt::Display| {
            Error::Device(format!("Metal kernel {kernel} with constants {constants:?}: {e}"))
        };
        let name = NSString::from_str(&kernel.to_string());
        let function = library
            .newFunctionWithName_constantValues_error(&name, &values(constants))
            .map_err(|e| refused(&e))?;
        let state = self.device.as_ref().newComputePipelineStateWithFunction_error(&function);
        Ok(ComputePipeline::new(state.map_err(|e| refused(&e))?))
    }
}

/// Compile options without fast-math and with precise functions, so that rounding is as written.
fn options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    if available!(macos = 15, ios = 18) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated)] // what older systems have
        options.setFastMathEnabled(false);
    }
    options
}

#[allow(unsafe_code)] // a pointer to a constant's value
fn values(constants: ConstantValues) -> Retained<MTLFunctionConstantValues> {
    let values = MTLFunctionConstantValues::new();
    for (index, value) in constants.iter().enumerate() {
        // SAFETY: Metal copies the 32-bit number behind the pointer before the call returns.
        unsafe {
            values.setConstantValue_type_atIndex(NonNull::from(value).cast(), MTLDataType::UInt, index);
        }
    }
    values
}
