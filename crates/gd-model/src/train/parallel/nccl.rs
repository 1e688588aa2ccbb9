//! Ranks with one CUDA GPU each. NCCL sums the gradients on the GPUs; MPI carries all other data. Not yet measured on
//! hardware.

use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, InplaceOp1, Layout, Result, Tensor};

use super::Communicator;
use super::mpi::Mpi;
use crate::error::Error;

pub(super) struct Nccl {
    comm: Comm,
    /// Dropped last, because MPI must not end before NCCL.
    mpi: Mpi,
}

impl Nccl {
    /// Joins the other ranks. `device` is the GPU of this rank, whose stream runs the sums.
    pub(super) fn start(mpi: Mpi, device: &CudaDevice) -> crate::Result<Self> {
        let failed = |e| Error::Invalid(format!("NCCL does not start: {e:?}"));
        // The identifier of rank 0 names the group. Those of the other ranks are not used.
        let own = Id::new().map_err(failed)?.internal().map(|c| c as u8);
        let mut id = [0; 128];
        id.copy_from_slice(&mpi.gather(&own)[..128]);
        let id = Id::uninit(id.map(|byte| byte as core::ffi::c_char));
        let comm = Comm::from_rank(device.cuda_stream(), mpi.rank(), mpi.world(), id).map_err(failed)?;
        Ok(Self { comm, mpi })
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.mpi.rank()
    }

    fn world(&self) -> usize {
        self.mpi.world()
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        flat.inplace_op1(self)
    }

    fn gather(&self, own: &[u8]) -> Vec<u8> {
        self.mpi.gather(own)
    }

    fn abort(&self, code: u8) -> ! {
        self.mpi.abort(code)
    }
}

impl InplaceOp1 for Nccl {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("NCCL does not sum tensors on the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("all-reduce needs a contiguous f32 tensor");
        };
        let mut values = storage.as_cuda_slice_mut::<f32>()?.slice_mut(from..to);
        // On the stream of candle, so that the sum follows the computation of the gradients and precedes their use.
        match self.comm.all_reduce_in_place(&mut values, &ReduceOp::Sum) {
            Ok(_) => Ok(()),
            Err(e) => candle_core::bail!("NCCL all-reduce: {e:?}"),
        }
    }
}
