//! The plans of the operators, and the problems that they refuse, with the value that the error names.

use crate::target::{Buffer, TestGpu};
use candle_core::DType;
use gd_kernels::gpu::kernel::KernelTarget;
use gd_kernels::gpu::quantize::Int8Slices;
use gd_kernels::gpu::scan_certified::{Certified, scan_certified};
use gd_kernels::gpu::{
    Arch, Gpu, RowSizes, Slice, Tensor4, TensorMap, adamw, average, conv, cross_entropy, decode, norm,
    rotary, scan, select, swiglu,
};
use gd_kernels::{Error, Estimator, Mask, Precision, Problem, Score, TieBreak};

const H100: Arch = Arch { compute: 90, shared_bytes: 227 << 10, processors: 132 };
const A10: Arch = Arch { compute: 86, shared_bytes: 99 << 10, processors: 72 };

fn problem() -> Problem {
    Problem {
        batch: 2,
        q_heads: 16,
        kv_heads: 4,
        queries: 4096,
        keys: 4096,
        head_dim: 128,
        candidates: 8,
        dtype: DType::BF16,
        key_dtype: DType::BF16,
        score: Score::Energy,
        tie: TieBreak::First,
        precision: Precision::Native,
    }
}

/// Fails unless `result` is refused as unsupported with a text that holds `value`.
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, value: &str) {
    match result {
        Err(Error::Unsupported(text)) => assert!(text.contains(value), "{text} does not name {value}"),
        other => panic!("{other:?} instead of a refusal that names {value}"),
    }
}

#[test]
fn scans_are_planned_or_refused() {
    let plan = |p: &Problem, protected: usize, arch: &Arch| scan::GpuScanPlan::new(p, protected, false, arch);
    let p = problem();
    let top8 = plan(&p, 0, &H100).unwrap();
    assert_eq!(top8.kernel.to_string(), "scan_topk_bf16_d128_sm80");
    assert_eq!((top8.warps * top8.warp_rows, top8.pack), (64, 4));
    assert!(top8.to_string().contains("scan_topk_bf16_d128_sm80: 64 query rows x 64 keys"), "{top8}");
    let top1 = plan(&Problem { candidates: 1, ..p.clone() }, 0, &H100).unwrap();
    assert_eq!(
        (top1.kernel.to_string().as_str(), top1.warps * top1.warp_rows),
        ("scan_top1_bf16_d128_sm80", 256)
    );
    // A prior belongs to one query head: no packing.
    assert_eq!(scan::GpuScanPlan::new(&p, 0, true, &H100).unwrap().pack, 1);
    // A padded head_dim, and few rows: fewer warps.
    let three_queries =
        plan(&Problem { candidates: 1, head_dim: 72, queries: 3, ..p.clone() }, 0, &A10).unwrap();
    assert_eq!((three_queries.padded_dim, three_queries.warps), (96, 1));
    // f32 at 256 needs more shared memory than a small part has for four warps.
    let wide = Problem { candidates: 1, head_dim: 256, dtype: DType::F32, ..p.clone() };
    let (large, small) = (plan(&wide, 0, &H100).unwrap(), plan(&wide, 0, &A10).unwrap());
    assert!(small.warps < large.warps && small.shared_bytes <= 99 << 10, "{small}, {large}");

    for (head_dim, name) in [(12, "head_dim 12"), (264, "head_dim 264"), (0, "head_dim 0")] {
        refused(plan(&Problem { head_dim, ..p.clone() }, 0, &H100), name);
    }
    refused(plan(&Problem { dtype: DType::F64, ..p.clone() }, 0, &H100), "f64");
    let largest = plan(&Problem { candidates: 64, ..p.clone() }, 32, &H100).unwrap();
    // Lists of 128 instead of 64 entries.
    assert_eq!(largest.shared_bytes - top8.shared_bytes, 64 * 512);
    let wide = Problem { candidates: 64, head_dim: 256, dtype: DType::F32, ..p.clone() };
    refused(plan(&wide, 0, &A10), "shared memory");
    refused(plan(&Problem { candidates: 65, ..p.clone() }, 0, &H100), "65 candidates");
    refused(plan(&Problem { candidates: 0, ..p.clone() }, 0, &H100), "0 candidates");
    refused(plan(&p, 33, &H100), "33 protected");
    refused(plan(&p, 0, &Arch { compute: 75, ..H100 }), "compute capability 7.5");
    refused(plan(&wide, 0, &Arch { shared_bytes: 48 << 10, ..A10 }), "bytes of shared memory");
    let rows = Problem { queries: 1 << 24, q_heads: 16, ..p.clone() };
    refused(plan(&rows, 0, &H100), &format!("{}", 2u64 * 16 * (1 << 24) * 8));
    let blocks = Problem { queries: 1 << 30, batch: 1 << 12, candidates: 1, ..p };
    refused(plan(&blocks, 0, &H100), "a grid of");
}

