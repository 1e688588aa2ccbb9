//! Registers of 16 lanes with AVX2, AVX-512 and VNNI.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{LANES, Lanes, REGISTER_BYTES, WithLanes};

/// Defines a function that runs code compiled for these instructions.
macro_rules! run_with {
    ($(#[$doc:meta])* $name:ident, $lanes:ty, $features:literal) => {
        $(#[$doc])*
        pub(super) fn $name<W: WithLanes>(code: W) -> W::Output {
            #[target_feature(enable = $features)]
            fn run<W: WithLanes>(code: W) -> W::Output {
                code.with_lanes::<$lanes>()
            }
            // SAFETY: `with_lanes` calls this on machines with these instructions alone.
            unsafe { run(code) }
        }
    };
}

run_with!(
    /// With AVX-512 and VNNI.
    avx512_vnni,
    Avx512<true>,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"
);
run_with!(
    /// With AVX-512.
    avx512,
    Avx512<false>,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
);
run_with!(
    /// With AVX2, FMA and F16C.
    avx2,
    Avx2,
    "avx2,fma,f16c"
);

/// One register of AVX-512; `VNNI` says whether products are added by one instruction.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool>(__m512i);

// SAFETY of the calls below: `with_lanes` runs code with these registers on machines with their instructions alone, and the
// arrays have the sizes that are loaded and stored.
impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    type Float = __m512;
    const HAS_MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self(unsafe { _mm512_set1_epi32(x) })
    }

    #[inline(always)]
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self {
        Self(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn and(self, mask: Self) -> Self {
        Self(unsafe { _mm512_and_si512(self.0, mask.0) })
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(unsafe { _mm512_or_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_srli_epi32::<N>(self.0) })
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_slli_epi32::<N>(self.0) })
    }

    #[inline(always)]
    fn add_products(self, w: Self, pair: u32) -> Self {
        unsafe {
            let pair = _mm512_set1_epi32(pair.cast_signed());
            Self(match VNNI {
                true => _mm512_dpwssd_epi32(self.0, w.0, pair),
                false => _mm512_add_epi32(self.0, _mm512_madd_epi16(w.0, pair)),
            })
        }
    }

    #[inline(always)]
    fn to_float(self) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(self.0) }
    }

    #[inline(always)]
    fn splat_float(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_float(x: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_half(bytes: &[u8; 2 * LANES]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bfloat(bytes: &[u8; 2 * LANES]) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn load_unsigned(bytes: &[u8; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_signed(bytes: &[u8; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn plus(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn times(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fused(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn total(x: __m512) -> f32 {
        unsafe {
            let upper = _mm512_extractf32x8_ps::<1>(x);
            total_of_eight(_mm256_add_ps(_mm512_castps512_ps256(x), upper))
        }
    }

    #[inline(always)]
    fn array(x: __m512) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        unsafe { _mm512_storeu_ps(array.as_mut_ptr(), x) };
        array
    }
}

/// The sum of eight lanes: the upper half is added to the lower one until one is left.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn total_of_eight(x: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// Two registers of AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256i; 2]);

// SAFETY of the calls below: as above.
impl Lanes for Avx2 {
    type Float = [__m256; 2];

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self([unsafe { _mm256_set1_epi32(x) }; 2])
    }

    #[inline(always)]
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self {
        let at = bytes.as_ptr();
        unsafe { Self([_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())]) }
    }

    #[inline(always)]
    fn and(self, mask: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, mask.0);
        unsafe { Self([_mm256_and_si256(a, c), _mm256_and_si256(b, d)]) }
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        unsafe { Self([_mm256_or_si256(a, c), _mm256_or_si256(b, d)]) }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        let ([a, b], count) = (self.0, unsafe { _mm_cvtsi32_si128(N.cast_signed()) });
        unsafe { Self([_mm256_srl_epi32(a, count), _mm256_srl_epi32(b, count)]) }
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        let ([a, b], count) = (self.0, unsafe { _mm_cvtsi32_si128(N.cast_signed()) });
        unsafe { Self([_mm256_sll_epi32(a, count), _mm256_sll_epi32(b, count)]) }
    }

    #[inline(always)]
    fn add_products(self, w: Self, pair: u32) -> Self {
        let ([a, b], [c, d]) = (self.0, w.0);
        unsafe {
            let pair = _mm256_set1_epi32(pair.cast_signed());
            Self([
                _mm256_add_epi32(a, _mm256_madd_epi16(c, pair)),
                _mm256_add_epi32(b, _mm256_madd_epi16(d, pair)),
            ])
        }
    }

    #[inline(always)]
    fn to_float(self) -> [__m256; 2] {
        let [a, b] = self.0;
        unsafe { [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)] }
    }

    #[inline(always)]
    fn splat_float(x: f32) -> [__m256; 2] {
        [unsafe { _mm256_set1_ps(x) }; 2]
    }

    #[inline(always)]
    fn load_float(x: &[f32; LANES]) -> [__m256; 2] {
        let at = x.as_ptr();
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }

    #[inline(always)]
    fn load_half(bytes: &[u8; 2 * LANES]) -> [__m256; 2] {
        let at = bytes.as_ptr();
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(LANES).cast())),
            ]
        }
    }

    #[inline(always)]
    fn load_bfloat(bytes: &[u8; 2 * LANES]) -> [__m256; 2] {
        let at = bytes.as_ptr();
        unsafe {
            [at, at.add(LANES)].map(
                #[inline(always)]
                |at| {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                },
            )
        }
    }

    #[inline(always)]
    fn load_unsigned(bytes: &[u8; LANES]) -> [__m256; 2] {
        let at = bytes.as_ptr();
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.add(8).cast()))),
            ]
        }
    }

    #[inline(always)]
    fn load_signed(bytes: &[u8; LANES]) -> [__m256; 2] {
        let at = bytes.as_ptr();
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.add(8).cast()))),
            ]
        }
    }

    #[inline(always)]
    fn plus(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn times(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fused(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn total([a, b]: [__m256; 2]) -> f32 {
        unsafe { total_of_eight(_mm256_add_ps(a, b)) }
    }

    #[inline(always)]
    fn array(x: [__m256; 2]) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        unsafe {
            _mm256_storeu_ps(array.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(array.as_mut_ptr().add(8), x[1]);
        }
        array
    }
}
