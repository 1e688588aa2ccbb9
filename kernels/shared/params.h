// Parameters of the GPU kernels: one struct per operator, passed by value, and the constants and codes that launch code
// and kernels share.
//
// The Rust side (crates/gd-kernels, params.rs) is generated from this file: `UPDATE_PARAMS=1 cargo test -p gd-testing
// params` rewrites it, and the same test without the variable fails when the two differ. The generator reads
// enums with explicit values, integer constants and structs of u32, i32, f32 or earlier structs, one field per line,
// and refuses anything else. A comment after a field or before a declaration becomes its documentation.
//
// Sizes and strides count elements. Shapes: q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]; `X_batch`, `X_head` and
// `X_row` are the strides of tensor X, whose last dimension is contiguous.
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
#ifdef GD_METAL
#define CONSTANT constant
#else
#define CONSTANT
#endif

// How a key is scored.
enum ScoreCode : u32 {
    SCORE_ENERGY = 0, // beta |q - k|^2 - b
    SCORE_DOT = 1,    // -beta <q, k> - b
};

// Which of several keys with equal scores comes first.
enum TieCode : u32 {
    TIE_FIRST = 0, // the least index
    TIE_LAST = 1,  // the greatest index
};

// Gradient estimator of the hard choice.
enum EstimatorCode : u32 {
    ESTIMATOR_CANDIDATES = 0,
    ESTIMATOR_WINNER = 1,
    ESTIMATOR_REINMAX = 2,
};

// Which root of the coherence equation is used for a pair with two wells.
enum CoherenceCode : u32 {
    COHERENCE_GLOBAL = 0,  // the global minimum of the energy
    COHERENCE_PASSAGE = 1, // the root that bisection finds first
};

// What the table of a mask holds.
enum MaskTableCode : u32 {
    MASK_TABLE_NONE = 0,
    MASK_TABLE_LENGTHS = 1,    // offsets [B] and lengths [B]
    MASK_TABLE_BOUNDARIES = 2, // the same and the boundaries of packed sequences
};

// Bits of the feature set for which Metal specialises a kernel.
enum FeatureBit : u32 {
    FEATURE_CAUSAL = 1,
    FEATURE_WINDOW = 2,
    FEATURE_TABLE = 4,      // a table of offsets and lengths
    FEATURE_BOUNDARIES = 8, // the table has boundaries of packed sequences
    FEATURE_VECTOR_LOADS = 16,
    FEATURE_PRIOR = 32,
};

// A vector is near another if its squared norm exceeds their squared distance by this factor.
constexpr CONSTANT u32 NEAR_FACTOR = 256;
// Keys to a multiple of which rows of biases and of 8-bit keys are padded.
constexpr CONSTANT u32 KEY_PADDING = 64;
// Slots (candidates and protected keys) of a row of select.
constexpr CONSTANT u32 MAX_SLOTS = 64;
// Entries of the inverse index that one warp sums.
constexpr CONSTANT u32 READERS_PER_WARP = 128;
// Entries that one block of a radix sort pass moves.
constexpr CONSTANT u32 SORT_BLOCK_ENTRIES = 2048;
// Bits of the digit that one radix sort pass sorts by.
constexpr CONSTANT u32 SORT_DIGIT_BITS = 8;
// Rows of a causal convolution per thread.
constexpr CONSTANT u32 CONV_BLOCK_ROWS = 64;
// Steps of a running average per block.
constexpr CONSTANT u32 AVERAGE_BLOCK_STEPS = 64;
// Threads per block of the kernels that scan the scalars of a running average.
constexpr CONSTANT u32 AVERAGE_SCAN_THREADS = 256;
// Most rows per block of the backward pass of RMS normalisation.
constexpr CONSTANT u32 NORM_MAX_BLOCK_ROWS = 256;
// Elements of a gradient whose squares one block sums; each of its 256 threads takes 64.
constexpr CONSTANT u32 SQUARES_BLOCK_ELEMENTS = 16384;
// Elements that one thread of an AdamW update takes.
constexpr CONSTANT u32 ADAMW_THREAD_ELEMENTS = 4;