#[test]
fn certified_scans_are_planned_or_refused() {
    let plan = |p: &Problem, protected: usize, arch: &Arch| scan::GpuScanPlan::new(p, protected, false, arch);
    let p = Problem { precision: Precision::Certified, ..problem() };
    let list = plan(&p, 0, &H100).unwrap();
    assert_eq!(
        (list.kernel.to_string().as_str(), list.warps * list.warp_rows),
        ("scan_certified_bf16_d128_sm80", 256)
    );
    assert!(list.to_string().contains("256 query rows x 64 keys, 4 heads packed"), "{list}");
    // One candidate and nothing protected: shorter lists.
    let top1 = Problem { candidates: 1, ..p.clone() };
    let (one, guarded) = (plan(&top1, 0, &H100).unwrap(), plan(&top1, 1, &H100).unwrap());
    assert_eq!(guarded.shared_bytes - one.shared_bytes, 256 * 24 * 8);
    // The same kernel on Hopper, a prior without packing, and few rows by two warps.
    assert_eq!(one.clone().on_hopper(&top1, &H100), one);
    assert_eq!(scan::GpuScanPlan::new(&p, 0, true, &H100).unwrap().pack, 1);
    let three_queries = plan(&Problem { queries: 3, ..p.clone() }, 0, &A10).unwrap();
    assert_eq!((three_queries.warps, three_queries.warp_rows), (2, 32));
    // Every kernel fits on a GPU with little shared memory.
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for head_dim in scan::HEAD_DIMS {
            for candidates in [1, 2, 32] {
                let plan = plan(&Problem { dtype, head_dim, candidates, ..p.clone() }, 32, &A10).unwrap();
                assert!(plan.shared_bytes <= 97 << 10 && plan.warps >= 2, "{plan}");
            }
        }
    }
    let apple = Arch { compute: Arch::METAL, shared_bytes: 32 << 10, processors: 10 };
    refused(plan(&p, 0, &apple), "certified precision: Metal");
    refused(plan(&Problem { candidates: 64, ..p.clone() }, 0, &H100), "certified precision: 64 candidates");
    refused(plan(&Problem { keys: 1 << 28, ..p.clone() }, 0, &H100), "268435456 keys");
    refused(plan(&Problem { dtype: DType::F64, ..p.clone() }, 0, &H100), "f64");
    refused(plan(&Problem { head_dim: 260, ..p.clone() }, 0, &H100), "head_dim 260");
    refused(plan(&p, 33, &H100), "33 protected");
    refused(plan(&p, 0, &Arch { compute: 75, ..H100 }), "compute capability 7.5");
    let wide = Problem { head_dim: 256, ..p.clone() };
    refused(plan(&wide, 0, &Arch { shared_bytes: 48 << 10, ..A10 }), "bytes of shared memory");
    let rows = Problem { queries: 1 << 24, ..p.clone() };
    refused(plan(&rows, 0, &H100), &format!("{}", 2u64 * 16 * (1 << 24) * 8));
    let blocks = Problem { queries: 1 << 30, batch: 1 << 12, candidates: 1, ..p };
    refused(plan(&blocks, 0, &H100), "a grid of");
}

