//! The results of a benchmark, as JSON and as one table per shape and pass.

use candle_core::DType;
use comfy_table::TableStyle;
use serde::Serialize;

use super::shape::{Pass, Shape, Work, median};
use crate::render::table::plain_table;

/// The results of a benchmark.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) device: String,
    /// Data type of q, k and v.
    pub(super) dtype: &'static str,
    pub(super) machine: Machine,
    pub(super) repeats: usize,
    pub(super) seed: u64,
    pub(super) results: Vec<Line>,
}

/// The machine that was measured.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) threads: usize,
    pub(super) compiled_for: &'static str,
    /// Rate of a matrix product, median over the shapes and passes.
    pub(super) gemm_gflops: f64,
}

/// The vector instructions that the compiler could use. The kernels of this repository and the matrix product select
/// theirs at run time, but most of candle does so at compile time.
pub(super) fn compiled_for() -> &'static str {
    if cfg!(target_feature = "avx512f") {
        "AVX-512"
    } else if cfg!(target_feature = "avx2") {
        "AVX2"
    } else if cfg!(target_feature = "neon") {
        "NEON"
    } else {
        "any CPU"
    }
}

/// The result of one contender for one shape and pass. A value that was not measured is `None`.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) pass: Pass,
    pub(super) shape: Shape,
    pub(super) contender: &'static str,
    /// Why the contender was not run.
    pub(super) skipped: Option<String>,
    pub(super) median_s: Option<f64>,
    pub(super) min_s: Option<f64>,
    /// Time relative to the baseline of the pass.
    pub(super) ratio: Option<f64>,
    /// Minimal operations per second.
    pub(super) gflops: Option<f64>,
    /// `gflops` relative to the matrix product.
    pub(super) gemm_share: Option<f64>,
    /// Minimal bytes per second (decode).
    pub(super) gbps: Option<f64>,
    /// `gbps` relative to the read rate (decode).
    pub(super) read_share: Option<f64>,
    /// Peak memory in addition to the inputs.
    pub(super) peak_mib: Option<f64>,
    /// Number of selected rows, and how many of them differ from those of the baseline. Near ties can differ.
    pub(super) rows: Option<usize>,
    pub(super) winners_differ: Option<usize>,
    /// Share of the visible pairs that were scored in full precision.
    pub(super) rescored: Option<f64>,
    /// Rate of candle's matrix product, measured in the same rounds.
    pub(super) gemm_gflops: f64,
    /// Rate at which a buffer of the size of K is summed, measured in the same rounds (decode).
    pub(super) read_gbps: Option<f64>,
}

impl Line {
    pub(super) fn new(
        pass: Pass,
        shape: Shape,
        contender: &'static str,
        gemm_gflops: f64,
        read_gbps: Option<f64>,
    ) -> Self {
        Self {
            pass,
            shape,
            contender,
            skipped: None,
            median_s: None,
            min_s: None,
            ratio: None,
            gflops: None,
            gemm_share: None,
            gbps: None,
            read_share: None,
            peak_mib: None,
            rows: None,
            winners_differ: None,
            rescored: None,
            gemm_gflops,
            read_gbps,
        }
    }

    /// Sets the values that depend on the time. `seconds` has one value per round; `baseline` is the median time of
    /// the baseline.
    pub(super) fn set_time(&mut self, work: Work, dtype: DType, seconds: &[f64], baseline: Option<f64>) {
        let time = median(seconds);
        let gflops = work.flops(self.shape, self.pass) / time / 1e9;
        self.median_s = Some(time);
        self.min_s = seconds.iter().copied().reduce(f64::min);
        self.ratio = baseline.map(|b| time / b);
        self.gflops = Some(gflops);
        self.gemm_share = Some(gflops / self.gemm_gflops);
        if self.pass == Pass::Decode {
            let gbps = work.bytes(self.shape, dtype) / time / 1e9;
            self.gbps = Some(gbps);
            self.read_share = self.read_gbps.map(|r| gbps / r);
        }
    }

