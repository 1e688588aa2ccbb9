//! Ranks that MPI has started; sums on the CPU.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use super::Engine;
use crate::error::Error;

/// Elements that are summed at a time: counts of MPI are 32 bits wide, and buffers stay small.
const PIECE: usize = 1 << 20;

pub(super) struct Mpi {
    world: SimpleCommunicator,
    /// Dropped last: it ends MPI.
    _universe: Universe,
}

impl Mpi {
    /// Joins the other ranks.
    pub(super) fn start() -> crate::Result<Self> {
        let failed = |why| Error::Invalid(format!("MPI does not start: {why}"));
        // Computing is threaded, but only this thread talks to MPI.
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| failed("it was started before".to_owned()))?;
        if threading < Threading::Funneled {
            return Err(failed(format!("it offers {threading:?} threading, and Funneled is needed")));
        }
        Ok(Self { world: universe.world(), _universe: universe })
    }
}

impl Engine for Mpi {
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
        for piece in values[from..to].chunks_mut(PIECE) {
            self.sum_piece(piece);
        }
        Ok(())
    }
}

impl Mpi {
    /// Each rank sums one part, in the order of the ranks and in f64, and all collect the parts. MPI's own
    /// reduction may add in an order that depends on the machines and the size.
    fn sum_piece(&self, piece: &mut [f32]) {
        let part = piece.len().div_ceil(self.world());
        let mut all = vec![0f32; part * self.world()];
        let mut mine = all.clone();
        all[..piece.len()].copy_from_slice(piece);
        self.world.all_to_all_into(&all[..], &mut mine[..]);
        let mut sums = vec![0f64; part];
        for rank in mine.chunks(part) {
            sums.iter_mut().zip(rank).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        self.world.all_gather_into(&sums[..], &mut all[..]);
        piece.copy_from_slice(&all[..piece.len()]);
    }
}

impl Drop for Mpi {
    /// A rank that panics takes the others along; they would wait for it forever.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("error: rank {} of {} panicked", self.rank(), self.world());
            self.abort(1);
        }
    }
}