#[test]
fn certified_scans_need_their_keys() {
    let gpu = TestGpu::new(0);
    let small = gpu.zeros(1 << 10).unwrap();
    let slice = Slice::from(&small);
    let p = Problem {
        candidates: 1,
        batch: 1,
        kv_heads: 1,
        q_heads: 1,
        queries: 2,
        keys: 65,
        head_dim: 32,
        precision: Precision::Certified,
        ..problem()
    };
    let plan = scan::GpuScanPlan::new(&p, 0, false, &gpu.arch()).unwrap();
    let mask = Mask::none();
    let x = || scan::Inputs {
        q: Tensor4 { data: slice, strides: [64, 64, 32] },
        k: Tensor4 { data: slice, strides: [0, 0, 0] },
        beta: slice,
        prior: None,
        protected: None,
        mask: &mask,
    };
    let out = || scan::Outputs { index: slice, energy: slice, flags: None };
    let invalid = |result: Result<(), Error>, value: &str| match result {
        Err(Error::Invalid(text)) => assert!(text.contains(value), "{text} does not name {value}"),
        other => panic!("{other:?} instead of a refusal that names {value}"),
    };
    invalid(scan::scan(&gpu, &plan, &p, &x(), &out()), "Certified precision without 8-bit keys");
    let with = |capacity: usize, p: &Problem| {
        let keys = Int8Slices { values: slice, bounds: slice, capacity };
        let beside = Certified { keys, rescored: slice };
        scan_certified(&gpu, &plan, p, &x(), &beside, &out(), None)
    };
    invalid(with(64, &p), "65 keys with 64 8-bit keys");
    invalid(with(100, &p), "65 keys with 100 8-bit keys");
    invalid(with(128, &Problem { precision: Precision::Native, ..p.clone() }), "Native precision");
    assert_eq!(gpu.launches(), 0);
}

#[test]
fn hopper_has_its_own_kernel() {
    let p = Problem { candidates: 1, ..problem() };
    let plan = |p: &Problem, protected: usize, arch: &Arch| {
        scan::GpuScanPlan::new(p, protected, false, arch).unwrap().on_hopper(p, arch)
    };
    let top1 = plan(&p, 0, &H100);
    assert_eq!(
        (top1.kernel.to_string().as_str(), top1.warps, top1.loaders),
        ("scan_top1_bf16_d128_sm90a", 8, 4)
    );
    assert_eq!((top1.warps * top1.warp_rows, top1.tile_keys, top1.pack), (256, 128, 4));
    assert!(
        top1.to_string().starts_with("scan_top1_bf16_d128_sm90a: 256 query rows x 128 keys, 4 heads"),
        "{top1}"
    );
    for (head_dim, rows) in [(24, 256), (64, 256), (72, 256), (192, 256), (200, 128), (256, 128)] {
        let plan = plan(&Problem { head_dim, ..p.clone() }, 0, &H100);
        assert_eq!(plan.warps * plan.warp_rows, rows, "{plan}");
        assert!(plan.kernel.target() == KernelTarget::Sm90a && plan.shared_bytes <= 227 << 10, "{plan}");
    }
    let list = plan(&Problem { candidates: 8, ..p.clone() }, 3, &H100);
    assert_eq!(
        (list.kernel.to_string().as_str(), list.warps * list.warp_rows),
        ("scan_topk_bf16_d128_sm90a", 128)
    );
    let widest = plan(&Problem { candidates: 2, head_dim: 192, ..p.clone() }, 0, &H100);
    assert!(widest.kernel.target() == KernelTarget::Sm90a && widest.shared_bytes <= 227 << 10, "{widest}");
    // The other kernel: another device, f32, wide rows with lists, few rows, too little shared memory.
    for other in [
        plan(&p, 0, &A10),
        plan(&p, 0, &Arch { compute: 100, ..H100 }),
        plan(&Problem { dtype: DType::F32, ..p.clone() }, 0, &H100),
        plan(&Problem { candidates: 2, head_dim: 200, ..p.clone() }, 0, &H100),
        plan(&p, 1, &Arch { shared_bytes: 164 << 10, ..H100 }),
        plan(&Problem { queries: 16, ..p.clone() }, 0, &H100),
        plan(&p, 0, &Arch { shared_bytes: 99 << 10, ..H100 }),
    ] {
        assert!(other.kernel.target() == KernelTarget::Sm80 && other.loaders == 0, "{other}");
    }
}

