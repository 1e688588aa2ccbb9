//! The process's memory, and its peak since a moment, where the system tells it (Linux).

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
        Some(Self { start: peak()? })
    }

    /// Greatest resident memory since the start, MiB.
    pub fn mib(self) -> Option<f64> {
        peak()
    }

    /// The same, above what was resident at the start.
    pub fn above_start(self) -> Option<f64> {
        Some(peak()? - self.start)
    }
}

/// Resident memory of the process now, MiB.
pub fn resident() -> Option<f64> {
    status("VmRSS:")
}

/// Its greatest value, MiB, since the process or the last [`Peak`] started.
pub fn peak() -> Option<f64> {
    status("VmHWM:")
}

fn status(key: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}
