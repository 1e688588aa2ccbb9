//! Which device a command runs on: `auto`, `cpu`, `cuda:N` or `metal`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_core::utils::{cuda_is_available, metal_is_available};

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first accelerator that this build supports and that opens (of several processes on a machine,
    /// each takes the one of its own number), else the CPU.
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

    fn from_str(s: &str) -> Result<Self, String> {
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
    /// Says what is missing when the device was named and this build or this machine lacks it.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !cuda_is_available() => {
                bail!("device {self}: this program was built without CUDA support (use --device cpu)")
            }
            Self::Metal if !metal_is_available() => {
                bail!("device {self}: this program was built without Metal support (use --device cpu)")
            }
            Self::Cuda(n) => open_cuda(n)
                .with_context(|| format!("device {self} does not open (--device cpu runs without)")),
            Self::Metal => open_metal()
                .with_context(|| format!("device {self} does not open (--device cpu runs without)")),
            Self::Auto => Ok(Self::first_accelerator().unwrap_or(Device::Cpu)),
        }
    }

    /// The accelerator that `auto` takes. One that is built in but does not open is named in the
    /// log, so that nobody takes a slow run on the CPU for a fast one.
    fn first_accelerator() -> Option<Device> {
        let choice = match (cuda_is_available(), metal_is_available()) {
            (true, _) => Self::Cuda(crate::train::parallel::local_rank()),
            (false, true) => Self::Metal,
            (false, false) => return None,
        };
        choice.open().map_err(|e| tracing::warn!("running on the CPU: {e:#}")).ok()
    }
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

/// The name of an open device, as `--device` spells it.
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
        let e = format!("{:#}", DeviceChoice::Cuda(999).open().unwrap_err());
        let why = if cuda_is_available() { "does not open" } else { "without CUDA" };
        assert!(e.contains("cuda:999") && e.contains(why) && e.contains("--device cpu"), "{e}");
        assert!(DeviceChoice::Auto.open().is_ok());
    }
}
