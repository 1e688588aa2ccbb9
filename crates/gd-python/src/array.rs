//! Arrays of Python as tensors, and tensors as arrays, through DLPack and without a copy.
#![allow(unsafe_code, reason = "DLPack hands over pointers")]

use std::collections::BTreeMap;
use std::fmt::Display;

use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use dlpark::allocation::dynamic::Initialized;
use dlpark::ffi::{DLDataType, DLDevice, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned};
use dlpark::interop::candle::candle_tensor_from_dlpack;
use dlpark::python::{DlpackExporter, ExportRequest, ImportedDlpack, export_dlpack, from_dlpack};
use dlpark::{DlpackElement, DlpackFlags, Managed, ManagedTensorBase, TensorRef};
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::invalid;

/// An array in the memory of this library. `numpy.from_dlpack` and `torch.from_dlpack` take it without a copy.
#[pyclass(frozen, module = "gd_attention._native")]
pub(crate) struct Array {
    tensor: Tensor,
    /// Whether gradients of the operator start at this array.
    #[pyo3(get)]
    differentiable: bool,
}

impl Array {
    /// An array of a tensor that borrows nothing.
    pub(crate) fn owned(tensor: Tensor) -> Self {
        Self { tensor: tensor.detach(), differentiable: false }
    }

    fn managed<M: ManagedTensorBase>(&self) -> PyResult<Managed<M>> {
        let initialized = Initialized::<M>::try_from(Box::new(self.tensor.clone())).map_err(invalid)?;
        // SAFETY: the tensor, which the allocation owns, has the elements that its shape and strides describe, and none of its
        // storage is borrowed.
        Ok(unsafe { initialized.finish() })
    }
}

#[pymethods]
impl Array {
    /// A capsule with the array; see the array API standard.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        export_dlpack(self, py, ExportRequest::parse(stream, max_version, dl_device, copy)?)
    }

    /// The type and number of the device, (1, 0) for the CPU.
    fn __dlpack_device__(&self) -> (u32, i32) {
        let DLDevice { device_type, device_id } = DLDevice::CPU;
        (device_type.0, device_id)
    }
}

impl DlpackExporter for Array {
    fn device(&self) -> DLDevice {
        DLDevice::CPU
    }

    fn flags(&self) -> DlpackFlags {
        DlpackFlags::empty()
    }

    fn prepare_export(&self, _py: Python<'_>, _request: &ExportRequest<'_>) -> PyResult<()> {
        Ok(())
    }

