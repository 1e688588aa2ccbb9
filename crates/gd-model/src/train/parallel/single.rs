//! A group of one process.

use candle_core::{Result, Tensor};

use super::Communicator;

pub(super) struct Single;

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn sum(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn gather(&self, own: &[u8]) -> Vec<u8> {
        own.to_vec()
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}