#[test]
fn tensors_that_tma_cannot_load_are_refused() {
    let gpu = TestGpu::new(0).on_hopper();
    let memory = gpu.zeros(1 << 12).unwrap();
    let dims = [2, 3, 5, 64];
    let at = |strides, offset| Tensor4 { data: Slice { buffer: &memory, offset }, strides };
    fn map<'a>(
        t: &Tensor4<'a, Buffer>,
        dtype: DType,
        dims: [usize; 4],
        rows: usize,
    ) -> Result<TensorMap<'a, Buffer>, Error> {
        TensorMap::new("k", t, dtype, dims, rows)
    }
    let plain = at([960, 320, 64], 0);
    let tensor_map = map(&plain, DType::BF16, dims, 128).unwrap();
    assert_eq!(
        tensor_map.to_string(),
        "bf16 [2, 3, 5, 64] at strides of [1920, 640, 128] bytes, boxes of 128 x 64"
    );
    // Strides that are never taken may be anything.
    let one = map(&at([7, 7, 7], 0), DType::F16, [1, 1, 1, 64], 128).unwrap();
    assert_eq!(one.strides, [128; 3]);
    refused(map(&plain, DType::F32, dims, 128), "f32");
    refused(map(&plain, DType::F16, [2, 3, 0, 64], 128), "[2, 3, 0, 64]");
    refused(map(&plain, DType::F16, [2, 3, 5, 63], 128), "rows of 126 bytes");
    refused(map(&at([960, 320, 64], 8), DType::F16, dims, 128), "offset 8");
    refused(map(&at([960, 320, 65], 0), DType::F16, dims, 128), "a stride of 130 bytes");
    refused(map(&at([960, 0, 64], 0), DType::F16, dims, 128), "a stride of 0 bytes");
    refused(map(&plain, DType::F16, dims, 257), "a box of 257 rows");
    // A plan for Hopper with tensors that do not suit it.
    let p = Problem {
        candidates: 1,
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        queries: 65,
        keys: 2,
        head_dim: 8,
        dtype: DType::F16,
        ..problem()
    };
    let plan = scan::GpuScanPlan::new(&p, 0, false, &gpu.arch()).unwrap().on_hopper(&p, &gpu.arch());
    let (mask, slice) = (Mask::none(), Slice::from(&memory));
    let x = |q, k| scan::Inputs { q, k, beta: slice, prior: None, protected: None, mask: &mask };
    let out = scan::Outputs { index: slice, energy: slice, flags: None };
    let (even, odd) = (at([0, 0, 8], 0), at([0, 0, 9], 0));
    for (x, name) in [(x(even, odd), "k for TMA"), (x(odd, even), "q for TMA")] {
        assert!(!x.tma_loadable(&p));
        refused(scan::scan(&gpu, &plan, &p, &x, &out), name);
    }
}

