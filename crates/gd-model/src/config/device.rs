//! The choice of a device by name: `auto`, `cpu`, `cuda:N` or `metal`.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use candle_core::utils::{cuda_is_available, metal_is_available};

use crate::error::{Error, Result};

/// Environment variables in which launchers of MPI give the number of a process among those on its machine.
const LOCAL_RANK: [&str; 2] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"];

/// A device by name, such as the value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// An accelerator that this build supports and that opens, else the CPU. Of several processes on a machine each
    /// takes the accelerator of its own number.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this number.
    Cuda(usize),
    /// The system's Metal device.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let number = |n: &str| n.parse().map_err(|_| format!("`{n}` is not the number of a CUDA device"));
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "metal" => Ok(Self::Metal),
            "cuda" => Ok(Self::Cuda(0)),
            other => match other.strip_prefix("cuda:") {
                Some(n) => number(n).map(Self::Cuda),
                None => Err("expected auto, cpu, cuda:N or metal".into()),
            },
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device was named and this build or this machine lacks it.
    pub fn open(self) -> Result<Device> {
        let refused = |reason: String| Error::Device { device: self.to_string(), reason };
        let built_without =
            |name: &str| refused(format!("this program was built without {name} support (use --device cpu)"));
        let closed = |e: Error| refused(format!("does not open (--device cpu runs without): {e}"));
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !cuda_is_available() => Err(built_without("CUDA")),
            Self::Metal if !metal_is_available() => Err(built_without("Metal")),
            Self::Cuda(number) => open_cuda(number).map_err(closed),
            Self::Metal => open_metal().map_err(closed),
            Self::Auto => Ok(Self::first_accelerator().unwrap_or(Device::Cpu)),
        }
    }

    /// The accelerator that `auto` takes. If this build supports one that does not open, a warning says so, so that
    /// nobody mistakes a run on the CPU for one on the accelerator.
    fn first_accelerator() -> Option<Device> {
        let choice = match (cuda_is_available(), metal_is_available()) {
            (true, _) => Self::Cuda(local_rank()),
            (false, true) => Self::Metal,
            (false, false) => return None,
        };
        choice.open().map_err(|e| tracing::warn!("running on the CPU: {e}")).ok()
    }
}

/// The number of this process among those that `mpirun` has started on this machine; 0 without `mpirun`.
fn local_rank() -> usize {
    LOCAL_RANK.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize) -> Result<Device> {
    Ok(gd_kernels::cuda::open(number)?)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(number: usize) -> Result<Device> {
    Ok(Device::new_cuda(number)?)
}

#[cfg(feature = "metal")]
fn open_metal() -> Result<Device> {
    Ok(gd_kernels::metal::open()?)
}

#[cfg(not(feature = "metal"))]
fn open_metal() -> Result<Device> {
    Ok(Device::new_metal(0)?)
}

/// The name of an open device, which parses to a [`DeviceChoice`].
pub fn name(device: &Device) -> String {
    use candle_core::DeviceLocation::{Cpu, Cuda, Metal};
    match device.location() {
        Cpu => DeviceChoice::Cpu.to_string(),
        Cuda { gpu_id } => DeviceChoice::Cuda(gpu_id).to_string(),
        Metal { .. } => DeviceChoice::Metal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_to_devices_and_back() {
        for s in ["auto", "cpu", "metal", "cuda:0", "cuda:13"] {
            assert_eq!(s.parse::<DeviceChoice>().map(|d| d.to_string()).as_deref(), Ok(s));
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for s in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(s.parse::<DeviceChoice>().is_err(), "{s:?} was accepted");
        }
    }

    #[test]
    fn a_device_that_is_missing_is_named() {
        let e = DeviceChoice::Cuda(999).open().unwrap_err().to_string();
        let why = if cuda_is_available() { "does not open" } else { "without CUDA" };
        assert!(e.contains("cuda:999") && e.contains(why) && e.contains("--device cpu"), "{e}");
        assert!(DeviceChoice::Auto.open().is_ok());
    }
}
