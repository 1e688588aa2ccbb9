//! The resident memory of the process and its peak, on Linux; `None` on other systems.

use std::fs;
use std::io::Write;

/// A measurement of the peak of the resident memory from its start on.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    start_mib: f64,
}

impl Peak {
    /// Resets the peak of the process to its resident memory. `None` if the system cannot.
    pub fn start() -> Option<Self> {
        // 5 resets the peak, see proc(5).
        let mut refs = fs::OpenOptions::new().write(true).open("/proc/self/clear_refs").ok()?;
        refs.write_all(b"5").ok()?;
        Some(Self { start_mib: peak()? })
    }

    /// The peak of the resident memory since the start in MiB.
    pub fn mib(self) -> Option<f64> {
        peak()
    }

    /// The peak above the resident memory at the start in MiB.
    pub fn above_start(self) -> Option<f64> {
        Some(peak()? - self.start_mib)
    }
}

/// The resident memory of the process in MiB.
pub fn resident() -> Option<f64> {
    status("VmRSS:")
}

/// The peak of the resident memory in MiB since the start of the process or of the last [`Peak`].
pub fn peak() -> Option<f64> {
    status("VmHWM:")
}

/// A size in /proc/self/status in MiB.
fn status(key: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}
