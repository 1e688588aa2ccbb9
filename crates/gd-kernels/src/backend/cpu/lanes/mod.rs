//! Registers of 16 lanes: one interface for the instruction sets of which products of rows use the same operations.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use crate::backend::cpu::element::{Bf16, Element, F16, add_up};
use crate::backend::cpu::isa::Isa;

/// Lanes of a register.
pub(crate) const LANES: usize = 16;
/// Bytes of a register.
pub(crate) const REGISTER_BYTES: usize = 4 * LANES;

/// The fastest instruction set of this machine.
pub(crate) fn fastest_isa() -> Isa {
    static ISA: LazyLock<Isa> = LazyLock::new(|| Isa::available().first().copied().unwrap_or(Isa::Portable));
    *ISA
}

/// Code over registers of any instruction set.
pub(crate) trait WithLanes {
    /// What it returns.
    type Output;

    /// Runs the code. Implementations are `#[inline(always)]`, so that they are compiled for the instructions of `V`.
    fn with_lanes<V: Lanes>(self) -> Self::Output;
}

/// Runs `code` with the registers of an instruction set that the machine has.
pub(crate) fn with_lanes<W: WithLanes>(isa: Isa, code: W) -> W::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Amx => x86::avx512(code),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if std::arch::is_x86_feature_detected!("f16c") => x86::avx2(code),
        _ => code.with_lanes::<Portable>(),
    }
}

/// As [`with_lanes`], for code that multiplies integers, which takes the instructions of VNNI where the machine has them.
pub(crate) fn with_integer_lanes<W: WithLanes>(isa: Isa, code: W) -> W::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Amx => x86::avx512_vnni(code),
        _ => with_lanes(isa, code),
    }
}

/// 16 lanes of 32 bits, each of which is an integer or two integers of 16 bits, and 16 lanes in f32. All implementations
/// give the same bits.
pub(crate) trait Lanes: Copy {
    /// 16 lanes in f32.
    type Float: Copy;
    /// Whether the processor has 32 registers of 16 lanes, so that a loop can hold 16 sums of 16 lanes in them.
    const HAS_MANY_REGISTERS: bool = false;

    /// The same integer in all lanes.
    fn splat(x: i32) -> Self;
    /// The lanes of [`REGISTER_BYTES`] bytes.
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self;
    /// The bits of both.
    fn and(self, mask: Self) -> Self;
    /// The bits of either.
    fn or(self, other: Self) -> Self;
    /// The lanes shifted to lower bits.
    fn shift_right<const N: u32>(self) -> Self;
    /// The lanes shifted to higher bits.
    fn shift_left<const N: u32>(self) -> Self;
    /// Adds the products of the two integers of 16 bits of every lane of `w` with those of `pair`.
    fn add_products(self, w: Self, pair: u32) -> Self;
    /// The integers in f32.
    fn to_float(self) -> Self::Float;

    /// The same number in all lanes.
    fn splat_float(x: f32) -> Self::Float;
    /// 16 numbers.
    fn load_float(x: &[f32; LANES]) -> Self::Float;
    /// 16 numbers in f16.
    fn load_half(bytes: &[u8; 2 * LANES]) -> Self::Float;
    /// 16 numbers in bf16.
    fn load_bfloat(bytes: &[u8; 2 * LANES]) -> Self::Float;
    /// 16 integers from 0 to 255.
    fn load_unsigned(bytes: &[u8; LANES]) -> Self::Float;
    /// 16 integers from -128 to 127.
    fn load_signed(bytes: &[u8; LANES]) -> Self::Float;
    /// The sums.
    fn plus(a: Self::Float, b: Self::Float) -> Self::Float;
    /// The products.
    fn times(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a b + c`, rounded once.
    fn fused(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// The sum of the lanes in the order of [`add_up`].
    fn total(x: Self::Float) -> f32;
    /// The lanes.
    fn array(x: Self::Float) -> [f32; LANES];
}

/// Lanes in an array, for processors whose instructions are not used here.
#[derive(Clone, Copy)]
pub(crate) struct Portable([u32; LANES]);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(u32) -> u32) -> Self {
        Self(self.0.map(f))
    }
}

impl Lanes for Portable {
    type Float = [f32; LANES];

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self([x.cast_unsigned(); LANES])
    }

    #[inline(always)]
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self {
        Self(std::array::from_fn(|i| {
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        }))
    }

    #[inline(always)]
    fn and(self, mask: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & mask.0[i]))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        self.map(|x| x >> N)
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        self.map(|x| x << N)
    }

    #[inline(always)]
    fn add_products(self, w: Self, pair: u32) -> Self {
        let [low, high] = [pair as i16, (pair >> 16) as i16].map(i32::from);
        Self(std::array::from_fn(|i| {
            let [w_low, w_high] = [w.0[i] as i16, (w.0[i] >> 16) as i16].map(i32::from);
            self.0[i].wrapping_add((w_low * low + w_high * high).cast_unsigned())
        }))
    }

    #[inline(always)]
    fn to_float(self) -> [f32; LANES] {
        self.0.map(|x| x.cast_signed() as f32)
    }

    #[inline(always)]
    fn splat_float(x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn load_float(x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }

    #[inline(always)]
    fn load_half(bytes: &[u8; 2 * LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| F16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).up())
    }

    #[inline(always)]
    fn load_bfloat(bytes: &[u8; 2 * LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| Bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).up())
    }

    #[inline(always)]
    fn load_unsigned(bytes: &[u8; LANES]) -> [f32; LANES] {
        bytes.map(f32::from)
    }

    #[inline(always)]
    fn load_signed(bytes: &[u8; LANES]) -> [f32; LANES] {
        bytes.map(|x| f32::from(x.cast_signed()))
    }

    #[inline(always)]
    fn plus(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn times(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fused(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn total(x: [f32; LANES]) -> f32 {
        add_up(x)
    }

    #[inline(always)]
    fn array(x: [f32; LANES]) -> [f32; LANES] {
        x
    }
}
