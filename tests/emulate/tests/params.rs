//! The params structs of Rust and C++ are the same bytes.

use gd_emulate::layouts;
use gd_kernels::gpu::params::ALL;

#[test]
fn every_offset_is_the_same() {
    let own: Vec<_> = ALL
        .iter()
        .map(|(name, size, fields)| {
            let fields = fields.iter().map(|(f, at)| ((*f).to_owned(), *at)).collect::<Vec<_>>();
            ((*name).to_owned(), *size, fields)
        })
        .collect();
    assert!(own.len() >= 3 && own.iter().all(|(_, size, fields)| fields.len() * 4 <= *size));
    assert_eq!(layouts(), own);
}