#[test]
fn tensors_beyond_31_bits_are_refused() {
    let gpu = TestGpu::new(0);
    let small = gpu.zeros(64).unwrap();
    let at = |strides| Tensor4 { data: Slice::from(&small), strides };
    let p = Problem {
        candidates: 1,
        batch: 1,
        kv_heads: 1,
        q_heads: 1,
        queries: 2,
        keys: 2,
        head_dim: 32,
        ..problem()
    };
    let plan = scan::GpuScanPlan::new(&p, 0, false, &gpu.arch()).unwrap();
    let mask = Mask::none();
    let inputs =
        |q, k| scan::Inputs { q, k, beta: (&small).into(), prior: None, protected: None, mask: &mask };
    let out = || scan::Outputs { index: (&small).into(), energy: (&small).into(), flags: None };
    let far = [1 << 31, 1 << 31, 1 << 31];
    refused(scan::scan(&gpu, &plan, &p, &inputs(at(far), at([64, 64, 32])), &out()), "q spans 2147483680");
    refused(scan::scan(&gpu, &plan, &p, &inputs(at([64, 64, 32]), at(far)), &out()), "k spans 2147483680");
    assert_eq!(gpu.launches(), 0);
}

#[test]
fn metal_has_its_own_plans() {
    let apple = Arch { compute: Arch::METAL, shared_bytes: 32 << 10, processors: 10 };
    let p = problem();
    let list = scan::GpuScanPlan::new(&p, 0, false, &apple).unwrap();
    assert_eq!(list.kernel.to_string(), "scan_topk_bf16_d128_metal");
    // A widened tile of 32 keys, 16.5 KiB, leaves capacity for the lists of two simdgroups.
    assert_eq!((list.warps, list.warp_rows, list.tile_keys), (2, 8, 32));
    let top1 = scan::GpuScanPlan::new(&Problem { candidates: 1, ..p.clone() }, 0, false, &apple).unwrap();
    assert_eq!((top1.kernel.to_string().as_str(), top1.warp_rows), ("scan_top1_bf16_d128_metal", 16));
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for head_dim in scan::HEAD_DIMS {
            for candidates in [1, 8] {
                let p = Problem { dtype, head_dim, candidates, ..p.clone() };
                let plan = scan::GpuScanPlan::new(&p, 0, false, &apple).unwrap();
                assert!(plan.shared_bytes <= 32 << 10 && plan.warps >= 1, "{plan}");
            }
        }
    }
    let step = Problem { queries: 1, candidates: 1, keys: 32_768, batch: 1, ..p };
    let plan = decode::DecodePlan::new(&step, false, &apple).unwrap();
    assert_eq!((plan.kernel.to_string().as_str(), plan.splits), ("decode_bf16_d128_metal", 10));
    assert_eq!(plan.merge.map(|k| k.to_string()).as_deref(), Some("decode_merge_bf16_metal"));
    // 16 rows of score and key a split, of four heads of keys.
    assert_eq!(plan.workspace_bytes(&step), 4 * 10 * 16 * 8);
}

#[test]
fn decoding_is_planned_or_refused() {
    let p = Problem { queries: 1, candidates: 1, keys: 32_768, batch: 1, ..problem() };
    let plan = decode::DecodePlan::new(&p, false, &H100).unwrap();
    // Four heads of keys, four rows each: 132 processors with 4 blocks.
    assert_eq!((plan.row_tiles, plan.pack, plan.splits), (1, 4, 132));
    assert!(plan.to_string().contains("132 splits x 64 keys"), "{plan}");
    assert_eq!(decode::DecodePlan::new(&Problem { keys: 100, ..p.clone() }, false, &H100).unwrap().splits, 1);
    refused(decode::DecodePlan::new(&Problem { queries: 17, ..p.clone() }, false, &H100), "17 queries");
    refused(decode::DecodePlan::new(&Problem { candidates: 2, ..p.clone() }, false, &H100), "2 candidates");
    refused(decode::DecodePlan::new(&Problem { head_dim: 300, ..p.clone() }, false, &H100), "head_dim 300");
    refused(decode::DecodePlan::new(&p, false, &Arch { compute: 70, ..H100 }), "compute capability 7.0");
}

