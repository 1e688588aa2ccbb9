//! The instruction sets of the CPU backend.

/// Instruction sets of the CPU backend. All give the same bits: a score is one chain of fused multiply-adds over the
/// head dimension for every register width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// No vector instructions assumed.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL).
    Avx512,
    /// The same with dot products of 8-bit integers (VNNI).
    Avx512Vnni,
    /// The same with tile products of 8-bit integers (AMX), on Linux.
    Avx512Amx,
    /// AArch64.
    Neon,
}

impl Isa {
    /// The instruction sets of this machine, the fastest first; `Portable` is always the last.
    pub fn available() -> Vec<Isa> {
        [Isa::Avx512Amx, Isa::Avx512Vnni, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable]
            .into_iter()
            .filter(|i| i.arch().is_some())
            .collect()
    }

    /// The dispatcher, if this machine has the instruction set.
    pub(crate) fn arch(self) -> Option<pulp::Arch> {
        match self {
            Isa::Portable => Some(pulp::Arch::Scalar),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => pulp::x86::V3::try_new().map(pulp::Arch::V3),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni if !std::arch::is_x86_feature_detected!("avx512vnni") => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx if !crate::backend::cpu::amx::available() => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pulp::aarch64::Neon::try_new().map(pulp::Arch::Neon),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }

    /// Lanes of a register for elements of `bytes` bytes.
    pub(crate) fn lanes(self, bytes: usize) -> usize {
        match self {
            Isa::Portable => 1,
            Isa::Neon => 16 / bytes,
            Isa::Avx2 => 32 / bytes,
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Amx => 64 / bytes,
        }
    }
}