// Which keys a query attends to. The table, if there is one, holds i32: offset [B], length [B] and, for packed
// sequences, start [B + 1] and then the boundaries; those of batch entry b are start[b]..start[b + 1].
struct MaskParams {
    u32 causal;
    u32 window; // 0: none
    i32 offset; // without a table
    i32 length; // without a table
    u32 table;  // MaskTableCode
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
    u32 bias_heads;  // Hk without a prior, Hq with one
    u32 bias_row;    // M rounded up to a multiple of KEY_PADDING
    u32 prior_batch; // 0: no prior
    u32 prior_heads;
    u32 score; // ScoreCode
};

// Quantises keys [sequences, Hk, m, D] to 8-bit integers and writes them from row `first` of sequences of `capacity`
// keys. A sequence is a batch entry or a page.
struct QuantizeParams {
    u32 sequences;
    u32 kv_heads;
    u32 keys;
    u32 head_dim;
    u32 k_batch;
    u32 k_head;
    u32 k_row;
    u32 first;
    u32 capacity; // a multiple of KEY_PADDING
    u32 width;    // bytes of a key: D rounded up to 16
    u32 score;    // ScoreCode
};

// A scan of all keys.
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
    u32 vector_loads; // 1: rows of q and k start at multiples of 16 bytes
    u32 pack;         // query heads whose rows share a block
    u32 row_blocks;
    u32 bias_heads;
    u32 bias_row;
    u32 prior_batch; // 0: no prior
    u32 prior_heads;
    u32 score; // ScoreCode
    u32 tie;   // TieCode
    u32 candidates;
    u32 slots; // candidates and protected keys
    u32 protected_batch;
    u32 protected_heads;
    u32 protected_queries;
    u32 protected_slots; // 0: none
    u32 value_dim;       // 0: the value row of the winner is not written
    u32 v_batch;
    u32 v_head;
    u32 v_row;
    MaskParams mask;
};

// A scan that reads 8-bit keys first; they lie in sequences of `capacity` keys, see QuantizeParams.
struct CertifiedParams {
    ScanParams scan;
    u32 capacity;
};

// Decoding: a few queries against a long cache, which is contiguous or in pages of a block table.
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
    u32 k_batch; // between batch entries, or between pages
    u32 k_head;
    u32 k_row;
    u32 v_batch; // between batch entries, or between pages
    u32 v_head;
    u32 v_row;
    u32 vector_loads; // 1: rows of q and k start at multiples of 16 bytes
    u32 pack;         // query heads whose rows share a block
    u32 row_tiles;    // tiles of 16 rows
    u32 splits;       // blocks that share the keys of a row
    u32 page_keys;    // keys per page; 0: contiguous
    u32 table_row;    // pages of a batch entry in the block table
    u32 pages;        // pages in total
    u32 bias_row;     // capacity in keys of the cached biases or 8-bit keys, per batch entry or page
    u32 prior_batch;  // 0: no prior
    u32 prior_heads;
    u32 score;              // ScoreCode
    u32 tie;                // TieCode
    u32 candidate_capacity; // of 8-bit decoding: candidates that the workspace of a row tile holds
    MaskParams mask;
};

// The steps of select, one warp per query row: index, energy [B, Hq, N, K], contiguous.
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
    u32 d_batch; // of the incoming gradient: dy, or that of a residual query
    u32 d_head;
    u32 d_row;
    u32 prior_batch; // 0: no prior
    u32 prior_heads;
    u32 score;     // ScoreCode
    u32 tie;       // TieCode
    u32 estimator; // EstimatorCode
    u32 coherence; // CoherenceCode
    f32 temperature;
    f32 preserve_floor;
    f32 value_floor;
    f32 hardness;         // 0 for a blend
    f32 gate_temperature; // of the energy gate; 0: no gate
    f32 admission;        // by how much the energy of a winner may exceed the threshold; +inf to admit all
    f32 gate_floor;       // least factor of the gradient of the scores
    f32 temperature_spread; // factor of the spread of a row's candidates in the temperature of the estimator
    u32 picks;            // rows that a query reads: the first ones
    u32 null_candidate;   // whether the softmax of the estimator has the null slot
    f32 barrier_floor;
    f32 barrier_margin;
    f32 barrier_strength;
    f32 barrier_entropy; // normalised entropy from which a near tie is contested
    f32 barrier_slack;
};

