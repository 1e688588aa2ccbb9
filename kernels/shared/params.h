// Parameters of the GPU kernels, one struct an operator, passed by value: the same bytes as
// crates/gd-kernels/src/backend/gpu/params.rs (a test compares every offset). All fields have 4 bytes.
// Sizes and strides count elements; q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv].
#pragma once
#ifdef __METAL_VERSION__
typedef unsigned int u32;
typedef int i32;
typedef float f32;
#else
#include <stdint.h>
typedef uint32_t u32;
typedef int32_t i32;
typedef float f32;
#endif

// Which keys a query sees. The table, if there is one, holds i32: offset [B], length [B], and if the
// mask is packed first [B + 1] and then the boundaries, of which entry b has first[b]..first[b + 1].
struct MaskParams {
    u32 causal;
    u32 window;   // 0: none
    i32 offset;   // without a table
    i32 length;   // without a table
    u32 tables;   // 0: none, 1: offsets and lengths, 2: boundaries too
    u32 batch;
    u32 keys;
};

// The bias of every key: bias [B, bias_heads, bias_row], -inf beyond the last key.
struct BiasParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 keys;
    u32 head_dim;
    u32 k_batch;
    u32 k_head;
    u32 k_row;
    u32 bias_heads;   // Hk without a prior, Hq with one
    u32 bias_row;     // M rounded up to whole tiles
    u32 prior_batch;  // 0: no prior
    u32 prior_heads;
    u32 score;        // 0: energy, 1: dot product
};

// Keys [pieces, Hk, m, D] as 8-bit integers, entered from row `first` on into pieces of `room` keys.
struct QuantizeParams {
    u32 pieces;
    u32 kv_heads;
    u32 keys;
    u32 head_dim;
    u32 k_batch;
    u32 k_head;
    u32 k_row;
    u32 first;
    u32 room;         // a multiple of 64
    u32 width;        // bytes of a key: D rounded up to 16
    u32 score;
};

struct ScanParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 queries;
    u32 keys;
    u32 head_dim;
    u32 q_batch;
    u32 q_head;
    u32 q_row;
    u32 k_batch;
    u32 k_head;
    u32 k_row;
    u32 aligned;      // rows of q and k lie at multiples of 16 bytes
    u32 pack;         // query heads whose rows share a block
    u32 row_blocks;
    u32 bias_heads;
    u32 bias_row;
    u32 prior_batch;  // 0: no prior
    u32 prior_heads;
    u32 score;
    u32 last;         // ties go to the greatest index
    u32 candidates;
    u32 slots;        // candidates and protected keys
    u32 protected_batch;
    u32 protected_heads;
    u32 protected_queries;
    u32 protected_slots;  // 0: none
    u32 value_dim;    // 0: no value row of the winner is written
    u32 v_batch;
    u32 v_head;
    u32 v_row;
    MaskParams mask;
};

// A scan whose keys are 8-bit integers too, in pieces of `room` keys, as QuantizeParams has them.
struct CertifiedParams {
    ScanParams scan;
    u32 room;
};

// Decoding: a few queries against a long cache, which lies in one piece or in pages of a block table.
struct DecodeParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 queries;
    u32 keys;
    u32 head_dim;
    u32 value_dim;
    u32 q_batch;
    u32 q_head;
    u32 q_row;
    u32 k_batch;      // or from page to page
    u32 k_head;
    u32 k_row;
    u32 v_batch;      // or from page to page
    u32 v_head;
    u32 v_row;
    u32 aligned;      // rows of q and k lie at multiples of 16 bytes
    u32 pack;         // query heads whose rows share a block
    u32 row_tiles;    // blocks of 16 rows
    u32 splits;       // blocks that share the keys of a row
    u32 page_keys;    // keys of a page; 0: no pages
    u32 table_row;    // pages of a batch entry in the block table
    u32 pages;        // pages in all
    u32 bias_row;     // keys of a piece for which there is room in the cache of biases, or of 8-bit keys
    u32 prior_batch;  // 0: no prior
    u32 prior_heads;
    u32 score;
    u32 last;
    u32 capacity;     // of 8-bit decoding: candidates that a place keeps
    MaskParams mask;
};

