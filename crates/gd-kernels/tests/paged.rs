//! Decoding over a cache in pages against the same keys in one piece, and what a bad table is refused with.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Mask, PagedCache, Scan, Score, scan_select, scan_select_paged};

const PAGE: usize = 64;

/// Numbers without a pattern.
fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Rows `[B, H, M, D]` in pages in the places of `table` `[B, row]`; NaN everywhere else.
fn pages(rows: &Tensor, table: &[Vec<u32>], lengths: &[usize], count: usize) -> Result<Tensor> {
    let (b, heads, keys, dim) = rows.dims4()?;
    let from: Vec<f32> = rows.flatten_all()?.to_vec1()?;
    let mut all = vec![f32::NAN; count * heads * PAGE * dim];
    for (b, length) in (0..b).zip(lengths) {
        for h in 0..heads {
            for j in 0..*length {
                let to = ((table[b][j / PAGE] as usize * heads + h) * PAGE + j % PAGE) * dim;
                let at = ((b * heads + h) * keys + j) * dim;
                all[to..to + dim].copy_from_slice(&from[at..at + dim]);
            }
        }
    }
    Tensor::from_vec(all, (count, heads, PAGE, dim), &Device::Cpu)
}

/// Two sequences of different lengths, whose pages lie in no order; the last entry of the second is no page.
fn table() -> (Vec<Vec<u32>>, Vec<usize>, usize) {
    (vec![vec![5, 0, 3], vec![1, 4, 4_000_000_000]], vec![150, 100], 7)
}

#[test]
fn pages_give_what_one_piece_gives() -> Result<()> {
    let (table, lengths, count) = table();
    let (hq, hk, d, dv, keys) = (6, 2, 24, 10, 3 * PAGE);
    for (seed, queries, score, dtype) in [
        (1, 1, Score::Energy, DType::F32),
        (2, 3, Score::Dot, DType::F32),
        (3, 16, Score::Energy, DType::BF16),
        (4, 40, Score::Energy, DType::F16),
    ] {
        let (q, k, v) = (
            noise(seed, &[2, hq, queries, d]).to_dtype(dtype)?,
            noise(seed + 10, &[2, hk, keys, d]),
            noise(seed + 20, &[2, hk, keys, dv]),
        );
        let (beta, threshold) =
            (Tensor::full(0.7f32, hq, &Device::Cpu)?, Tensor::full(4.5f32, hq, &Device::Cpu)?);
        let prior = noise(seed + 30, &[2, hk, keys]);
        let offsets: Vec<i64> = lengths.iter().map(|&n| n as i64 - queries as i64).collect();
        for mask in
            [Mask::none().kv_len(lengths.clone()), Mask::causal(0).each(offsets).kv_len(lengths.clone())]
        {
            let how = Scan { score, prior: Some(&prior), ..Scan::new(&beta, &mask, 1) };
            let (whole_k, whole_v) = (k.to_dtype(dtype)?, v.to_dtype(dtype)?);
            let want = scan_select(&q, &whole_k, &whole_v, &how, Some(&threshold)).unwrap();
            let held_k = pages(&k, &table, &lengths, count)?.to_dtype(dtype)?;
            let held_v = pages(&v, &table, &lengths, count)?.to_dtype(dtype)?;
            let ids: Vec<i64> = table.iter().flatten().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_vec(ids, (2, 3), &Device::Cpu)?;
            for kind in [DType::U32, DType::I64] {
                let ids = ids.to_dtype(kind)?;
                let cache = PagedCache { k: &held_k, v: &held_v, table: &ids };
                let got = scan_select_paged(&q, &cache, &how, Some(&threshold)).unwrap();
                let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<i32>();
                assert_eq!(flat(&got.index)?, flat(&want.index)?, "seed {seed}");
                let bits = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                assert_eq!(bits(&got.energy)?, bits(&want.energy)?, "seed {seed}");
                assert_eq!(bits(&got.y)?, bits(&want.y)?, "seed {seed}");
                assert!(flat(&got.index)?.iter().any(|&j| j >= PAGE as i32), "no key of a second page won");
            }
        }
    }
    Ok(())
}

#[test]
fn bad_caches_and_tables_are_refused() -> Result<()> {
    let (q, beta) = (noise(1, &[2, 2, 1, 8]), Tensor::ones(2, DType::F32, &Device::Cpu)?);
    let (k, v) = (noise(2, &[4, 1, PAGE, 8]), noise(3, &[4, 1, PAGE, 5]));
    let mask = Mask::none().kv_len(vec![100, 60]);
    let ids = |rows: &[[i64; 2]]| Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu);
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor, table: &Tensor, value: &str| {
        let how = Scan::new(&beta, &mask, 1);
        let e = scan_select_paged(q, &PagedCache { k, v, table }, &how, None).unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    // Behind the second sequence's 60 keys anything may stand.
    let good = ids(&[[0, 3], [1, -7]])?;
    scan_select_paged(&q, &PagedCache { k: &k, v: &v, table: &good }, &Scan::new(&beta, &mask, 1), None)
        .unwrap();
    refused(&q, &k, &v, &ids(&[[0, 4], [1, 0]])?, "page 1 of sequence 0 is 4");
    refused(&q, &k, &v, &ids(&[[0, 3], [-1, 0]])?, "page 0 of sequence 1 is -1");
    refused(&q, &k, &v, &ids(&[[0, 3]])?, "block table of [1, 2]");
    refused(&q, &k, &v, &good.flatten_all()?, "[batch, pages]");
    refused(&q, &k, &v, &good.to_dtype(DType::F32)?, "F32");
    let short = k.narrow(2, 0, 40)?;
    refused(&q, &short, &v.narrow(2, 0, 40)?, &good, "pages of 40 keys");
    refused(&q, &k, &v.narrow(0, 0, 3)?, &good, "[3, 1, 64, 5]");
    refused(&q, &k.to_dtype(DType::F16)?, &v, &good, "F16");
    refused(&q.narrow(3, 0, 4)?, &k, &v, &good, "[2, 2, 1, 4]");
    let long = Mask::none().kv_len(vec![129, 1]);
    let e =
        scan_select_paged(&q, &PagedCache { k: &k, v: &v, table: &good }, &Scan::new(&beta, &long, 1), None);
    assert!(e.unwrap_err().to_string().contains("129"));
    Ok(())
}