#[test]
fn certified_decoding_is_planned_or_refused() {
    let precision = Precision::Certified;
    let p = Problem { queries: 1, candidates: 1, keys: 32_768, batch: 1, precision, ..problem() };
    let plan = decode::DecodePlan::new(&p, false, &H100).unwrap();
    assert_eq!((plan.kernel.to_string().as_str(), plan.tile_keys), ("decode_certified_bf16_d128_sm80", 64));
    // 64 candidates a split.
    assert_eq!((plan.splits, plan.capacity), (132, 132 * 64));
    assert!(plan.workspace_bytes(&p) > plan.capacity * 8 * p.kv_heads);
    // The largest head_dim in f32 fits into the smallest shared memory.
    let wide = Problem { head_dim: 256, dtype: DType::F32, ..p.clone() };
    assert!(decode::DecodePlan::new(&wide, false, &A10).unwrap().shared_bytes <= 98 << 10);
    refused(decode::DecodePlan::new(&wide, false, &Arch { shared_bytes: 64 << 10, ..A10 }), "shared memory");
    refused(decode::DecodePlan::new(&Problem { keys: 1 << 28, ..p.clone() }, false, &H100), "268435456 keys");
    refused(decode::DecodePlan::new(&Problem { dtype: DType::F64, ..p.clone() }, false, &H100), "f64");
    refused(decode::DecodePlan::new(&Problem { queries: 17, ..p }, false, &H100), "17 queries");
}

#[test]
fn the_other_operators_are_planned_or_refused() {
    let s = select::Sizes {
        batch: 1,
        q_heads: 2,
        kv_heads: 1,
        queries: 8,
        keys: 8,
        head_dim: 16,
        value_dim: 16,
        slots: 4,
        dtype: DType::F16,
    };
    let rule = select::Rule::default();
    assert!(select::SelectPlan::new(&s, &rule, &A10).is_ok());
    refused(select::SelectPlan::new(&select::Sizes { slots: 65, ..s }, &rule, &A10), "65 candidates");
    refused(select::SelectPlan::new(&select::Sizes { dtype: DType::F64, ..s }, &rule, &A10), "f64");
    let dense = select::Rule { estimator: Estimator::Dense, ..rule };
    refused(select::SelectPlan::new(&s, &dense, &A10), "dense");
    refused(select::SelectPlan::new(&select::Sizes { queries: 1 << 29, ..s }, &rule, &A10), "4294967296");

    let c = conv::Sizes { batch: 1, rows: 10, channels: 4, width: 4, dtype: DType::F32 };
    assert!(conv::ConvPlan::new(&c, None, &A10).is_ok());
    refused(conv::ConvPlan::new(&conv::Sizes { dtype: DType::F64, ..c }, None, &A10), "f64");
    refused(conv::ConvPlan::new(&conv::Sizes { rows: 1 << 30, ..c }, None, &A10), "4294967296");

    let a = average::Sizes { batch: 1, heads: 4, value_heads: 1, rows: 10, dim: 64, dtype: DType::F32 };
    assert!(average::AveragePlan::new(&a, &A10).is_ok());
    refused(average::AveragePlan::new(&average::Sizes { dim: 1025, ..a }, &A10), "1025");
    refused(average::AveragePlan::new(&average::Sizes { heads: 512, ..a }, &A10), "512 heads a value head");
    refused(average::AveragePlan::new(&average::Sizes { rows: 1 << 28, ..a }, &A10), "68719476736");
}

