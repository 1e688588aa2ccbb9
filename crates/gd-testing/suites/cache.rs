//! Decoding with 8-bit keys, with cached key biases, and over a paged cache has the same bits as native decoding
//! without a cache on the same device.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{
    Int8Keys, KeyBias, KeyCache, Mask, PagedCache, Precision, Scan, Score, Selected, SequenceCache,
    decode_paged, scan_select,
};

use crate::{Target, sanitized, targets};
use gd_testing::problems::{rng, uniform};

const PAGE: usize = 64;

fn noise(seed: u64, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Key, energy and value row of every query.
fn on_host(s: &Selected) -> Result<(Vec<i32>, Vec<f32>, Vec<f32>)> {
    let host = |t: &Tensor| t.to_device(&Device::Cpu)?.flatten_all();
    let wide = |t: &Tensor| host(t)?.to_dtype(DType::F32)?.to_vec1();
    Ok((host(&s.index)?.to_vec1()?, wide(&s.energy)?, wide(&s.y)?))
}

#[test]
fn decoding_with_8_bit_keys_and_in_pages_has_the_bits_of_native_decoding() -> Result<()> {
    for target in targets() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (score, queries, d) in [(Score::Energy, 1, 128), (Score::Dot, 3, 64), (Score::Energy, 16, 40)]
            {
                target.run(|| decode_cached(&target, dtype, score, [queries, d]))?;
            }
        }
    }
    Ok(())
}

fn decode_cached(target: &Target, dtype: DType, score: Score, [queries, d]: [usize; 2]) -> Result<()> {
    let gpu = target.device();
    // Metal has no 8-bit keys.
    let certified = target.name() != "metal";
    let (b, hq, hk, m, dv) = (2, 8, 2, if sanitized() { 3 } else { 40 } * PAGE, 48);
    let (q, k, v) = (
        noise(1, &[b, hq, queries, d], dtype, gpu)?,
        noise(2, &[b, hk, m, d], dtype, gpu)?,
        noise(3, &[b, hk, m, dv], dtype, gpu)?,
    );
    let beta = Tensor::full(0.3f32, hq, gpu)?;
    let mask = Mask::none().kv_len(vec![m - 11, m - 70]);
    let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
    let want = on_host(&scan_select(&q, &k, &v, &how, None).unwrap())?;
    assert!(want.0.iter().all(|j| *j >= 0));

    // Cached key biases.
    let biases = KeyBias::new(&k, score).unwrap();
    let with_cache = Scan { cached: Some((&biases).into()), ..how.clone() };
    assert_eq!(on_host(&scan_select(&q, &k, &v, &with_cache, None).unwrap())?, want);
    let part = k.narrow(2, 0, m - 1)?;
    let wrong = scan_select(&q, &part, &v.narrow(2, 0, m - 1)?, &with_cache, None);
    assert!(wrong.unwrap_err().to_string().contains(&format!("{}", m - 1)));
    target.count();

    if certified {
        // Keys appended in several calls; a clone does not change with them.
        let mut quantized = Int8Keys::new(&k.narrow(2, 0, 100)?, score).unwrap();
        let clone = quantized.clone();
        quantized.append(&k.narrow(2, 100, 1)?).unwrap();
        quantized.append(&k.narrow(2, 101, m - 101)?).unwrap();
        assert_eq!((clone.len(), quantized.len()), (100, m));
        for cached in [Some((&quantized).into()), None] {
            let certified = Scan { precision: Precision::Certified, cached, ..how.clone() };
            assert_eq!(on_host(&scan_select(&q, &k, &v, &certified, None).unwrap())?, want);
            target.count();
        }
    }

    // Every second page of a cache, in reverse order; the other pages are NaN.
    let row = m / PAGE;
    let ids: Vec<u32> = (0..b * row).map(|at| (2 * (b * row - 1 - at)) as u32).collect();
    let pages = |t: &Tensor| -> Result<Tensor> {
        let dim = t.dim(3)?;
        let t = t.reshape((b, hk, row, PAGE, dim))?.transpose(1, 2)?.reshape((b * row, hk, PAGE, dim))?;
        let back: Vec<u32> = (0..b * row).rev().map(|at| at as u32).collect();
        let t = t.contiguous()?.index_select(&Tensor::new(back, gpu)?, 0)?.unsqueeze(1)?;
        let other = Tensor::full(f32::NAN, t.dims(), gpu)?.to_dtype(dtype)?;
        Tensor::cat(&[&t, &other], 1)?.reshape((2 * b * row, hk, PAGE, dim))
    };
    let (paged_k, paged_v) = (pages(&k)?, pages(&v)?);
    let table = Tensor::new(&ids[..], gpu)?.reshape((b, row))?;
    // A block table of i64.
    let wide = table.to_dtype(DType::I64)?;
    // A block table of i32 that is a part of a larger one.
    let part: Vec<i32> =
        ids.chunks(row).flat_map(|ids| ids.iter().map(|id| *id as i32).chain([-1])).collect();
    let part = Tensor::from_vec(part, (b, row + 1), gpu)?.narrow(1, 0, row)?;
    for (precision, table) in [
        (Precision::Native, &table),
        (Precision::Native, &wide),
        (Precision::Native, &part),
        (Precision::Certified, &table),
    ] {
        let cache = PagedCache { k: &paged_k, v: &paged_v, table };
        let how = Scan { precision, ..how.clone() };
        if precision == Precision::Native || certified {
            assert_eq!(on_host(&decode_paged(&q, &cache, &how, None).unwrap())?, want);
            target.count();
        }
    }
    Ok(())
}

