//! The kernels that launch code names are those that the sources define.

use std::collections::BTreeSet;

use gd_kernels::gpu::Kernel;
use gd_testing::registered;

#[test]
fn launch_code_and_sources_have_the_same_kernels() {
    let named: BTreeSet<_> = Kernel::all().iter().map(|k| (k.to_string(), k.source())).collect();
    let defined: BTreeSet<_> = registered().into_iter().collect();
    assert!(defined.len() >= 250, "{} kernels", defined.len());
    let missing: Vec<_> = named.difference(&defined).collect();
    let unnamed: Vec<_> = defined.difference(&named).collect();
    assert!(missing.is_empty() && unnamed.is_empty(), "not defined: {missing:?}; not named: {unnamed:?}");
}
