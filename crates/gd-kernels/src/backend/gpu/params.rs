//! Parameters of the GPU kernels, and the codes and constants that kernels and launch code share.
//!
//! Generated from `kernels/shared/params.h`, where shapes and strides are explained. Do not edit: change the header and
//! run `UPDATE_PARAMS=1 cargo test -p gd-testing params`.

use bytemuck::{Pod, Zeroable};

/// Declares the structs and [`LAYOUTS`].
macro_rules! params {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$about:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
            #[allow(missing_docs)] // sizes and strides are explained in the header
            pub struct $name { $($(#[$about])* pub $field: $type,)* }
        )*

        /// Name, size and (field, offset) of every struct.
        #[allow(clippy::type_complexity)] // a table for one test
        pub const LAYOUTS: &[(&str, usize, &[(&str, usize)])] = &[$((
            stringify!($name),
            size_of::<$name>(),
            &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
        ),)*];
    };
}

/// How a key is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ScoreCode {
    /// beta |q - k|^2 - b
    Energy = 0,
    /// -beta \<q, k> - b
    Dot = 1,
}

/// Which of several keys with equal scores comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum TieCode {
    /// the least index
    First = 0,
    /// the greatest index
    Last = 1,
}

/// Gradient estimator of the hard choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum EstimatorCode {
    /// Candidates
    Candidates = 0,
    /// Winner
    Winner = 1,
    /// Reinmax
    Reinmax = 2,
}

/// Which root of the coherence equation is used for a pair with two wells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CoherenceCode {
    /// the global minimum of the energy
    Global = 0,
    /// the root that bisection finds first
    Passage = 1,
}

/// What the table of a mask holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MaskTableCode {
    /// None
    None = 0,
    /// offsets \[B\] and lengths \[B\]
    Lengths = 1,
    /// the same and the boundaries of packed sequences
    Boundaries = 2,
}

/// Bits of the feature set for which Metal specialises a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum FeatureBit {
    /// Causal
    Causal = 1,
    /// Window
    Window = 2,
    /// a table of offsets and lengths
    Table = 4,
    /// the table has boundaries of packed sequences
    Boundaries = 8,
    /// VectorLoads
    VectorLoads = 16,
    /// Prior
    Prior = 32,
}

/// A vector is near another if its squared norm exceeds their squared distance by this factor.
pub const NEAR_FACTOR: u32 = 256;

/// Keys to a multiple of which rows of biases and of 8-bit keys are padded.
pub const KEY_PADDING: u32 = 64;

/// Slots (candidates and protected keys) of a row of select.
pub const MAX_SLOTS: u32 = 64;

/// Entries of the inverse index that one warp sums.
pub const READERS_PER_WARP: u32 = 128;

/// Entries that one block of a radix sort pass moves.
pub const SORT_BLOCK_ENTRIES: u32 = 2048;

/// Bits of the digit that one radix sort pass sorts by.
pub const SORT_DIGIT_BITS: u32 = 8;

/// Rows of a causal convolution per thread.
pub const CONV_BLOCK_ROWS: u32 = 64;

/// Steps of a running average per block.
pub const AVERAGE_BLOCK_STEPS: u32 = 64;

/// Threads per block of the kernels that scan the scalars of a running average.
pub const AVERAGE_SCAN_THREADS: u32 = 256;

/// Most rows per block of the backward pass of RMS normalisation.
pub const NORM_MAX_BLOCK_ROWS: u32 = 256;

/// Elements of a gradient whose squares one block sums; each of its 256 threads takes 64.
pub const SQUARES_BLOCK_ELEMENTS: u32 = 16384;

/// Elements that one thread of an AdamW update takes.
pub const ADAMW_THREAD_ELEMENTS: u32 = 4;

