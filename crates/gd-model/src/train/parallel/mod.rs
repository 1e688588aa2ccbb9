//! Data-parallel training: several processes (ranks) share the batch of every step.
//!
//! Every rank holds the whole model and computes the gradients of its own rows of each micro-batch. The gradients are
//! summed over all ranks, and each rank makes the same update. So the parameters of all ranks have the same bits, and
//! differ from those of one process with the same batch only by the order of additions.
//!
//! [`Group`] is the interface of the trainer. Without the feature `mpi`, or without `mpirun`, it has one process.
//! A method documented as collective must be called by all ranks in the same order.

mod single;

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use std::io::Write;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor, Var};

use crate::error::{Error, Result};
use crate::train::gradients::Gradients;

/// The maximal number of gradient elements that are summed together. A larger parameter is summed alone.
const BUCKET_ELEMENTS: usize = 1 << 22;

/// Environment variables in which launchers of MPI give the number of processes.
const WORLD_SIZE: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// The communication between the ranks.
trait Communicator {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// The number of processes.
    fn world(&self) -> usize;

    /// Replaces every element of a contiguous f32 vector by its sum over the ranks. All ranks get the same bits, in every
    /// run.
    fn sum(&self, flat: &Tensor) -> candle_core::Result<()>;

    /// The bytes of all ranks in the order of the ranks. Every rank gives the same number of bytes.
    fn gather(&self, own: &[u8]) -> Vec<u8>;

    /// Ends the processes of all ranks.
    fn abort(&self, code: u8) -> !;
}

/// The processes of one training. Clones share the group, which ends with the last of them.
#[derive(Clone)]
pub struct Group(Rc<dyn Communicator>);

impl Group {
    /// A group of this process alone.
    pub fn single() -> Self {
        Self(Rc::new(single::Single))
    }

    /// The processes that `mpirun` has started, or this process alone without `mpirun`. Collective.
    ///
    /// # Errors
    /// Several processes of a program without the feature `mpi`, or an error of MPI or NCCL.
    pub fn start(device: &Device) -> Result<Self> {
        let Some(world) = WORLD_SIZE.iter().find_map(|name| std::env::var(name).ok()) else {
            return Ok(Self::single());
        };
        Self::join(&world, device)
    }

    #[cfg(not(feature = "mpi"))]
    fn join(world: &str, _: &Device) -> Result<Self> {
        if world == "1" {
            return Ok(Self::single());
        }
        Err(Error::Invalid(format!(
            "this is one of {world} processes, but the program was built without the feature mpi"
        )))
    }

    #[cfg(feature = "mpi")]
    fn join(_: &str, device: &Device) -> Result<Self> {
        let mpi = mpi::Mpi::start()?;
        #[cfg(feature = "nccl")]
        if let Device::Cuda(device) = device {
            return Ok(Self(Rc::new(nccl::Nccl::start(mpi, device)?)));
        }
        if !device.is_cpu() {
            return Err(Error::Invalid(format!(
                "{:?}: several processes train on CPUs, or on CUDA devices with the feature nccl",
                device.location()
            )));
        }
        Ok(Self(Rc::new(mpi)))
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank()
    }

    /// The number of processes.
    pub fn world(&self) -> usize {
        self.0.world()
    }

    /// Whether this process is rank 0, which prints, logs, evaluates and saves.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// Checks that a micro-batch of `batch` rows has at least one row per rank.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn check(&self, batch: usize) -> Result<()> {
        if batch >= self.world() {
            return Ok(());
        }
        let allowed = format!("at least the number of processes, {}", self.world());
        Err(Error::out_of_range("train.batch", batch, allowed))
    }

    /// Replaces the loss, the weight and the gradients by their sums over the ranks. Collective. All ranks get the same
    /// bits, so that they make the same decisions from the sums, such as to skip a step.
    ///
    /// # Errors
    /// A gradient of another shape than its parameter.
    pub fn all_reduce(&self, vars: &[(String, Var)], sums: &mut Gradients) -> Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        [sums.loss, sums.weight] = self.sum([sums.loss, sums.weight]);
        // The parameters that have a gradient on at least one rank.
        let own: Vec<u8> = vars.iter().map(|(_, var)| u8::from(sums.store.get(var).is_some())).collect();
        let all = self.0.gather(&own);
        let given = |i: usize| all.chunks(own.len().max(1)).any(|rank| rank[i] == 1);
        let vars: Vec<&Var> = (0..vars.len()).filter(|&i| given(i)).map(|i| &vars[i].1).collect();
        let mut rest = vars.as_slice();
        while !rest.is_empty() {
            let mut size = 0;
            let fits = rest.iter().take_while(|var| {
                size += var.elem_count();
                size <= BUCKET_ELEMENTS
            });
            let (bucket, others) = rest.split_at(fits.count().max(1));
            self.reduce(bucket, sums)?;
            rest = others;
        }
        Ok(())
    }

    /// Sums the gradients of these parameters over the ranks in one vector.
    fn reduce(&self, vars: &[&Var], sums: &mut Gradients) -> Result<()> {
        let size = vars.iter().map(|var| var.elem_count()).sum::<usize>();
        // Gradients may share storage, so they are not summed in place.
        let flat = Tensor::zeros(size, DType::F32, vars[0].device())?;
        let mut at = 0;
        for var in vars {
            if let Some(grad) = sums.store.get(var) {
                flat.slice_set(&grad.detach().flatten_all()?.to_dtype(DType::F32)?.contiguous()?, 0, at)?;
            }
            at += var.elem_count();
        }
        self.0.sum(&flat)?;
        at = 0;
        for var in vars {
            let sum = flat.narrow(0, at, var.elem_count())?.reshape(var.shape())?.to_dtype(var.dtype())?;
            sums.store.insert(var, sum);
            at += var.elem_count();
        }
        Ok(())
    }

    /// The sums over the ranks in the order of the ranks.
    fn sum<const N: usize>(&self, own: [f64; N]) -> [f64; N] {
        let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut sums = [0.0; N];
        for (i, bytes) in self.0.gather(&bytes).as_chunks().0.iter().enumerate() {
            sums[i % N] += f64::from_le_bytes(*bytes);
        }
        sums
    }

    /// For each flag, whether any rank has set it. Collective.
    pub fn any<const N: usize>(&self, own: [bool; N]) -> [bool; N] {
        self.sum(own.map(|set| f64::from(u8::from(set)))).map(|count| count > 0.0)
    }

    /// Checks that `hash`, the hash of `what`, is the same on all ranks. Collective; all ranks return the same result.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] with the ranks that differ from rank 0.
    pub fn require_equal(&self, what: &str, hash: blake3::Hash) -> Result<()> {
        let all = self.0.gather(hash.as_bytes());
        let ranks = all.chunks(blake3::OUT_LEN).enumerate();
        let ranks: Vec<usize> =
            ranks.filter(|(_, hash)| *hash != &all[..blake3::OUT_LEN]).map(|(rank, _)| rank).collect();
        if ranks.is_empty() {
            return Ok(());
        }
        Err(Error::RanksDiffer { what: what.into(), ranks })
    }

    /// Prints an error of this rank and ends all ranks with this exit code, because the others would wait for it forever.
    pub fn abort(&self, error: &str, code: u8) -> ! {
        // A closed stderr must not prevent the end of the others.
        let _ = writeln!(std::io::stderr(), "error: rank {} of {}: {error}", self.rank(), self.world());
        self.0.abort(code)
    }
}
