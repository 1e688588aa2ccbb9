//! The inverse of the candidates on a GPU: for every key the slots that hold it, from a stable radix sort of the slots
//! by their keys. Gradients of keys are then sums in the order of the rows.

use bytemuck::bytes_of;

use crate::backend::gpu::kernel::{ElementType, Variant};
use crate::backend::gpu::params::{SORT_BLOCK_ENTRIES, SORT_DIGIT_BITS, SortParams};
use crate::backend::gpu::{Constants, Gpu, KernelOp, Launch, Slice, elements, grid};
use crate::error::Result;
use crate::ops::select::Sizes;

/// Threads of a block.
const BLOCK_THREADS: usize = 256;

/// For every key of every key-value head, the flat slots that hold it, in ascending order: slots of segment
/// `(b Hk + kv) M + j` are `entries[starts[segment]..starts[segment + 1]]`.
#[derive(Debug)]
pub struct InverseIndex<B> {
    starts: B,
    segments: B,
    entries: B,
}

impl<B> InverseIndex<B> {
    /// Inverts index i32 `[B, Hq, N, K]`, -1 where unused.
    ///
    /// # Errors
    /// 2^31 slots or keys or more, and errors of the GPU.
    pub fn new<G: Gpu<Buffer = B>>(gpu: &G, sizes: &Sizes, index: Slice<'_, B>) -> Result<Self> {
        let count = elements("index", sizes.rows() as u128 * sizes.slots as u128)?;
        let segments = elements("keys", (sizes.batch * sizes.kv_heads) as u128 * sizes.keys as u128)?;
        let blocks = (count as usize).div_ceil(SORT_BLOCK_ENTRIES as usize);
        let mut params = SortParams {
            batch: sizes.batch as u32,
            q_heads: sizes.q_heads as u32,
            kv_heads: sizes.kv_heads as u32,
            queries: sizes.queries as u32,
            keys: sizes.keys as u32,
            slots: sizes.slots as u32,
            entries: count,
            segments,
            blocks: blocks as u32,
            shift: 0,
        };
        let variant = Variant { element: ElementType::F32, target: gpu.arch().target() };
        let launch = |params: &SortParams, op: KernelOp, blocks: usize, buffers: Vec<Slice<'_, B>>| {
            gpu.launch(&Launch {
                kernel: variant.kernel(op),
                grid: grid(op.symbol(), blocks as u128)?,
                block: BLOCK_THREADS as u32,
                shared_bytes: 0,
                params: bytes_of(params).to_vec(),
                constants: Constants::default(),
                buffers: buffers.into_iter().map(Some).collect(),
            })
        };
        let entries = || gpu.allocate(count as usize * 4);
        let (mut from, mut to) = ([entries()?, entries()?], [entries()?, entries()?]);
        let counts = gpu.allocate(blocks * (1 << SORT_DIGIT_BITS) * 4)?;
        let threads = (count as usize).div_ceil(BLOCK_THREADS);
        launch(&params, KernelOp::SortInit, threads, vec![index, (&from[0]).into(), (&from[1]).into()])?;
        // The segment number of unused slots is `segments`, so that its bits are sorted, too.
        while params.shift < u32::BITS - segments.leading_zeros() {
            launch(&params, KernelOp::SortHistogram, blocks, vec![(&from[0]).into(), (&counts).into()])?;
            launch(&params, KernelOp::SortOffsets, 1, vec![(&counts).into()])?;
            let moved = [&counts, &from[0], &from[1], &to[0], &to[1]].map(Slice::from);
            launch(&params, KernelOp::SortScatter, blocks, moved.to_vec())?;
            std::mem::swap(&mut from, &mut to);
            params.shift += SORT_DIGIT_BITS;
        }
        let starts = gpu.allocate((segments as usize + 1) * 4)?;
        let threads = (count as usize + 1).div_ceil(BLOCK_THREADS);
        launch(&params, KernelOp::SortSegmentStarts, threads, vec![(&from[0]).into(), (&starts).into()])?;
        let [segments, entries] = from;
        Ok(Self { starts, segments, entries })
    }

    /// The starts of the segments u32 `[B Hk M + 1]`; of the sorted slots the segments and the entries, u32 `[B Hq N
    /// K]` each.
    pub(crate) fn slices(&self) -> [Slice<'_, B>; 3] {
        [&self.starts, &self.segments, &self.entries].map(Slice::from)
    }
}
