// Query rows whose scores are ill-conditioned, and the candidates of such a row from differences.
//
// The score <q, k> - |k|^2 / 2 is a small difference of large numbers if queries and keys have a large common offset,
// and its rounding error grows with the square of the offset; <q, k> likewise loses the differences between keys with
// a common offset. The rule looks at one row and its visible keys, as on the CPU, so that its result is the same in
// every kernel. Such a row is scored again relative to its best key c so far, by -(e_k - e_c) / beta, which is
// sum (k - c) ((q - c) + (q - k)), or sum q (k - c) for the dot product, and each key by one lane.
#pragma once
#include "mask.h"
#include "row.h"

// Squared norms below this, 2^120, keep all terms of a score finite.
constexpr CONSTANT float MAX_SQUARE = MAX_ENERGY / 256.0f;

// The keys of a head, one row every `stride` elements.
template <class T> struct StridedKeys {
    const DEVICE T *first;
    u32 stride;

    INLINE const DEVICE T *row(u32 j) const { return first + size_t(j) * stride; }
};

// A query row, and the keys that it sees.
template <class T, class Keys> struct RankedRow {
    const DEVICE T *query;
    Keys keys;
    Range range;
    const DEVICE float *prior; // of all keys, or null
    float beta;
    u32 score, tie, dim;

    INLINE float prior_of(i32 j) const { return prior ? prior[j] : 0.0f; }
};

// Whether more than `count` visible keys are not excluded by their prior.
template <class T, class Keys>
INLINE bool admits_more(Thread me, const LOCAL RankedRow<T, Keys> &row, u32 count) {
    if (!row.prior) return u32(row.range.hi - row.range.lo) > count;
    u32 admitted = 0;
    for (i32 j = row.range.lo; j < row.range.hi && admitted <= count; j += 32) {
        i32 own = j + i32(me.lane());
        admitted += bits_set(vote(own < row.range.hi && row.prior_of(own) > -GD_INFINITY));
    }
    return admitted > count;
}

// Whether a vector of this squared norm is near another at this squared distance.
INLINE bool is_near(float square, float distance) { return square > float(NEAR_FACTOR) * distance; }

// Whether two different vectors are near each other; equal keys have equal scores, to the bit. Called by a whole warp.
template <class T> INLINE bool are_near(Thread me, const DEVICE T *x, const DEVICE T *y, u32 dim) {
    float distance = pair_form(me, SCORE_ENERGY, x, y, dim);
    return distance > 0 && is_near(squared_norm(me, x, dim), distance);
}

// Whether keys lo.. lo + size have a common offset that is large beside their differences. The rows of a warp, which
// see keys of one head, share what was last looked at.
struct CommonOffset {
    i32 lo;
    u32 size;
    bool found;
};
INLINE CommonOffset unknown_offset() { return {-1, 0, false}; }

// Whether the visible keys of a row have a common offset: whether two of three are near each other, which an outlier
// does not change. The keys are those of a range of a power of two, so that most rows share them. Called by a whole
// warp.
template <class T, class Keys>
INLINE bool keys_have_offset(Thread me, const LOCAL RankedRow<T, Keys> &row, LOCAL CommonOffset &last) {
    u32 visible = u32(row.range.hi - row.range.lo), size = 1;
    while (size <= visible / 2)
        size *= 2;
    if (last.lo == row.range.lo && last.size == size) return last.found;
    last = {row.range.lo, size, false};
    u32 from = u32(row.range.lo), quarter = size / 4, middle = size / 2;
    const DEVICE T *a = row.keys.row(from + quarter), *b = row.keys.row(from + middle);
    const DEVICE T *c = row.keys.row(from + 3 * quarter);
    last.found = are_near(me, a, b, row.dim) || are_near(me, b, c, row.dim) || are_near(me, a, c, row.dim);
    return last.found;
}

// Whether rounding or overflow of the scores may decide which keys are the candidates of a row. Of `wanted` candidates
// the scores found `found`, and `best` is the best of them. Called by a whole warp.
template <class T, class Keys>
INLINE bool ill_conditioned(Thread me, const LOCAL RankedRow<T, Keys> &row, i32 best, u32 found, u32 wanted,
                            LOCAL CommonOffset &last) {
    // Without its fence the Hopper scan computes NaN for every score, which this rule would repair.
    if (GD_FAULT(61) || GD_FAULT(89)) return false;
    if (found >= u32(row.range.hi - row.range.lo)) return false;
    // A key without a finite score was not found.
    if (found < wanted && admits_more(me, row, found)) return true;
    if (best < 0) return false;
    float square = squared_norm(me, row.query, row.dim);
    float distance = pair_form(me, SCORE_ENERGY, row.query, row.keys.row(u32(best)), row.dim);
    if (!(square < MAX_SQUARE && distance < MAX_SQUARE)) return true;
    return (row.score == SCORE_ENERGY && is_near(square, distance)) || keys_have_offset(me, row, last);
}

// The score of key j relative to that of key `center` (-1: relative to 0), for q and k scaled by `scale`; -inf for a
// key that is no candidate. Called by one thread.
template <class T, class Keys>
INLINE float relative_score(const LOCAL RankedRow<T, Keys> &row, i32 center, float scale, i32 j) {
    float prior = row.prior_of(j);
    if (!(prior > -GD_INFINITY)) return -GD_INFINITY;
    const DEVICE T *k = row.keys.row(u32(j)), *c = row.keys.row(u32(max(center, 0)));
    wide sum = 0;
    for (u32 d = 0; d < row.dim; d++) {
        wide x = wide(to_float(row.query[d]) * scale), y = wide(to_float(k[d]) * scale);
        wide z = center < 0 ? wide(0) : wide(to_float(c[d]) * scale);
        sum += row.score == SCORE_DOT ? x * (y - z) : (y - z) * ((x - z) + (x - y));
    }
    if (!(sum - sum == 0)) return -GD_INFINITY;
    float offset = prior - (center < 0 ? 0.0f : row.prior_of(center));
    sum += wide(offset) / wide(row.beta) * wide(scale) * wide(scale);
    return fmin(fmax(float(sum), -MAX_ENERGY), MAX_ENERGY);
}

// The scale for `relative_score`.
template <class T, class Keys>
INLINE float safe_scale(Thread me, const LOCAL RankedRow<T, Keys> &row, i32 center) {
    bool safe = squared_norm(me, row.query, row.dim) < MAX_SQUARE;
    if (center >= 0) safe = safe && squared_norm(me, row.keys.row(u32(center)), row.dim) < MAX_SQUARE;
    return safe ? 1.0f : SCALE_DOWN;
}

// The best key of an ill-conditioned row; -1 without a candidate. Called by a whole warp.
template <class T, class Keys>
COLD i32 winner_by_differences(Thread me, const LOCAL RankedRow<T, Keys> &row, i32 center) {
    float scale = safe_scale(me, row, center), score = -GD_INFINITY;
    i32 key = -1;
    for (i32 j = row.range.lo + i32(me.lane()); j < row.range.hi; j += 32) {
        float s = relative_score(row, center, scale, j);
        if (s > score || (s == score && key >= 0 && wins_tie(j, key, row.tie))) score = s, key = j;
    }
    for (u32 step = 16; step > 0; step /= 2) {
        float s = shuffle_xor(score, step);
        i32 j = shuffle_xor(key, step);
        if (j >= 0 && (key < 0 || s > score || (s == score && wins_tie(j, key, row.tie)))) score = s, key = j;
    }
    return key;
}
