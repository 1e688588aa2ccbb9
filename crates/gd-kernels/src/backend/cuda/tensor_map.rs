//! Encodes tensor maps for TMA with the driver.

use candle_core::DType;
use candle_core::cuda_backend::cudarc::driver::sys;

use crate::backend::cuda::{Buffer, failed};
use crate::backend::gpu::TensorMap;
use crate::backend::gpu::tensor_map::BOX_BYTES;
use crate::error::Result;

/// The encoded map, a kernel argument, of a tensor whose first element is at address `first`.
#[allow(unsafe_code)] // a call of the driver
pub(super) fn encode(map: &TensorMap<'_, Buffer>, first: sys::CUdeviceptr) -> Result<sys::CUtensorMap> {
    use sys::CUtensorMapDataType as Type;
    let dtype = match map.dtype {
        DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let [batch, heads, rows, dim] = map.dims.map(|n| n as u64);
    let [batch_stride, head_stride, row_stride] = map.strides.map(|n| n as u64);
    // The driver counts from the innermost dimension on.
    let (dims, strides) = ([dim, rows, heads, batch], [row_stride, head_stride, batch_stride]);
    let boxed = [(BOX_BYTES / map.dtype.size_in_bytes()) as u32, map.box_rows as u32, 1, 1];
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the driver reads four dims, three strides, four sizes and four steps, and writes the map.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            dtype,
            4,
            first as *mut std::ffi::c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            boxed.as_ptr(),
            [1; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|e| failed(format!("the driver refuses a tensor map of {map} at {first:#x}"), e))?;
    Ok(encoded)
}