    /// The cells of the row in the table.
    fn cells(&self) -> Vec<String> {
        if let Some(reason) = &self.skipped {
            return vec![self.contender.to_owned(), reason.clone()];
        }
        let cell = |x: Option<f64>, digits| x.map_or(String::new(), |x| format!("{x:.digits$}"));
        let percent = |x: Option<f64>| x.map_or(String::new(), |x| format!("{:.0} %", 100.0 * x));
        let ms = |x: Option<f64>| cell(x.map(|s| 1e3 * s), 3);
        let mut cells = vec![
            self.contender.to_owned(),
            ms(self.median_s),
            ms(self.min_s),
            cell(self.ratio, 2),
            cell(self.gflops, 1),
            percent(self.gemm_share),
        ];
        if self.pass == Pass::Decode {
            cells.extend([cell(self.gbps, 1), percent(self.read_share)]);
        }
        cells.push(self.rescored.map_or(String::new(), |x| format!("{:.2} %", 100.0 * x)));
        cells.push(cell(self.peak_mib, 1));
        cells
    }
}

impl Report {
    /// One table per shape and pass, below a line with the rates of the machine.
    pub(super) fn tables(&self, style: TableStyle) -> String {
        let same_group = |a: &Line, b: &Line| (a.pass, a.shape) == (b.pass, b.shape);
        let mut parts = Vec::new();
        for lines in self.results.chunk_by(same_group) {
            let first = &lines[0];
            let read = first.read_gbps.map_or(String::new(), |r| format!(", plain read {r:.1} GB/s"));
            let ratio = format!("to {}", first.pass.baseline());
            let mut header = vec!["contender", "median ms", "min ms", &ratio, "GF/s", "of GEMM"];
            if first.pass == Pass::Decode {
                header.extend(["GB/s", "of read"]);
            }
            header.extend(["rescored", "peak MiB"]);
            let mut table = plain_table(style, &header);
            for line in lines {
                let mut cells = line.cells();
                cells.resize(header.len(), String::new());
                table.add_row(cells);
            }
            let Machine { threads, compiled_for, .. } = self.machine;
            parts.push(format!(
                "{} {} on {threads} threads, compiled for {compiled_for}: GEMM {:.1} GF/s{read}\n{table}",
                first.pass, first.shape, first.gemm_gflops
            ));
        }
        parts.join("\n\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::table::MARKDOWN;

    #[test]
    fn tables_contain_rates_shares_and_skipped_contenders() {
        let shape = Shape { batch: 1, heads: 1, len: 1000, dim: 50 };
        let line = |contender| Line::new(Pass::Decode, shape, contender, 2.0, Some(10.0));
        let mut ours = line("ours");
        ours.set_time(Work::Select, DType::F32, &[4e-4, 1e-4, 2e-4], Some(1e-4));
        assert_eq!((ours.median_s, ours.min_s, ours.ratio), (Some(2e-4), Some(1e-4), Some(2.0)));
        // 100,000 operations and 200,000 bytes.
        let near = |x: Option<f64>, y: f64| x.is_some_and(|x| (x - y).abs() < 1e-9);
        assert!(near(ours.gflops, 0.5) && near(ours.gemm_share, 0.25), "{ours:?}");
        assert!(near(ours.gbps, 1.0) && near(ours.read_share, 0.1), "{ours:?}");
        let skipped = Line { skipped: Some("too large".into()), ..line("theirs") };
        let other = Line::new(Pass::Fwd, shape, "ours", 2.0, None);
        let report = Report {
            device: "cpu".into(),
            dtype: "f32",
            machine: Machine { threads: 2, compiled_for: "any CPU", gemm_gflops: 2.0 },
            repeats: 3,
            seed: 0,
            results: vec![ours, skipped, other],
        };
        let text = report.tables(MARKDOWN);
        assert!(text.contains("plain read 10.0 GB/s") && text.contains("too large"), "{text}");
        assert!(text.contains("0.200") && text.contains("25 %") && text.contains("10 %"), "{text}");
        assert_eq!(text.matches("| contender").count(), 2, "{text}");
    }
}
