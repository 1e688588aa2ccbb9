//! Parameters of the GPU kernels, one struct an operator: the same bytes as
//! `kernels/shared/params.h`, where the fields are explained. A test compares every offset.

use bytemuck::{Pod, Zeroable};

/// The fields of a params struct.
pub trait Fields {
    /// Its name in `params.h`.
    const NAME: &'static str;
    /// Names and offsets of its fields.
    const FIELDS: &'static [(&'static str, usize)];
}

macro_rules! params {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
            #[allow(missing_docs)] // explained in params.h
            pub struct $name { $(pub $field: $type,)* }

            impl Fields for $name {
                const NAME: &'static str = stringify!($name);
                const FIELDS: &'static [(&'static str, usize)] =
                    &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*];
            }
        )*

        /// Name, size and fields of every struct.
        #[allow(clippy::type_complexity)]
        pub const ALL: &[(&str, usize, &[(&str, usize)])] =
            &[$(($name::NAME, size_of::<$name>(), $name::FIELDS),)*];
    };
}

params! {
    /// Which keys a query sees.
    struct MaskParams {
        causal: u32,
        window: u32,
        offset: i32,
        length: i32,
        tables: u32,
        batch: u32,
        keys: u32,
    }

    /// The bias of every key.
    struct BiasParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        keys: u32,
        head_dim: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        bias_heads: u32,
        bias_row: u32,
        prior_batch: u32,
        prior_heads: u32,
        score: u32,
    }

    /// Keys that become 8-bit integers.
    struct QuantizeParams {
        pieces: u32,
        kv_heads: u32,
        keys: u32,
        head_dim: u32,
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        first: u32,
        room: u32,
        width: u32,
        score: u32,
    }

    /// A scan.
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
        aligned: u32,
        pack: u32,
        row_blocks: u32,
        bias_heads: u32,
        bias_row: u32,
        prior_batch: u32,
        prior_heads: u32,
        score: u32,
        last: u32,
        candidates: u32,
        slots: u32,
        protected_batch: u32,
        protected_heads: u32,
        protected_queries: u32,
        protected_slots: u32,
        value_dim: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        mask: MaskParams,
    }

    /// A scan with 8-bit keys.
    struct CertifiedParams {
        scan: ScanParams,
        room: u32,
    }

    /// Decoding.
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
        k_batch: u32,
        k_head: u32,
        k_row: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        aligned: u32,
        pack: u32,
        row_tiles: u32,
        splits: u32,
        page_keys: u32,
        table_row: u32,
        pages: u32,
        bias_row: u32,
        prior_batch: u32,
        prior_heads: u32,
        score: u32,
        last: u32,
        capacity: u32,
        mask: MaskParams,
    }

    /// The steps of select.
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
        d_batch: u32,
        d_head: u32,
        d_row: u32,
        prior_batch: u32,
        prior_heads: u32,
        score: u32,
        last: u32,
        estimator: u32,
        passage: u32,
        temperature: f32,
        preserve: f32,
        value: f32,
        hardness: f32,
        gate: f32,
        floor: f32,
        margin: f32,
        strength: f32,
        trigger: f32,
        slack: f32,
    }

    /// Sorting slots by key.
    struct SortParams {
        batch: u32,
        q_heads: u32,
        kv_heads: u32,
        queries: u32,
        keys: u32,
        slots: u32,
        count: u32,
        lists: u32,
        blocks: u32,
        shift: u32,
    }

    /// A causal convolution.
    struct ConvParams {
        batch: u32,
        rows: u32,
        channels: u32,
        width: u32,
        x_batch: u32,
        x_row: u32,
        d_batch: u32,
        d_row: u32,
        chunks: u32,
        packed: u32,
    }

    /// A gated running average.
    struct AverageParams {
        batch: u32,
        heads: u32,
        value_heads: u32,
        rows: u32,
        dim: u32,
        blocks: u32,
        v_batch: u32,
        v_head: u32,
        v_row: u32,
        d_batch: u32,
        d_head: u32,
        d_row: u32,
    }

    /// Root-mean-square normalisation.
    struct NormParams {
        batch: u32,
        heads: u32,
        rows: u32,
        dim: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
        d_batch: u32,
        d_head: u32,
        d_row: u32,
        chunk: u32,
        lines: u32,
        eps: f32,
    }

    /// Rotary embedding.
    struct RotaryParams {
        batch: u32,
        heads: u32,
        rows: u32,
        pairs: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
        first: u32,
        table: u32,
        back: u32,
    }

    /// A gated activation.
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
        d_batch: u32,
        d_head: u32,
        d_row: u32,
    }

    /// Cross entropy.
    struct CrossEntropyParams {
        heads: u32,
        rows: u32,
        vocab: u32,
        x_batch: u32,
        x_head: u32,
        x_row: u32,
    }

    /// Sums of squares of a gradient.
    struct SquaresParams {
        count: u32,
        first: u32,
    }

    /// Clipping.
    struct ClipParams {
        parts: u32,
        losses: u32,
        weight: f32,
        most: f32,
        loss_limit: f32,
        norm_limit: f32,
    }

    /// An update by AdamW.
    struct AdamwParams {
        count: u32,
        beta1: f32,
        gain1: f32,
        beta2: f32,
        gain2: f32,
        keep: f32,
        eps: f32,
        rate: f32,
        root: f32,
        late_rate: f32,
        late_root: f32,
    }
}
