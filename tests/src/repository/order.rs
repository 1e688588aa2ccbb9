//! The order of the modules of each crate, and where the terms of the field are enforced.

use super::imports::Order;

/// The order of the modules, crate by crate.
pub const ORDERS: &[Order] = &[
    Order {
        sources: "crates/gd-kernels/src/",
        groups: &[
            &["error"],
            &["options"],
            &["mask"],
            &["backend"],
            &["cache"],
            &[
                "ops/adamw",
                "ops/causal_conv",
                "ops/linear",
                "ops/masked_softmax",
                "ops/newton_schulz",
                "ops/quantized_linear",
                "ops/rms_norm",
                "ops/rotary",
                "ops/running_average",
                "ops/swiglu",
            ],
            &["ops/cross_entropy", "ops/feed_forward", "ops/gated_sum", "ops/heads", "ops/softmax_attention"],
            &["ops/scan"],
            &["ops/select"],
            &["ops/decode", "ops/embedding"],
            &["ops/agreement"],
        ],
        isolated: &[("reference", &["error", "options", "mask"])],
    },
    Order {
        sources: "crates/gd-layer/src/",
        groups: &[
            &["adapter_dropout", "config"],
            &["derived", "linear", "mechanisms", "norm", "probe", "rope", "stats", "threshold"],
            &["cache", "query_blocks"],
            &["attention"],
            &["beacon"],
            &["heads"],
            &["gd_attention", "mechanism_attention", "softmax_attention"],
        ],
        isolated: &[],
    },
    Order {
        sources: "crates/gd-model/src/",
        groups: &[
            &["error"],
            &["io/files"],
            &["config"],
            &["io"],
            &["data"],
            &["model"],
            &["eval"],
            &["infer"],
            &["trace"],
            &["train"],
            &["tasks"],
            &["analysis"],
        ],
        isolated: &[],
    },
];

/// Folders whose names must not use a refused word.
pub const TERMS_ENFORCED: &[&str] =
    &["crates/gd-cli/", "crates/gd-kernels/", "crates/gd-layer/", "crates/gd-model/", "crates/gd-python/"];