    fn export_legacy(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensor>> {
        self.managed()
    }

    fn export_versioned(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensorVersioned>> {
        self.managed()
    }
}

/// A tensor over the memory of an array of Python.
struct Borrowed {
    /// The tensor in the shape of the array.
    tensor: Tensor,
    /// The same elements in the order of the memory; a variable if it gets a gradient.
    stored: Tensor,
    /// For each dimension of `tensor` that of `stored`.
    order: Vec<usize>,
    /// Releases the array. None for elements that were copied.
    owner: Option<ImportedDlpack>,
}

impl Borrowed {
    fn new(name: &str, object: &Bound<'_, PyAny>, variable: bool) -> PyResult<Self> {
        let named = |reason: &dyn Display| invalid(format!("{name}: {reason}"));
        let py = object.py();
        let owner = from_dlpack(object.as_borrowed(), None, None).map_err(|e| {
            match e.is_instance_of::<PyBufferError>(py) || e.is_instance_of::<PyValueError>(py) {
                true => named(e.value(py)),
                false => e,
            }
        })?;
        let (storage, dims, order) = {
            let view = owner.validate().map_err(|e| named(&e))?;
            if view.device().device_type != DLDeviceType::CPU {
                let device = view.device();
                let (kind, id) = (device.device_type.0, device.device_id);
                return Err(invalid(format!(
                    "{name} is on the DLPack device ({kind}, {id}), not on the CPU"
                )));
            }
            let dtype = supported(name, view.dtype())?;
            let dims: Vec<usize> = view.shape().iter().map(|&size| size as usize).collect();
            let strides = view.strides_or_compact().map_err(|e| named(&e))?;
            match memory_order(&dims, &strides) {
                Some(order) => (borrow(dtype, &view).map_err(|e| named(&e))?, dims, order),
                None => return Self::copied(name, &owner, variable),
            }
        };
        let stored_dims: Vec<usize> = order.iter().map(|&dim| dims[dim]).collect();
        let stored = Tensor::from_storage(Storage::Cpu(storage), stored_dims, BackpropOp::none(), variable);
        let mut places = vec![0; order.len()];
        for (place, &dim) in order.iter().enumerate() {
            places[dim] = place;
        }
        // From here on, dropping this takes the elements out of the tensor again.
        let mut borrowed = Self { tensor: stored.clone(), stored, order: places, owner: Some(owner) };
        borrowed.tensor = borrowed.in_shape(&borrowed.stored)?;
        Ok(borrowed)
    }

    /// A copy, for an array with gaps or repeated elements, or without any.
    fn copied(name: &str, owner: &ImportedDlpack, variable: bool) -> PyResult<Self> {
        let named = |reason: &dyn Display| invalid(format!("{name}: {reason}"));
        let view = owner.validate().map_err(|e| named(&e))?;
        // Repeated elements take no memory of their own before they are copied.
        let bytes = view.num_bytes();
        if Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
            return Err(named(&format!(
                "no memory for a copy of {bytes} bytes of {:?} elements",
                view.shape()
            )));
        }
        // SAFETY: the array describes its own memory, which it holds while `owner` lives.
        let tensor = match owner {
            ImportedDlpack::Legacy(managed) => unsafe { candle_tensor_from_dlpack(managed) },
            ImportedDlpack::Versioned(managed) => unsafe { candle_tensor_from_dlpack(managed) },
        };
        let mut tensor = tensor.map_err(|e| named(&e))?;
        if variable {
            tensor = candle_core::Var::from_tensor(&tensor).map_err(invalid)?.as_tensor().clone();
        }
        let order = (0..tensor.rank()).collect();
        Ok(Self { stored: tensor.clone(), tensor, order, owner: None })
    }

    /// A tensor in the order of the memory, such as a gradient, in the shape of the array.
    fn in_shape(&self, stored: &Tensor) -> PyResult<Tensor> {
        if self.order.is_sorted() {
            return Ok(stored.clone());
        }
        stored.permute(self.order.as_slice()).map_err(invalid)
    }

    /// Whether the elements of a tensor are those of the array.
    fn shares(&self, tensor: &Tensor) -> bool {
        self.owner.is_some() && address(&self.stored) == address(tensor)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // A copy of the tensor that somebody still has is empty afterwards.
        if let Some(owner) = self.owner.take()
            && self.stored.inplace_op1(&TakeOut).is_err()
        {
            // The elements are still reachable: nobody may release them.
            std::mem::forget((self.stored.clone(), owner));
        }
    }
}

/// Takes borrowed elements out of a tensor, so that nobody frees them.
struct TakeOut;

impl InplaceOp1 for TakeOut {
    fn name(&self) -> &'static str {
        "take-out"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> candle_core::Result<()> {
        std::mem::forget(std::mem::replace(storage, CpuStorage::U8(Vec::new())));
        Ok(())
    }
}

/// The dimensions in the order of the memory, the slowest first; none if the elements have gaps between them, repeat, or run
/// backwards, or if there are none.
fn memory_order(dims: &[usize], strides: &[i64]) -> Option<Vec<usize>> {
    if dims.contains(&0) {
        // Nothing is to be borrowed, and candle refuses to take elements out of a tensor with such strides.
        return None;
    }
    let mut order: Vec<usize> = (0..dims.len()).collect();
    // A dimension of size 1 can have any stride, and stays in its place as far as the others allow.
    let stride = |dim: usize| if dims[dim] == 1 { None } else { Some(strides[dim]) };
    let mut sorted: Vec<usize> = order.iter().copied().filter(|&dim| dims[dim] > 1).collect();
    sorted.sort_by_key(|&dim| std::cmp::Reverse(strides[dim]));
    let mut next = sorted.into_iter();
    for place in &mut order {
        if stride(*place).is_some() {
            *place = next.next()?;
        }
    }
    let mut expected = 1;
    for &dim in order.iter().rev() {
        if stride(dim).is_some_and(|stride| stride != expected) {
            return None;
        }
        expected = i64::try_from(dims[dim]).ok().and_then(|size| size.checked_mul(expected))?;
    }
    Some(order)
}

/// The dtype of tensors with the elements of the array `name`.
fn supported(name: &str, dtype: DLDataType) -> PyResult<DType> {
    Ok(match dtype {
        _ if dtype.is::<f32>() => DType::F32,
        _ if dtype.is::<f64>() => DType::F64,
        _ if dtype.matches(DLDataType::F16) => DType::F16,
        _ if dtype.matches(DLDataType::BF16) => DType::BF16,
        _ if dtype.is::<u8>() => DType::U8,
        _ if dtype.is::<u32>() => DType::U32,
        _ if dtype.is::<i32>() => DType::I32,
        _ if dtype.is::<i64>() => DType::I64,
        _ => {
            let (code, bits, lanes) = (dtype.code.0, dtype.bits, dtype.lanes);
            return Err(invalid(format!(
                "{name} has the DLPack dtype (code {code}, {bits} bits, {lanes} lanes), which is not one of float64, float32, \
                 float16, bfloat16, uint8, uint32, int32 and int64"
            )));
        }
    })
}

/// The elements of an array of [`supported`] dtype as the storage of a tensor, which must be taken out of it again by
/// [`TakeOut`].
fn borrow(dtype: DType, view: &TensorRef<'_>) -> Result<CpuStorage, String> {
    fn elements<T: DlpackElement>(view: &TensorRef<'_>) -> Result<Vec<T>, String> {
        let len = view.num_elements();
        // SAFETY: the array describes its own memory.
        let first = unsafe { view.offset_data_ptr::<T>() }.map_err(|e| e.to_string())?;
        // SAFETY: the pointer is not null and aligned, and `len` elements of the dtype of the array, which `offset_data_ptr` has
        // compared, follow it without gaps. The vector is never dropped, grown or written: operators read the elements of their
        // inputs only, and `TakeOut` removes it before the array is released.
        Ok(unsafe { Vec::from_raw_parts(first.cast_mut(), len, len) })
    }
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(elements(view)?),
        DType::F64 => CpuStorage::F64(elements(view)?),
        DType::F16 => CpuStorage::F16(elements(view)?),
        DType::BF16 => CpuStorage::BF16(elements(view)?),
        DType::U8 => CpuStorage::U8(elements(view)?),
        DType::U32 => CpuStorage::U32(elements(view)?),
        DType::I32 => CpuStorage::I32(elements(view)?),
        DType::I64 => CpuStorage::I64(elements(view)?),
        other => return Err(format!("elements of {other:?} are not read in place")),
    })
}

