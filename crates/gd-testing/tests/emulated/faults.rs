//! Seeded faults: each breaks a kernel in one place, and some generated problem must fail because of it.

use crate::target::TestGpu;

use gd_testing::suite::Verdict;

/// The number of a fault, what it breaks, and the check that must detect it.
type Fault = (i32, &'static str, fn(&TestGpu, u64) -> Verdict);

/// Faults of `kernels/shared`, which CUDA and Metal both compile.
const SHARED_FAULTS: &[Fault] = &[
    (1, "the causal mask hides one key too many", crate::scan::check),
    (2, "the window shows one key too many", crate::scan::check),
    (3, "the token at a packed boundary belongs to the previous sequence", crate::scan::check),
    (12, "no barrier between reading and writing a list in its sort", crate::scan::check),
    (13, "no barrier after a list is sorted", crate::scan::check),
    (21, "select: ties are broken in the opposite order", crate::select::check),
    (22, "sort: no barrier before the sums of warps or simdgroups are read", crate::select::check),
    (23, "key gradient: the last reader is omitted", crate::select::check),
    (24, "key gradient: a segment reads the partial sum of the segment before it", crate::select::check),
    (25, "conv: the first tap of a packed sequence is omitted", crate::beacon::check_conv),
    (
        26,
        "average: no barrier before the partial results of warps or simdgroups are read",
        crate::beacon::check_average,
    ),
    (40, "norm: no barrier before the factors of rows are read", crate::training::check_norm),
    (41, "norm: the last partial sum of the weight gradient is omitted", crate::training::check_norm),
    (42, "rotary: the backward pass rotates by the positive angle", crate::training::check_rotary),
    (43, "swiglu: the second term of the gradient of the gate is omitted", crate::training::check_swiglu),
    (44, "clip: no barrier before the sums of threads are read", crate::training::check_adamw),
    (45, "clip: no update is skipped", crate::training::check_adamw),
    (46, "adamw: a skipped update advances the step number", crate::training::check_adamw),
    (47, "adamw: the parameter is not the rounded master weight", crate::training::check_adamw),
    (
        48,
        "cross entropy: no barrier before the sums of threads are read",
        crate::training::check_cross_entropy,
    ),
    (49, "cross entropy: ignored rows have a gradient", crate::training::check_cross_entropy),
    (87, "prior gradient: all heads get that of the first head", crate::select::check),
    (88, "refinement: rows that abstained keep their candidates", crate::rounds::check),
    (89, "rows with a large common offset are not ranked by differences", crate::scan::check_offset),
    (90, "candidates whose energies overflow are in the order of their keys", crate::overflow::check),
    (91, "select: of energies that overflow, ties are broken by keys", crate::overflow::check),
];

/// Faults of `kernels/cuda`.
const CUDA_FAULTS: &[Fault] = &[
    (4, "no wait for the tile while the next is loaded", crate::scan::check),
    (5, "no wait for the last tile", crate::scan::check),
    (6, "no barrier between load and use of a tile", crate::scan::check),
    (7, "stale tile: the wrong stage is read", crate::scan::check),
    (8, "no barrier before a tile is overwritten", crate::scan::check),
    (9, "the mask shows one key too many", crate::scan::check),
    (10, "the running maximum takes the last of equal scores", crate::scan::check),
    (11, "one lane of a row is omitted from the maximum", crate::scan::check),
    (14, "lists exceed their capacity by 8 entries", crate::scan::check),
    (16, "decode: no wait for a tile", crate::decode::check),
    (17, "decode: no barrier between load and use of a tile", crate::decode::check),
    (18, "decode: half of the lanes of a row are omitted", crate::decode::check),
    (19, "decode: no barrier before the warps' results are read", crate::decode::check),
    (20, "decode: the first block writes the result instead of the last", crate::decode::check),
    (80, "8-bit keys: error bounds are a quarter of their value", crate::decode::check_certified),
    (81, "8-bit keys: bounds of the keys of another tile", crate::decode::check_certified),
    (82, "8-bit keys: a full list is discarded", crate::decode::check_certified),
    (84, "8-bit keys: a masked key raises the threshold", crate::decode::check_certified),
    (
        85,
        "8-bit keys: candidates beyond the capacity of the workspace are discarded",
        crate::decode::check_certified,
    ),
    (140, "8-bit scan: error bounds are a tenth of their value", crate::certified::check),
    (141, "8-bit scan: no wait for the tile while the next is loaded", crate::certified::check),
    (142, "8-bit scan: stale tile, the wrong stage is read", crate::certified::check),
    (143, "8-bit scan: a full list is discarded", crate::certified::check_adverse),
    (144, "8-bit scan: the scale of the neighbouring row", crate::certified::check),
    (145, "8-bit scan: the threshold of another row", crate::certified::check),
    (146, "8-bit scan: bounds of the keys of another tile", crate::certified::check),
    (147, "8-bit scan: the final lists are ordered by upper bounds", crate::certified::check),
    (148, "8-bit scan: the mask shows one key too many", crate::certified::check),
    (149, "8-bit scan: no barrier between load and use of a tile", crate::certified::check),
    (150, "8-bit scan: no barrier before a tile is overwritten", crate::certified::check),
];

/// Faults of the kernels for Hopper.
const HOPPER_FAULTS: &[Fault] = &[
    (60, "queries are stored without the swizzle", crate::hopper::check),
    (61, "no fence between stored queries and products", crate::hopper::check),
    (62, "the mask shows one key too many", crate::hopper::check),
    (63, "the running maximum takes the last of equal scores", crate::hopper::check),
    (64, "half of the lanes of a row are omitted from the maximum", crate::hopper::check),
    (65, "a stage is loaded before it is empty", crate::hopper::check),
    (66, "the barrier of a stage expects no bytes", crate::hopper::check),
    (67, "the barrier of a stage does not expect the bytes of the biases", crate::hopper::check),
    (68, "the wait for a full stage has the wrong parity", crate::hopper::check),
    (69, "biases of another stage", crate::hopper::check),
    (70, "no fence before the first product", crate::hopper::check),
    (71, "matrix descriptors advance by half the offset", crate::hopper::check),
    (72, "a stage is released before its products are done", crate::hopper::check),
    (73, "no wait for a product", crate::hopper::check),
    (74, "a warp of the producer does not release its registers", crate::hopper::check),
    (75, "lists omit the last group of a tile", crate::hopper::check),
];

/// Faults of `kernels/metal`.
const METAL_FAULTS: &[Fault] = &[
    (101, "no barrier before a tile is overwritten", crate::scan::check),
    (102, "no barrier between load and use of a tile", crate::scan::check),
    (103, "no barrier between load and use of the queries", crate::scan::check),
    (104, "no barrier between the matrix product and the reading of its scores", crate::scan::check),
    (105, "the mask shows one key too many", crate::scan::check),
    (106, "the running maximum takes the last of equal scores", crate::scan::check),
    (107, "one lane of a row is omitted from the maximum", crate::scan::check),
    (110, "lists exceed their capacity by 8 entries", crate::scan::check),
    (111, "decode: no barrier between load and use of the queries", crate::decode::check),
    (112, "decode: the last tile of a split is omitted", crate::decode::check),
    (113, "decode: half of the dimensions of a key are omitted from a score", crate::decode::check),
    (114, "decode: half of the keys of a simdgroup are omitted", crate::decode::check),
    (115, "decode: no barrier before the simdgroups' results are read", crate::decode::check),
    (116, "decode: the last split is omitted", crate::decode::check),
];

/// Fails unless at least one of 150 problems detects each fault; counts the faults under `log`.
fn assert_all_detected(log: &str, faults: &[&[Fault]], device: fn(u64) -> TestGpu) {
    let faults = faults.concat();
    for &(fault, what, check) in &faults {
        let detected =
            (0..150).find_map(|seed| check(&device(seed).with_fault(fault), seed).err().map(|e| (seed, e)));
        match detected {
            Some((seed, e)) => {
                println!("fault {fault}, {what}: problem {seed}: {}", e.chars().take(120).collect::<String>())
            }
            None => panic!("fault {fault}, {what}: no problem detects it"),
        }
    }
    println!("{} faults, all detected", faults.len());
    assert!(faults.len() >= 15);
    gd_testing::log_cases(log, faults.len());
}

#[test]
fn every_fault_is_detected() {
    assert_all_detected("emulated-faults", &[SHARED_FAULTS, CUDA_FAULTS], TestGpu::new);
}

#[test]
fn every_fault_is_detected_on_hopper() {
    assert_all_detected("emulated-faults", &[HOPPER_FAULTS], |seed| TestGpu::new(seed).on_hopper());
}

#[test]
fn every_fault_is_detected_on_metal() {
    assert_all_detected("emulated-metal-faults", &[SHARED_FAULTS, METAL_FAULTS], TestGpu::metal);
}