// The steps of select, one query row a warp: index, energy [B, Hq, N, K], contiguous.
struct SelectParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 queries;
    u32 keys;
    u32 head_dim;
    u32 value_dim;
    u32 slots;
    u32 q_batch;
    u32 q_head;
    u32 q_row;
    u32 k_batch;
    u32 k_head;
    u32 k_row;
    u32 v_batch;
    u32 v_head;
    u32 v_row;
    u32 d_batch;      // of the gradient that comes in: dy, or that of a residual query
    u32 d_head;
    u32 d_row;
    u32 prior_batch;  // 0: no prior
    u32 prior_heads;
    u32 score;
    u32 last;
    u32 estimator;    // 0 candidates, 1 winner, 3 reinmax
    u32 passage;      // the coherence point that bisection meets first
    f32 temperature;
    f32 preserve;
    f32 value;
    f32 hardness;     // 0 for a blend
    f32 gate;         // temperature of the energy gate; 0: none
    f32 floor;        // of the barrier, as the next four
    f32 margin;
    f32 strength;
    f32 trigger;
    f32 slack;
};

// Sorting slots by the key they hold: the inverse of index, in a fixed order.
struct SortParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 queries;
    u32 keys;
    u32 slots;
    u32 count;        // entries: B Hq N K
    u32 lists;        // keys of all heads: B Hk M
    u32 blocks;       // chunks of entries
    u32 shift;        // of the digit that a pass sorts by
};

// Depthwise causal convolution: x and y [B, N, C], weight [C, W], past [B, W - 1, C].
struct ConvParams {
    u32 batch;
    u32 rows;
    u32 channels;
    u32 width;
    u32 x_batch;
    u32 x_row;
    u32 d_batch;      // of dy
    u32 d_row;
    u32 chunks;       // of 64 rows
    u32 packed;       // the table holds first [B + 1] and then the boundaries, as in a mask
};

// Gated running average: decay, write [B, H, N], v [B, Hk, N, D], m [B, H, N, D].
struct AverageParams {
    u32 batch;
    u32 heads;
    u32 value_heads;
    u32 rows;
    u32 dim;
    u32 blocks;       // of 64 rows
    u32 v_batch;
    u32 v_head;
    u32 v_row;
    u32 d_batch;      // of dm
    u32 d_head;
    u32 d_row;
};

// Root-mean-square normalisation: x and y [B, H, N, C], weight [C].
struct NormParams {
    u32 batch;
    u32 heads;
    u32 rows;
    u32 dim;
    u32 x_batch;
    u32 x_head;
    u32 x_row;
    u32 d_batch;      // of dy
    u32 d_head;
    u32 d_row;
    u32 chunk;        // rows of a block of the backward pass
    u32 lines;        // of the parts of dweight
    f32 eps;
};

// Rotary embedding: x and y [B, H, N, 2 pairs], cos and sin [positions, pairs].
struct RotaryParams {
    u32 batch;
    u32 heads;
    u32 rows;
    u32 pairs;
    u32 x_batch;
    u32 x_head;
    u32 x_row;
    u32 first;        // position of row 0, without a table
    u32 table;        // u32 [B] instead
    u32 back;         // by the negative angle
};

// silu(gate) * up, each [B, H, N, C].
struct SwigluParams {
    u32 batch;
    u32 heads;
    u32 rows;
    u32 dim;
    u32 g_batch;
    u32 g_head;
    u32 g_row;
    u32 u_batch;
    u32 u_head;
    u32 u_row;
    u32 d_batch;      // of dy
    u32 d_head;
    u32 d_row;
};

// Cross entropy of logits [B, H, N, V].
struct CrossEntropyParams {
    u32 heads;
    u32 rows;
    u32 vocab;
    u32 x_batch;
    u32 x_head;
    u32 x_row;
};

// Sums of squares of one gradient: a part for every piece of it.
struct SquaresParams {
    u32 count;        // elements
    u32 first;        // of its parts
};

// What the sums of squares say about an update.
struct ClipParams {
    u32 parts;
    u32 losses;
    f32 weight;       // that loss and gradient are divided by
    f32 most;         // the norm that is left to a gradient
    f32 loss_limit;   // above these the update is skipped
    f32 norm_limit;
};

// One update of a parameter by AdamW.
struct AdamwParams {
    u32 count;
    f32 beta1;
    f32 gain1;        // 1 - beta1
    f32 beta2;
    f32 gain2;
    f32 keep;         // 1 - learning rate * decay
    f32 eps;
    f32 rate;         // learning rate / (1 - beta1^t)
    f32 root;         // 1 / sqrt(1 - beta2^t)
    f32 late_rate;    // the same for t - 1
    f32 late_root;
};