// Sorts slots by the key that they hold: the inverse of index, in a fixed order.
struct SortParams {
    u32 batch;
    u32 q_heads;
    u32 kv_heads;
    u32 queries;
    u32 keys;
    u32 slots;
    u32 entries;  // B Hq N K
    u32 segments; // one per key of each KV head: B Hk M
    u32 blocks;   // blocks of SORT_BLOCK_ENTRIES entries
    u32 shift;    // of the digit that a pass sorts by
};

// Depthwise causal convolution: x and y [B, N, C], weight [C, W], past [B, W - 1, C].
struct CausalConvParams {
    u32 batch;
    u32 rows;
    u32 channels;
    u32 width;
    u32 x_batch;
    u32 x_row;
    u32 d_batch; // of dy
    u32 d_row;
    u32 chunks; // of CONV_BLOCK_ROWS rows
    u32 packed; // 1: the table holds start [B + 1] and then the boundaries, as in a mask
};

// Gated running average: decay, write [B, H, N], v [B, Hk, N, D], m [B, H, N, D].
struct RunningAverageParams {
    u32 batch;
    u32 heads;
    u32 value_heads;
    u32 rows;
    u32 dim;
    u32 blocks; // of AVERAGE_BLOCK_STEPS rows
    u32 v_batch;
    u32 v_head;
    u32 v_row;
    u32 d_batch; // of dm
    u32 d_head;
    u32 d_row;
};

// Root-mean-square normalisation: x and y [B, H, N, C], weight [C].
struct RmsNormParams {
    u32 batch;
    u32 heads;
    u32 rows;
    u32 dim;
    u32 x_batch;
    u32 x_head;
    u32 x_row;
    u32 d_batch; // of dy
    u32 d_head;
    u32 d_row;
    u32 block_rows; // rows per block of the backward pass
    u32 partials;   // rows of partial sums of dweight
    f32 eps;
};

// Rotary position embedding: x and y [B, H, N, 2 pairs], cos and sin [positions, pairs].
struct RotaryParams {
    u32 batch;
    u32 heads;
    u32 rows;
    u32 pairs;
    u32 x_batch;
    u32 x_head;
    u32 x_row;
    u32 offset;  // position of row 0, without a table
    u32 table;   // 1: offsets u32 [B] instead
    u32 inverse; // 1: rotates by the negative angle
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
    u32 d_batch; // of dy
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

// Sum of squares of one gradient: one partial sum per SQUARES_BLOCK_ELEMENTS elements.
struct SquaresParams {
    u32 count; // elements
    u32 first; // index of the gradient's first partial sum
};

// Clipping by the global norm.
struct ClipParams {
    u32 partials;
    u32 losses;
    f32 weight;     // loss and gradient are divided by it
    f32 max_norm;   // the norm to which a longer gradient is scaled
    f32 loss_limit; // above this loss the update is skipped
    f32 norm_limit; // above this norm the update is skipped
};

// One AdamW update of a parameter.
struct AdamwParams {
    u32 count;
    f32 beta1;
    f32 one_minus_beta1;
    f32 beta2;
    f32 one_minus_beta2;
    f32 weight_scale; // 1 - learning rate * weight decay
    f32 eps;
    f32 step_size;          // learning rate / (1 - beta1^t)
    f32 root_scale;         // 1 / sqrt(1 - beta2^t)
    f32 previous_step_size; // the same for t - 1
    f32 previous_root_scale;
};
