//! Decoding over a cache in pages against the same keys in one tensor, and the errors for bad tables.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{
    Int8Keys, KeyCache, Mask, PagedCache, Precision, Scan, Score, Selected, decode_paged, scan_select,
};

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

/// Rows `[B, H, M, D]` in the pages of `table` `[B, row]`; all other rows are NaN.
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

/// Two sequences of different lengths, whose pages are in no order; the last entry of the second is not a page.
fn table() -> (Vec<Vec<u32>>, Vec<usize>, usize) {
    (vec![vec![5, 0, 3], vec![1, 4, 4_000_000_000]], vec![150, 100], 7)
}

#[test]
fn paged_decoding_equals_contiguous_decoding() -> Result<()> {
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
        for mask in [
            Mask::none().kv_len(lengths.clone()),
            Mask::causal(0).with_offsets(offsets).kv_len(lengths.clone()),
        ] {
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
                let got = decode_paged(&q, &cache, &how, Some(&threshold)).unwrap();
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
        let e = decode_paged(q, &PagedCache { k, v, table }, &how, None).unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    // The rows after the second sequence's 60 keys are not read.
    let good = ids(&[[0, 3], [1, -7]])?;
    decode_paged(&q, &PagedCache { k: &k, v: &v, table: &good }, &Scan::new(&beta, &mask, 1), None).unwrap();
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
    let e = decode_paged(&q, &PagedCache { k: &k, v: &v, table: &good }, &Scan::new(&beta, &long, 1), None);
    assert!(e.unwrap_err().to_string().contains("129"));
    Ok(())
}

/// Key, energy and value row of every query, to the bit.
fn bits(s: &Selected) -> Result<(Vec<i32>, Vec<u32>, Vec<u32>)> {
    let of = |t: &Tensor| -> Result<Vec<u32>> {
        let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    };
    Ok((s.index.flatten_all()?.to_vec1()?, of(&s.energy)?, of(&s.y)?))
}

#[test]
fn pages_written_step_by_step_equal_a_contiguous_cache() -> Result<()> {
    let (table, lengths, count) = table();
    let (hq, hk, d, dv) = (6, 2, 24, 10);
    for (seed, score, dtype) in
        [(1, Score::Energy, DType::F32), (2, Score::Dot, DType::BF16), (3, Score::Energy, DType::F16)]
    {
        let noise = |seed: u64, shape: &[usize]| noise(seed, shape).to_dtype(dtype);
        let (k, v) = (noise(seed + 10, &[2, hk, 3 * PAGE, d])?, noise(seed + 20, &[2, hk, 3 * PAGE, dv])?);
        // Pages that held other sequences before.
        let held_k = noise(seed + 40, &[count, hk, PAGE, d])?;
        let held_v = noise(seed + 50, &[count, hk, PAGE, dv])?;
        let mut key_cache = KeyCache::new(&held_k, score, Precision::Certified)?;
        let (old_k, old_v) = (held_k.copy()?, held_v.copy()?);
        let ids = table.iter().flatten().map(|&id| i64::from(id)).collect::<Vec<_>>();
        let ids = Tensor::from_vec(ids, (2, 3), &Device::Cpu)?;
        let cache = PagedCache { k: &held_k, v: &held_v, table: &ids };
        // Sequences of different lengths, across the end of a page, in steps of several rows and of one.
        let mut first = vec![0, 0];
        let mut written = vec![0, 0];
        for (step, more) in [(0, 50), (1, 1), (0, 40), (2, 1), (0, 9)] {
            let rows = |t: &Tensor| -> Result<Tensor> {
                let each = (0..2).map(|b| t.narrow(0, b, 1)?.narrow(2, first[b], more));
                Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
            };
            cache.write(&rows(&k)?, &rows(&v)?, &first, Some(&mut key_cache))?;
            for b in 0..2 {
                written[b] = first[b] + more;
                // The second sequence is shorter, and writes some positions again.
                first[b] = if b == 1 && step > 0 { first[b] } else { written[b] };
            }
            let queries = 1 + step;
            let q = noise(seed + 60 + step as u64, &[2, hq, queries, d])?;
            let beta = Tensor::full(0.7f32, hq, &Device::Cpu)?;
            let mask = Mask::none().kv_len(written.clone());
            let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
            let want = bits(&scan_select(&q, &k, &v, &how, None)?)?;
            assert_eq!(bits(&decode_paged(&q, &cache, &how, None)?)?, want, "{dtype:?}");
            assert_eq!(
                bits(&decode_paged(&q, &cache, &how.clone().with_cached(&key_cache), None)?)?,
                want,
                "{dtype:?}"
            );
            // The same as quantising all pages at once.
            let anew = Int8Keys::new(&held_k, score)?;
            let how = Scan { precision: Precision::Certified, cached: Some((&anew).into()), ..how };
            assert_eq!(bits(&decode_paged(&q, &cache, &how, None)?)?, want, "{dtype:?}");
        }
        assert!(written[0] > PAGE && written[0] <= lengths[0] && written[1] < written[0], "{written:?}");
        // Nothing else has changed.
        let numbers = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec3::<f32>();
        for (new, old, from, dim) in [(&held_k, &old_k, &k, d), (&held_v, &old_v, &v, dv)] {
            let flat = |t: &Tensor| t.reshape((count * hk, PAGE, dim));
            let (new, old) = (numbers(&flat(new)?)?, numbers(&flat(old)?)?);
            for page in 0..count {
                let owner = (0..2).find_map(|b| {
                    let place = table[b].iter().position(|id| *id as usize == page)?;
                    Some((b, place * PAGE))
                });
                for (h, j) in (0..hk).flat_map(|h| (0..PAGE).map(move |j| (h, j))) {
                    let want = match owner.filter(|(b, start)| start + j < written[*b]) {
                        Some((b, start)) => {
                            let row = from.narrow(0, b, 1)?.narrow(1, h, 1)?.narrow(2, start + j, 1)?;
                            row.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?
                        }
                        None => old[page * hk + h][j].clone(),
                    };
                    assert_eq!(new[page * hk + h][j], want, "page {page}, head {h}, row {j}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn writes_that_do_not_fit_are_refused_and_change_nothing() -> Result<()> {
    let (k, v) = (noise(2, &[4, 1, PAGE, 8]), noise(3, &[4, 1, PAGE, 5]));
    let table = |ids: [i64; 4]| Tensor::from_vec(ids.to_vec(), (2, 2), &Device::Cpu);
    let (new_k, new_v) = (noise(4, &[2, 1, 3, 8]), noise(5, &[2, 1, 3, 5]));
    let refused = |table: &Tensor, k_rows: &Tensor, v_rows: &Tensor, first: &[usize], value: &str| {
        let cache = PagedCache { k: &k, v: &v, table };
        let mut key_cache = KeyCache::new(&k, Score::Energy, Precision::Certified).unwrap();
        let e = cache.write(k_rows, v_rows, first, Some(&mut key_cache)).unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    let good = table([0, 3, 1, 2])?;
    refused(&good, &new_k, &new_v, &[126, 0], "[126, 0]");
    refused(&good, &new_k, &new_v, &[0], "3 new positions of 2 sequences from [0]");
    refused(&good, &new_k.narrow(0, 0, 1)?, &new_v, &[0, 0], "[1, 1, 3, 8]");
    refused(&good, &new_k, &new_v.narrow(2, 0, 2)?, &[0, 0], "[2, 1, 2, 5]");
    refused(&good, &new_k.to_dtype(DType::F16)?, &new_v, &[0, 0], "F16");
    refused(&table([0, 4, 1, 2])?, &new_k, &new_v, &[70, 0], "page 1 of sequence 0 is 4");
    refused(&table([0, 3, 0, 2])?, &new_k, &new_v, &[5, 9], "page 0 would take");
    refused(&table([0, 0, 1, 2])?, &new_k, &new_v, &[62, 0], "page 0 would take");
    let cache = PagedCache { k: &k, v: &v, table: &good };
    let mut other = KeyCache::new(&k.narrow(0, 0, 3)?, Score::Energy, Precision::Certified)?;
    let e = cache.write(&new_k, &new_v, &[0, 0], Some(&mut other)).unwrap_err().to_string();
    assert!(e.contains("3 sequences of 64"), "{e}");
    let strided = noise(6, &[4, PAGE, 1, 16]).narrow(3, 0, 8)?.transpose(1, 2)?;
    let cache = PagedCache { k: &strided, v: &v, table: &good };
    assert!(cache.write(&new_k, &new_v, &[0, 0], None).unwrap_err().to_string().contains("contiguous"));
    // 8-bit keys of another score, or of other pages.
    let cache = PagedCache { k: &k, v: &v, table: &good };
    let (q, beta) = (noise(1, &[2, 2, 1, 8]), Tensor::ones(2, DType::F32, &Device::Cpu)?);
    let mask = Mask::none().kv_len(vec![100, 60]);
    for int8_keys in [Int8Keys::new(&k, Score::Dot)?, Int8Keys::new(&k.narrow(0, 1, 3)?, Score::Energy)?] {
        let how = Scan {
            precision: Precision::Certified,
            cached: Some((&int8_keys).into()),
            ..Scan::new(&beta, &mask, 1)
        };
        let e = decode_paged(&q, &cache, &how, None).unwrap_err().to_string();
        assert!(e.contains("do not belong to keys [4, 1, 64, 8]"), "{e}");
    }
    // A refused write has changed nothing.
    let same = |a: &Tensor, b: Tensor| -> Result<bool> {
        Ok(a.flatten_all()?.to_vec1::<f32>()? == b.flatten_all()?.to_vec1::<f32>()?)
    };
    assert!(same(&k, noise(2, &[4, 1, PAGE, 8]))? && same(&v, noise(3, &[4, 1, PAGE, 5]))?);
    Ok(())
}