/// The cache of the first `lengths[b]` keys of every sequence of k: caches of single sequences, stacked, and then the
/// last 40 keys of all sequences written at once.
fn stacked(k: &Tensor, lengths: &[usize], score: Score, precision: Precision) -> Result<KeyCache> {
    const LAST: usize = 40;
    let part = |b: usize, first: usize, count: usize| k.narrow(0, b, 1)?.narrow(2, first, count);
    let alone = lengths
        .iter()
        .enumerate()
        .map(|(b, length)| Ok(KeyCache::new(&part(b, 0, length - LAST)?, score, precision)?));
    let alone = alone.collect::<Result<Vec<_>>>()?;
    let mut all = KeyCache::stack(&alone.iter().collect::<Vec<_>>())?;
    let last = lengths.iter().enumerate().map(|(b, length)| part(b, length - LAST, LAST));
    let at: Vec<_> = lengths.iter().enumerate().map(|(b, length)| [b, length - LAST]).collect();
    all.write(&Tensor::cat(&last.collect::<Result<Vec<_>>>()?, 0)?, &at)?;
    Ok(all)
}

#[test]
fn caches_of_sequences_and_pages_that_grow_give_native_decoding() -> Result<()> {
    for target in targets() {
        for (dtype, score, d) in
            [(DType::F32, Score::Energy, 128), (DType::F16, Score::Dot, 64), (DType::BF16, Score::Energy, 40)]
        {
            target.run(|| decode_with_append_buffers(&target, dtype, score, d))?;
        }
    }
    Ok(())
}

fn decode_with_append_buffers(target: &Target, dtype: DType, score: Score, d: usize) -> Result<()> {
    let gpu = target.device();
    let certified = (target.name() != "metal").then_some(Precision::Certified);
    let (hq, hk, m, dv) = (8, 2, 9 * PAGE, 48);
    let (q, k, v) = (
        noise(1, &[3, hq, 2, d], dtype, gpu)?,
        noise(2, &[3, hk, m, d], dtype, gpu)?,
        noise(3, &[3, hk, m, dv], dtype, gpu)?,
    );
    let beta = Tensor::full(0.3f32, hq, gpu)?;
    let plain = |k: &Tensor, v: &Tensor, q: &Tensor, mask: &Mask| -> Result<_> {
        let how = Scan { score, ..Scan::new(&beta, mask, 1) };
        on_host(&scan_select(q, k, v, &how, None)?)
    };
    for precision in [Some(Precision::Native), certified].into_iter().flatten() {
        let lengths = vec![70, m, 333];
        let cache = stacked(&k, &lengths, score, precision)?;
        let mask = Mask::none().kv_len(lengths.clone());
        let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
        let want = plain(&k, &v, &q, &mask)?;
        assert_eq!(on_host(&scan_select(&q, &k, &v, &how.with_cached(&cache), None)?)?, want);
        // Reordered, without the longest.
        let (rows, lengths) = (Tensor::new(&[2u32, 0], gpu)?, vec![333, 70]);
        let some = |t: &Tensor| t.index_select(&rows, 0)?.narrow(2, 0, 333);
        let (k, v, q) = (some(&k)?, some(&v)?, q.index_select(&rows, 0)?);
        let mut cache = cache.select(&[2, 0])?;
        assert_eq!(cache.lengths(), lengths);
        let mask = Mask::none().kv_len(lengths);
        let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
        let want = plain(&k, &v, &q, &mask)?;
        assert_eq!(on_host(&scan_select(&q, &k, &v, &how.clone().with_cached(&cache), None)?)?, want);
        // Writes do not change a clone.
        let before = cache.clone();
        cache.write(&k.narrow(0, 1, 1)?.narrow(2, 0, 9)?, &[[0, 7]])?;
        assert_eq!(on_host(&scan_select(&q, &k, &v, &how.with_cached(&before), None)?)?, want);

        // A paged cache, written in steps that cross the ends of pages.
        let (paged_k, paged_v) =
            (noise(4, &[14, hk, PAGE, d], dtype, gpu)?, noise(5, &[14, hk, PAGE, dv], dtype, gpu)?);
        let mut key_cache = KeyCache::new(&paged_k, score, precision)?;
        let ids: Vec<u32> = (0..12).map(|at| (at * 5 + 1) % 14).collect();
        let table = Tensor::from_vec(ids, (2, 6), gpu)?;
        let cache = PagedCache { k: &paged_k, v: &paged_v, table: &table };
        let mut first = 0;
        for more in [100, 1, 27, 128, 1] {
            let rows = |t: &Tensor| t.narrow(2, first, more);
            cache.write(&rows(&k)?, &rows(&v)?, &[first; 2], Some(&mut key_cache))?;
            first += more;
        }
        let mask = Mask::none().kv_len(vec![first; 2]);
        let how = Scan { score, ..Scan::new(&beta, &mask, 1) };
        let want = plain(&k, &v, &q, &mask)?;
        assert_eq!(on_host(&decode_paged(&q, &cache, &how.with_cached(&key_cache), None)?)?, want);
        target.count();
    }
    Ok(())
}
