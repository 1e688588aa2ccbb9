use candle_core::*;
use gd_kernels::*;
fn main() {
    for (n, d) in [(4096usize, 64usize), (4096, 128)] {
        for kk in [1usize, 8] {
            let q = Tensor::randn(0f32, 1., (1, 8, n, d), &Device::Cpu).unwrap();
            let k = Tensor::randn(0f32, 1., (1, 8, n, d), &Device::Cpu).unwrap();
            let beta = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
            let mask = Mask::causal(0);
            for isa in Isa::available().into_iter().take(2) {
                let mut s = Scan::new(&beta, &mask, kk);
                s.backend = Backend::Force(isa);
                let t = std::time::Instant::now();
                let c = scan(&q, &k, &s).unwrap();
                let dt = t.elapsed().as_secs_f64();
                let x: f32 = c
                    .energy
                    .narrow(3, 0, 1)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .min(0)
                    .unwrap()
                    .to_scalar()
                    .unwrap();
                println!(
                    "{isa:?} n {n} d {d} k {kk}: {:.1} ms, {:.1} GF/s {x}",
                    dt * 1e3,
                    (8 * n * n * d) as f64 / dt / 1e9
                );
            }
        }
    }
}