params! {
    /// Which keys a query attends to. The table, if there is one, holds i32: offset \[B\], length \[B\] and, for packed
    /// sequences, start \[B + 1\] and then the boundaries; those of batch entry b are start\[b\]..start\[b + 1\].
    struct MaskParams {
        causal: u32,
        /// 0: none
        window: u32,
        /// without a table
        offset: i32,
        /// without a table
        length: i32,
        /// MaskTableCode
        table: u32,
        batch: u32,
        keys: u32,
    }

    /// The bias of every key: bias \[B, bias_heads, bias_row\], -inf beyond the last key.
    struct BiasParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        keys: u32,
        head_dim: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        /// Hk without a prior, Hq with one
        bias_heads: u32,
        /// M rounded up to a multiple of KEY_PADDING
        bias_row: u32,
        /// 0: no prior
        prior_batch: u32,
        prior_heads: u32,
        /// ScoreCode
        score: u32,
    }

    /// Quantises keys \[sequences, Hk, m, D\] to 8-bit integers and writes them from row `first` of sequences of `capacity`
    /// keys. A sequence is a batch entry or a page.
    struct QuantizeParams {
        sequences: u32,
        kv_heads: u32,
        keys: u32,
        head_dim: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        first: u32,
        /// a multiple of KEY_PADDING
        capacity: u32,
        /// bytes of a key: D rounded up to 16
        width: u32,
        /// ScoreCode
        score: u32,
    }

    /// A scan of all keys.
    struct ScanParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        queries: u32,
        keys: u32,
        head_dim: u32,
        q_batch: u32,
        q_head: u32,
        q_row: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        /// 1: rows of q and k start at multiples of 16 bytes
        vector_loads: u32,
        /// query heads whose rows share a block
        pack: u32,
        row_blocks: u32,
        bias_heads: u32,
        bias_row: u32,
        /// 0: no prior
        prior_batch: u32,
        prior_heads: u32,
        /// ScoreCode
        score: u32,
        /// TieCode
        tie: u32,
        candidates: u32,
        /// candidates and protected keys
        slots: u32,
        protected_batch: u32,
        protected_heads: u32,
        protected_queries: u32,
        /// 0: none
        protected_slots: u32,
        /// 0: the value row of the winner is not written
        value_dim: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        mask: MaskParams,
    }

    /// A scan that reads 8-bit keys first; they lie in sequences of `capacity` keys, see QuantizeParams.
    struct CertifiedParams {
        scan: ScanParams,
        capacity: u32,
    }

    /// Decoding: a few queries against a long cache, which is contiguous or in pages of a block table.
    struct DecodeParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        queries: u32,
        keys: u32,
        head_dim: u32,
        value_dim: u32,
        q_batch: u32,
        q_head: u32,
        q_row: u32,
        /// between batch entries, or between pages
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        /// between batch entries, or between pages
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        /// 1: rows of q and k start at multiples of 16 bytes
        vector_loads: u32,
        /// query heads whose rows share a block
        pack: u32,
        /// tiles of 16 rows
        row_tiles: u32,
        /// blocks that share the keys of a row
        splits: u32,
        /// keys per page; 0: contiguous
        page_keys: u32,
        /// pages of a batch entry in the block table
        table_row: u32,
        /// pages in total
        pages: u32,
        /// capacity in keys of the cached biases or 8-bit keys, per batch entry or page
        bias_row: u32,
        /// 0: no prior
        prior_batch: u32,
        prior_heads: u32,
        /// ScoreCode
        score: u32,
        /// TieCode
        tie: u32,
        /// of 8-bit decoding: candidates that the workspace of a row tile holds
        candidate_capacity: u32,
        mask: MaskParams,
    }

    /// The steps of select, one warp per query row: index, energy \[B, Hq, N, K\], contiguous.
    struct SelectParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        queries: u32,
        keys: u32,
        head_dim: u32,
        value_dim: u32,
        slots: u32,
        q_batch: u32,
        q_head: u32,
        q_row: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        /// of the incoming gradient: dy, or that of a residual query
        d_batch: u32,
        d_head: u32,
        d_row: u32,
        /// 0: no prior
        prior_batch: u32,
        prior_heads: u32,
        /// ScoreCode
        score: u32,
        /// TieCode
        tie: u32,
        /// EstimatorCode
        estimator: u32,
        /// CoherenceCode
        coherence: u32,
        temperature: f32,
        preserve_floor: f32,
        value_floor: f32,
        /// 0 for a blend
        hardness: f32,
        /// of the energy gate; 0: no gate
        gate_temperature: f32,
        /// by how much the energy of a winner may exceed the threshold; +inf to admit all
        admission: f32,
        /// least factor of the gradient of the scores
        gate_floor: f32,
        /// factor of the spread of a row's candidates in the temperature of the estimator
        temperature_spread: f32,
        /// rows that a query reads: the first ones
        picks: u32,
        /// whether the softmax of the estimator has the null slot
        null_candidate: u32,
        barrier_floor: f32,
        barrier_margin: f32,
        barrier_strength: f32,
        /// normalised entropy from which a near tie is contested
        barrier_entropy: f32,
        barrier_slack: f32,
    }

    /// Sorts slots by the key that they hold: the inverse of index, in a fixed order.
    struct SortParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        queries: u32,
        keys: u32,
        slots: u32,
        /// B Hq N K
        entries: u32,
        /// one per key of each KV head: B Hk M
        segments: u32,
        /// blocks of SORT_BLOCK_ENTRIES entries
        blocks: u32,
        /// of the digit that a pass sorts by
        shift: u32,
    }

    /// Depthwise causal convolution: x and y \[B, N, C\], weight \[C, W\], past \[B, W - 1, C\].
    struct CausalConvParams {
        batch: u32,
        rows: u32,
        channels: u32,
        width: u32,
        x_batch: u32,
        x_row: u32,
        /// of dy
        d_batch: u32,
        d_row: u32,
        /// of CONV_BLOCK_ROWS rows
        chunks: u32,
        /// 1: the table holds start \[B + 1\] and then the boundaries, as in a mask
        packed: u32,
    }

    /// Gated running average: decay, write \[B, H, N\], v \[B, Hk, N, D\], m \[B, H, N, D\].
    struct RunningAverageParams {
        batch: u32,
        heads: u32,
        value_heads: u32,
        rows: u32,
        dim: u32,
        /// of AVERAGE_BLOCK_STEPS rows
        blocks: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        /// of dm
        d_batch: u32,
        d_head: u32,
        d_row: u32,
    }

    /// Root-mean-square normalisation: x and y \[B, H, N, C\], weight \[C\].
    struct RmsNormParams {
        batch: u32,
        heads: u32,
        rows: u32,
        dim: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
        /// of dy
        d_batch: u32,
        d_head: u32,
        d_row: u32,
        /// rows per block of the backward pass
        block_rows: u32,
        /// rows of partial sums of dweight
        partials: u32,
        eps: f32,
    }

    /// Rotary position embedding: x and y \[B, H, N, 2 pairs\], cos and sin \[positions, pairs\].
    struct RotaryParams {
        batch: u32,
        heads: u32,
        rows: u32,
        pairs: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
        /// position of row 0, without a table
        offset: u32,
        /// 1: offsets u32 \[B\] instead
        table: u32,
        /// 1: rotates by the negative angle
        inverse: u32,
    }

    /// silu(gate) * up, each \[B, H, N, C\].
    struct SwigluParams {
        batch: u32,
        heads: u32,
        rows: u32,
        dim: u32,
        g_batch: u32,
        g_head: u32,
        g_row: u32,
        u_batch: u32,
        u_head: u32,
        u_row: u32,
        /// of dy
        d_batch: u32,
        d_head: u32,
        d_row: u32,
    }

    /// Cross entropy of logits \[B, H, N, V\].
    struct CrossEntropyParams {
        heads: u32,
        rows: u32,
        vocab: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
    }

    /// Sum of squares of one gradient: one partial sum per SQUARES_BLOCK_ELEMENTS elements.
    struct SquaresParams {
        /// elements
        count: u32,
        /// index of the gradient's first partial sum
        first: u32,
    }

    /// Clipping by the global norm.
    struct ClipParams {
        partials: u32,
        losses: u32,
        /// loss and gradient are divided by it
        weight: f32,
        /// the norm to which a longer gradient is scaled
        max_norm: f32,
        /// above this loss the update is skipped
        loss_limit: f32,
        /// above this norm the update is skipped
        norm_limit: f32,
    }

    /// One AdamW update of a parameter.
    struct AdamwParams {
        count: u32,
        beta1: f32,
        one_minus_beta1: f32,
        beta2: f32,
        one_minus_beta2: f32,
        /// 1 - learning rate * weight decay
        weight_scale: f32,
        eps: f32,
        /// learning rate / (1 - beta1^t)
        step_size: f32,
        /// 1 / sqrt(1 - beta2^t)
        root_scale: f32,
        /// the same for t - 1
        previous_step_size: f32,
        previous_root_scale: f32,
    }
}
