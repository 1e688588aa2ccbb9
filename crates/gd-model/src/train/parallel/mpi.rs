//! Ranks started by MPI, with sums on the CPU.

use std::io::Write as _;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives};

use super::Communicator;
use crate::error::Error;

/// The number of elements that are summed at a time. MPI counts elements in 32 bits, and the buffers stay small.
const CHUNK_ELEMENTS: usize = 1 << 20;

pub(super) struct Mpi {
    world: SimpleCommunicator,
    /// Dropped last, which ends MPI.
    _universe: Universe,
}

impl Mpi {
    /// Joins the other ranks.
    pub(super) fn start() -> crate::Result<Self> {
        let failed = |why| Error::Invalid(format!("MPI does not start: {why}"));
        // Several threads compute, but this thread alone calls MPI.
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| failed("it was initialized before".to_owned()))?;
        if threading < Threading::Funneled {
            return Err(failed(format!("it supports {threading:?} threading, but Funneled is needed")));
        }
        Ok(Self { world: universe.world(), _universe: universe })
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn world(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        flat.inplace_op1(self)
    }

    fn gather(&self, own: &[u8]) -> Vec<u8> {
        let mut all = vec![0; own.len() * self.world()];
        self.world.all_gather_into(own, &mut all[..]);
        all
    }

    fn abort(&self, code: u8) -> ! {
        self.world.abort(code.into())
    }
}

impl InplaceOp1 for Mpi {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("all-reduce needs a contiguous f32 tensor");
        };
        for chunk in values[from..to].chunks_mut(CHUNK_ELEMENTS) {
            self.sum_chunk(chunk);
        }
        Ok(())
    }
}

impl Mpi {
    /// Sums a chunk over the ranks. Each rank sums one part of it in f64 in the order of the ranks, and all ranks gather
    /// the parts. The reduction of MPI is not used, because its order of additions may depend on machines and sizes.
    fn sum_chunk(&self, chunk: &mut [f32]) {
        let part = chunk.len().div_ceil(self.world());
        let mut all = vec![0f32; part * self.world()];
        let mut own = all.clone();
        all[..chunk.len()].copy_from_slice(chunk);
        self.world.all_to_all_into(&all[..], &mut own[..]);
        let mut sums = vec![0f64; part];
        for rank in own.chunks(part) {
            sums.iter_mut().zip(rank).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        self.world.all_gather_into(&sums[..], &mut all[..]);
        chunk.copy_from_slice(&all[..chunk.len()]);
    }
}

impl Drop for Mpi {
    /// Ends all ranks if this one panics, because the others would wait for it forever.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "error: rank {} of {} panicked", self.rank(), self.world());
            self.abort(1);
        }
    }
}