#[test]
fn operators_of_a_training_step_are_planned_or_refused() {
    let s = RowSizes { batch: 2, heads: 3, rows: 5, dim: 8, dtype: DType::BF16 };
    type Make = fn(&RowSizes, &Arch) -> Result<(), Error>;
    let makes: [(&str, Make); 4] = [
        ("rms_norm", |s, arch| norm::NormPlan::new(s, 1e-5, arch).map(drop)),
        ("rotary", |s, arch| rotary::RotaryPlan::new(s, &[0], arch).map(drop)),
        ("swiglu", |s, arch| swiglu::SwigluPlan::new(s, arch).map(drop)),
        ("cross_entropy", |s, arch| cross_entropy::CrossEntropyPlan::new(s, arch).map(drop)),
    ];
    for (op, make) in makes {
        assert!(make(&s, &H100).is_ok() && make(&s, &Arch { compute: Arch::METAL, ..A10 }).is_ok());
        let refuse = |s: RowSizes, arch: &Arch, value: &str| {
            refused(make(&s, arch), op);
            refused(make(&s, arch), value);
        };
        refuse(RowSizes { dtype: DType::F64, ..s }, &H100, "f64");
        refuse(RowSizes { rows: 0, ..s }, &H100, "[2, 3, 0, 8]");
        refuse(s, &Arch { compute: 75, ..H100 }, "7.5");
        let large = RowSizes { rows: 1 << 26, ..s };
        assert!(matches!(make(&large, &H100), Err(Error::Unsupported(text)) if text.contains("3221225472")));
    }
    let invalid = |result: Result<(), Error>, value: &str| match result {
        Err(Error::Invalid(text)) => assert!(text.contains(value), "{text} does not name {value}"),
        other => panic!("{other:?} instead of a text that names {value}"),
    };
    invalid(rotary::RotaryPlan::new(&RowSizes { dim: 7, ..s }, &[0], &H100).map(drop), "7 elements");
    invalid(rotary::RotaryPlan::new(&s, &[0, 1, 2], &H100).map(drop), "3 offsets");
    refused(rotary::RotaryPlan::new(&s, &[1 << 31], &H100), "2147483653");

    let gpu = TestGpu::new(0);
    let memory = gpu.zeros(1 << 12).unwrap();
    let at = Slice::from(&memory);
    let x = Tensor4::contiguous(at, [3, 5, 8]);
    let plan = rotary::RotaryPlan::new(&s, &[4], &H100).unwrap();
    let angles = rotary::Angles { cos: at, sin: at, positions: 8 };
    invalid(rotary::rotate(&gpu, &plan, &x, &angles, false, at), "9 positions exceed the 8");
    let far = Tensor4 { data: at, strides: [1 << 31, 40, 8] };
    let plan = norm::NormPlan::new(&s, 1e-5, &H100).unwrap();
    refused(norm::forward(&gpu, &plan, &far, at, at), "x spans");
    // The forward pass is one launch, the backward pass two.
    norm::forward(&gpu, &plan, &x, at, at).unwrap();
    assert_eq!(gpu.launches(), 1);
    let out = gpu.zeros(1 << 12).unwrap();
    norm::backward(&gpu, &plan, &x, at, &x, [(&out).into(), Slice { buffer: &out, offset: 2048 }]).unwrap();
    assert_eq!(gpu.launches(), 3);

    refused(adamw::PartialSums::new(vec![1, 1 << 31]), "2147483648");
    let parts = adamw::PartialSums::new(vec![100, 0, 1]).unwrap();
    assert_eq!(parts.count(), 2);
    refused(adamw::squares(&gpu, &parts, 0, (at, DType::F64), (&out).into()), "f64");
    adamw::squares(&gpu, &parts, 1, (at, DType::F32), (&out).into()).unwrap();
    assert_eq!(gpu.launches(), 3, "a gradient without elements is none");
    let limits = adamw::Limits { weight: 1.0, clip: 1.0, loss: f32::INFINITY, norm: f32::INFINITY };
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let limits = adamw::Limits { weight, ..limits };
        let result = adamw::verdict(&gpu, (&parts, at), (at, 1), &limits, (&out).into());
        invalid(result, &format!("weight {weight}"));
    }
    let step = adamw::Step { number: 1, lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
    let x = adamw::Operands { parameter: at, gradient: at, m: at, v: at, master: None };
    let update =
        |dtype, x: &adamw::Operands<'_, Buffer>| adamw::update(&gpu, &step, (100, dtype), (at, None), x);
    refused(update(DType::F64, &x), "f64");
    invalid(update(DType::BF16, &x), "bf16 without an f32 master");
    invalid(update(DType::F32, &adamw::Operands { master: Some(at), ..x }), "f32 with an f32 master");
}
