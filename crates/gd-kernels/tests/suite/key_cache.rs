//! 8-bit keys of sequences that are appended to, reordered, dropped, stacked and cloned: scans with them give the bits
//! of the native scan.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{
    Candidates, Error, Int8Keys, KeyBias, KeyCache, Mask, Precision, Scan, Score, SequenceCache, TieBreak,
    scan,
};
use gd_testing::problems::{rng, uniform};

fn noise(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Index and energy to the bit.
fn bits(scanned: &Candidates) -> Result<(Vec<i32>, Vec<u32>)> {
    let energy = scanned.energy.flatten_all()?.to_vec1::<f32>()?;
    Ok((scanned.index.flatten_all()?.to_vec1()?, energy.into_iter().map(f32::to_bits).collect()))
}

/// The keys of a cache `[B, Hk, capacity, D]` and their number for every sequence. In [`Keys::tensor`] the rows after
/// the last key are keys that would win every scan that read them.
struct Keys {
    all: Tensor,
    lengths: Vec<usize>,
}

impl Keys {
    fn tensor(&self) -> Result<Tensor> {
        let (b, heads, most, d) = self.all.dims4()?;
        let mut rows: Vec<f32> = self.all.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        for (row, key) in rows.chunks_mut(d).enumerate() {
            let (b, j) = (row / (heads * most), row % most);
            if j >= self.lengths[b] {
                key.fill(1e4 * (1 + b) as f32);
            }
        }
        let most = self.lengths.iter().max().copied().unwrap_or(0);
        Tensor::from_vec(rows, (b, heads, self.all.dims()[2], d), &Device::Cpu)?
            .narrow(2, 0, most)?
            .to_dtype(self.all.dtype())
    }

    /// A part of one sequence.
    fn part(&self, b: usize, first: usize, count: usize) -> Result<Tensor> {
        self.all.narrow(0, b, 1)?.narrow(2, first, count)
    }
}

/// Compares scans of `q` with these 8-bit keys and without: they must agree to the bit.
fn compare(q: &Tensor, keys: &Keys, int8_keys: &Int8Keys, score: Score, name: &str) -> Result<()> {
    assert_eq!(int8_keys.lengths(), keys.lengths, "{name}");
    let k = keys.tensor()?;
    let (batch, hq, n, _) = q.dims4()?;
    let beta = Tensor::full(0.4f32, hq, &Device::Cpu)?;
    let offsets = keys.lengths.iter().map(|length| *length as i64 - n as i64).collect();
    let mask = Mask::causal(0).with_offsets(offsets);
    for (candidates, tie) in [(1, TieBreak::First), (4, TieBreak::Last)] {
        let native = Scan { score, tie, ..Scan::new(&beta, &mask, candidates) };
        let certified =
            Scan { precision: Precision::Certified, cached: Some(int8_keys.into()), ..native.clone() };
        let (want, got) = (scan(q, &k, &native)?, scan(q, &k, &certified)?);
        assert_eq!(bits(&got)?, bits(&want)?, "{name}, {candidates} candidates");
        // A query that sees fewer keys than candidates has none in the last slots.
        let first_candidates = want.index.narrow(3, 0, 1)?.flatten_all()?.to_vec1::<i32>()?;
        assert!(
            first_candidates.len() == batch * hq * n && first_candidates.iter().all(|j| *j >= 0),
            "{name}: {first_candidates:?}"
        );
    }
    Ok(())
}

#[test]
fn sequences_of_different_lengths_are_scanned_as_natively() -> Result<()> {
    let mut cases = 0;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (seed, (score, hq, hk, d, n)) in
            [(Score::Energy, 6, 2, 17, 1), (Score::Dot, 3, 3, 64, 1), (Score::Energy, 4, 1, 33, 5)]
                .into_iter()
                .enumerate()
        {
            let name = format!("{dtype:?} {score:?} D {d}");
            let all = noise(seed as u64, &[3, hk, 300, d], dtype)?;
            let mut keys = Keys { all, lengths: vec![40, 7, 129] };
            // Quantised one by one, then stacked to a batch.
            let alone: Vec<Int8Keys> = (0..3)
                .map(|b| Ok(Int8Keys::new(&keys.part(b, 0, keys.lengths[b])?, score)?))
                .collect::<Result<_>>()?;
            let mut int8_keys = Int8Keys::stack(&alone.iter().collect::<Vec<_>>())?;
            let q = noise(90 + seed as u64, &[3, hq, n, d], dtype)?;
            compare(&q, &keys, &int8_keys, score, &format!("{name}, stacked"))?;
            // Rows appended to all sequences, then to two of them in another order.
            for more in [1, 30, 64] {
                let parts =
                    (0..3).map(|b| keys.part(b, keys.lengths[b], more)).collect::<Result<Vec<_>>>()?;
                int8_keys.append(&Tensor::cat(&parts, 0)?)?;
                keys.lengths.iter_mut().for_each(|length| *length += more);
                compare(&q, &keys, &int8_keys, score, &format!("{name}, {more} more"))?;
            }
            let before = (int8_keys.clone(), keys.lengths.clone());
            let parts = [keys.part(2, keys.lengths[2], 9)?, keys.part(0, keys.lengths[0], 9)?];
            int8_keys.write(&Tensor::cat(&parts, 0)?, &[[2, keys.lengths[2]], [0, keys.lengths[0]]])?;
            (keys.lengths[2], keys.lengths[0]) = (keys.lengths[2] + 9, keys.lengths[0] + 9);
            compare(&q, &keys, &int8_keys, score, &format!("{name}, two of three"))?;
            // A clone has the keys of its time, and is appended to independently.
            let mut other =
                Keys { all: noise(50 + seed as u64, &[3, hk, 300, d], dtype)?, lengths: before.1 };
            for b in 0..3 {
                let old = keys.part(b, 0, other.lengths[b])?;
                other.all = other.all.slice_assign(&[b..b + 1, 0..hk, 0..other.lengths[b], 0..d], &old)?;
            }
            let mut clone = before.0;
            compare(&q, &other, &clone, score, &format!("{name}, clone"))?;
            let parts = (0..3).map(|b| other.part(b, other.lengths[b], 3)).collect::<Result<Vec<_>>>()?;
            clone.append(&Tensor::cat(&parts, 0)?)?;
            other.lengths.iter_mut().for_each(|length| *length += 3);
            compare(&q, &other, &clone, score, &format!("{name}, clone with more rows"))?;
            compare(&q, &keys, &int8_keys, score, &format!("{name}, cloned"))?;
            // Sequences reordered, one of them twice; the longest dropped; then one more row each.
            for sequences in [vec![2, 0, 2, 1], vec![1, 0], vec![1]] {
                let rows =
                    Tensor::new(sequences.iter().map(|b| *b as u32).collect::<Vec<_>>(), &Device::Cpu)?;
                let lengths = sequences.iter().map(|b| keys.lengths[*b]).collect();
                let mut some = Keys { all: keys.all.index_select(&rows, 0)?, lengths };
                let mut selected = int8_keys.select(&sequences)?;
                let q = q.index_select(&rows, 0)?;
                compare(&q, &some, &selected, score, &format!("{name}, {sequences:?}"))?;
                let parts: Result<Vec<_>> =
                    (0..sequences.len()).map(|b| some.part(b, some.lengths[b], 1)).collect();
                selected.append(&Tensor::cat(&parts?, 0)?)?;
                some.lengths.iter_mut().for_each(|length| *length += 1);
                compare(&q, &some, &selected, score, &format!("{name}, {sequences:?}, one more"))?;
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 9);
    Ok(())
}

#[test]
fn overwritten_keys_are_replaced() -> Result<()> {
    let (old, new) = (noise(1, &[2, 2, 70, 9], DType::F32)?, noise(2, &[1, 2, 20, 9], DType::F32)?);
    let mut int8_keys = Int8Keys::new(&old, Score::Energy)?;
    int8_keys.write(&new, &[[1, 25]])?;
    let all = old.slice_assign(&[1..2, 0..2, 25..45, 0..9], &new)?;
    // Queries equal to keys that were overwritten, and to those that replace them.
    let q = Tensor::cat(&[old.narrow(2, 30, 2)?, all.narrow(2, 30, 2)?, all.narrow(2, 24, 1)?], 2)?;
    let keys = Keys { all, lengths: vec![70, 70] };
    let beta = Tensor::ones(2, DType::F32, &Device::Cpu)?;
    let mask = Mask::none();
    let native = Scan::new(&beta, &mask, 2);
    let certified =
        Scan { precision: Precision::Certified, cached: Some((&int8_keys).into()), ..native.clone() };
    let k = keys.tensor()?;
    assert_eq!(bits(&scan(&q, &k, &certified)?)?, bits(&scan(&q, &k, &native)?)?);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let refused = |e: std::result::Result<(), Error>, value: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    let k = noise(1, &[2, 2, 40, 8], DType::F32)?;
    let mut int8_keys = Int8Keys::new(&k, Score::Energy)?;
    let one = k.narrow(0, 0, 1)?.narrow(2, 0, 3)?;
    refused(int8_keys.write(&one, &[[2, 0]]), "sequence 2 of a cache of 2");
    refused(int8_keys.write(&one, &[[1, 41]]), "rows 41..44 of sequence 1, which has 40 rows");
    refused(int8_keys.write(&one, &[[1, 40], [0, 40]]), "2 write positions for 1 entries");
    refused(int8_keys.write(&k, &[[1, 40], [1, 0]]), "sequence 1 is written to twice");
    refused(int8_keys.append(&one), "2 write positions for 1 entries");
    refused(int8_keys.append(&k.narrow(3, 0, 4)?), "[2, 2, 40, 4]");
    refused(int8_keys.append(&k.to_dtype(DType::BF16)?), "BF16");
    refused(int8_keys.select(&[0, 2]).map(|_| ()), "sequence 2 of a cache of 2");
    refused(Int8Keys::stack(&[]).map(|_| ()), "no quantised keys");
    let other = Int8Keys::new(&k, Score::Dot)?;
    refused(Int8Keys::stack(&[&int8_keys, &other]).map(|_| ()), "Dot");
    // The refused calls have not changed the keys.
    assert_eq!(int8_keys.lengths(), [40, 40]);
    // Biases are not cached on the CPU.
    refused(KeyBias::new(&k, Score::Energy).map(|_| ()), "Cpu");
    refused(KeyCache::new(&k, Score::Energy, Precision::Native).map(|_| ()), "Cpu");
    // 8-bit keys of another number of positions than the keys.
    let (beta, mask) = (Tensor::ones(2, DType::F32, &Device::Cpu)?, Mask::none());
    let certified = Scan {
        precision: Precision::Certified,
        cached: Some((&int8_keys).into()),
        ..Scan::new(&beta, &mask, 1)
    };
    let shorter = k.narrow(2, 0, 39)?;
    refused(scan(&k, &shorter, &certified).map(|_| ()), "[2, 2, 40, 8]");
    Ok(())
}