/// Where the storage of a tensor on the CPU begins.
fn address(tensor: &Tensor) -> Option<usize> {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return None };
    Some(match storage {
        CpuStorage::F32(values) => values.as_ptr().addr(),
        CpuStorage::F64(values) => values.as_ptr().addr(),
        CpuStorage::F16(values) => values.as_ptr().addr(),
        CpuStorage::BF16(values) => values.as_ptr().addr(),
        CpuStorage::U8(values) => values.as_ptr().addr(),
        CpuStorage::U32(values) => values.as_ptr().addr(),
        CpuStorage::I32(values) => values.as_ptr().addr(),
        CpuStorage::I64(values) => values.as_ptr().addr(),
        _ => return None,
    })
}

/// The arrays that a function was called with, by name.
pub(crate) struct Arguments {
    arrays: BTreeMap<String, Borrowed>,
}

impl Arguments {
    /// Borrows the arrays of a dictionary; those of `wrt` get gradients.
    pub(crate) fn borrow(arrays: &Bound<'_, PyDict>, wrt: &[String]) -> PyResult<Self> {
        let mut borrowed = BTreeMap::new();
        for (name, array) in arrays {
            let name: String = name.extract()?;
            let array = Borrowed::new(&name, &array, wrt.contains(&name))?;
            borrowed.insert(name, array);
        }
        if let Some(missing) = wrt.iter().find(|name| !borrowed.contains_key(*name)) {
            return Err(invalid(format!("a gradient of {missing} was asked for, which is not an argument")));
        }
        Ok(Self { arrays: borrowed })
    }

    /// The tensor of this name.
    pub(crate) fn get(&self, name: &str) -> PyResult<&Tensor> {
        self.optional(name).ok_or_else(|| invalid(format!("{name} is missing")))
    }

    /// The tensor of this name, if there is one.
    pub(crate) fn optional(&self, name: &str) -> Option<&Tensor> {
        self.arrays.get(name).map(|array| &array.tensor)
    }

    /// Names and tensors.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.arrays.iter().map(|(name, array)| (name.as_str(), &array.tensor))
    }

    /// The gradients of the arguments that have one, in their shapes; zeros for those that the results do not depend on.
    pub(crate) fn gradients(&self, store: &GradStore) -> PyResult<BTreeMap<String, Array>> {
        let variables = self.arrays.iter().filter(|(_, array)| array.stored.is_variable());
        let gradient = |(name, array): (&String, &Borrowed)| {
            let gradient = match store.get(&array.stored) {
                Some(gradient) => array.in_shape(gradient)?,
                None => array.tensor.zeros_like().map_err(invalid)?,
            };
            Ok((name.clone(), Array::owned(gradient)))
        };
        variables.map(gradient).collect()
    }

    /// A result as an array. One that shares the memory of an argument is copied.
    pub(crate) fn export(&self, result: &Tensor) -> PyResult<Array> {
        let differentiable = result.track_op();
        let shared = self.arrays.values().any(|array| array.shares(result));
        let tensor = result.detach();
        let tensor = if shared { tensor.force_contiguous().map_err(invalid)? } else { tensor };
        Ok(Array { tensor, differentiable })
    }
}
