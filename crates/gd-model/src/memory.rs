//! The process's peak memory since a moment, where the system tells it (Linux).

use std::fs;
use std::io::Write;

/// A peak that counts from its start.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    start: f64,
}

impl Peak {
    /// Forgets what the process needed so far; none where the system cannot.
    pub fn start() -> Option<Self> {
        // 5 resets the peak to what is resident now.
        let mut refs = fs::OpenOptions::new().write(true).open("/proc/self/clear_refs").ok()?;
        refs.write_all(b"5").ok()?;
        Some(Self { start: high_water()? })
    }

    /// Greatest resident memory since the start, MiB.
    pub fn mib(self) -> Option<f64> {
        high_water()
    }

    /// The same, above what was resident at the start.
    pub fn above_start(self) -> Option<f64> {
        Some(high_water()? - self.start)
    }
}

fn high_water() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_peak_counts_what_was_freed_and_a_new_one_does_not() {
        // Systems without the reset have nothing to test.
        let Some(peak) = Peak::start() else { return };
        let block = vec![1u8; 64 << 20];
        assert_eq!(block.iter().map(|&x| usize::from(x)).sum::<usize>(), 64 << 20);
        drop(block);
        assert!(peak.above_start().unwrap() > 60.0, "{peak:?}");
        let next = Peak::start().unwrap();
        assert!(next.above_start().unwrap() < 30.0 && next.mib() < peak.mib().map(|m| m + 60.0), "{next:?}");
    }
}
