//! Seeded faults: each breaks a kernel in one place, and the problems must show it.

use crate::target::TestGpu;

use gd_testing::suite::Verdict;

/// A fault, what it breaks, and the problems that must show it.
type Fault = (i32, &'static str, fn(&TestGpu, u64) -> Verdict);

/// Those of bodies in `kernels/shared`, which CUDA and Metal have both.
const SHARED_FAULTS: &[Fault] = &[
    (1, "causal mask one key short", crate::scan::check),
    (2, "window one key too long", crate::scan::check),
    (3, "packed boundary belongs to the sequence before", crate::scan::check),
    (12, "no barrier between reading and sorting a list", crate::scan::check),
    (13, "no barrier after a list is sorted", crate::scan::check),
    (21, "select: ties go the other way", crate::select::check),
    (22, "sort: no barrier before the sums of warps or simdgroups are read", crate::select::check),
    (23, "key gradient: the last reader is left out", crate::select::check),
    (24, "key gradient: a list takes the first part of a piece for its own", crate::select::check),
    (25, "conv: first tap of a packed sequence left out", crate::beacon::check_conv),
    (
        26,
        "average: no barrier before the parts of warps or simdgroups are read",
        crate::beacon::check_average,
    ),
    (40, "norm: no barrier before the factors of rows are read", crate::training::check_norm),
    (41, "norm: the last part of the weight's gradient left out", crate::training::check_norm),
    (42, "rotary: the backward pass turns forwards", crate::training::check_rotary),
    (43, "swiglu: the gate's gradient without its second term", crate::training::check_swiglu),
    (44, "clip: no barrier before the sums of threads are read", crate::training::check_adamw),
    (45, "clip: no update is skipped", crate::training::check_adamw),
    (46, "adamw: a skipped update counts", crate::training::check_adamw),
    (47, "adamw: the parameter does not follow its master", crate::training::check_adamw),
    (
        48,
        "cross entropy: no barrier before the sums of threads are read",
        crate::training::check_cross_entropy,
    ),
    (49, "cross entropy: rows that do not count have a gradient", crate::training::check_cross_entropy),
    (87, "prior gradient: all heads take that of the first", crate::select::check),
    (88, "refinement: rows that abstained go on", crate::rounds::check),
];

/// CUDA's own.
const FAULTS: &[Fault] = &[
    (4, "no wait for the tile while the next is loaded", crate::scan::check),
    (5, "no wait for the last tile", crate::scan::check),
    (6, "no barrier between load and use of a tile", crate::scan::check),
    (7, "stale tile: the other stage is read", crate::scan::check),
    (8, "no barrier before a tile is overwritten", crate::scan::check),
    (9, "mask lets one key more in", crate::scan::check),
    (10, "running maximum keeps the last of equals", crate::scan::check),
    (11, "one lane of a row left out of the maximum", crate::scan::check),
    (14, "lists overflow by 8 entries", crate::scan::check),
    (16, "decode: no wait for a tile", crate::decode::check),
    (17, "decode: no barrier between load and use of a tile", crate::decode::check),
    (18, "decode: half of the lanes of a row left out", crate::decode::check),
    (19, "decode: no barrier before the warps' results are read", crate::decode::check),
    (20, "decode: the first block writes the result, not the last", crate::decode::check),
    (80, "8-bit keys: bounds four times too tight", crate::decode::check_certified),
    (81, "8-bit keys: bounds of another tile's keys", crate::decode::check_certified),
    (82, "8-bit keys: a full list is thrown away", crate::decode::check_certified),
    (84, "8-bit keys: a key beyond the mask raises the bar", crate::decode::check_certified),
    (85, "8-bit keys: candidates for which there is no room are lost", crate::decode::check_certified),
    (140, "8-bit scan: bounds ten times too tight", crate::certified::check),
    (141, "8-bit scan: no wait for the tile while the next is loaded", crate::certified::check),
    (142, "8-bit scan: stale tile, the other stage is read", crate::certified::check),
    (143, "8-bit scan: a full list is thrown away", crate::certified::check_adverse),
    (144, "8-bit scan: the scale of the row beside", crate::certified::check),
    (145, "8-bit scan: the bar of another row", crate::certified::check),
    (146, "8-bit scan: bounds of another tile's keys", crate::certified::check),
    (147, "8-bit scan: upper bounds decide at the end", crate::certified::check),
    (148, "8-bit scan: mask lets one key more in", crate::certified::check),
    (149, "8-bit scan: no barrier between load and use of a tile", crate::certified::check),
    (150, "8-bit scan: no barrier before a tile is overwritten", crate::certified::check),
];

/// Those of Hopper's kernels.
const HOPPER_FAULTS: &[Fault] = &[
    (60, "queries are stored without the swizzle", crate::hopper::check),
    (61, "no fence between stored queries and products", crate::hopper::check),
    (62, "mask lets one key more in", crate::hopper::check),
    (63, "running maximum keeps the last of equals", crate::hopper::check),
    (64, "half of the lanes of a row left out of the maximum", crate::hopper::check),
    (65, "a stage is loaded before it is empty", crate::hopper::check),
    (66, "no bytes are expected", crate::hopper::check),
    (67, "the bytes of the biases are not expected", crate::hopper::check),
    (68, "waits for the wrong parity of a full stage", crate::hopper::check),
    (69, "biases of another stage", crate::hopper::check),
    (70, "no fence before the first product", crate::hopper::check),
    (71, "matrices at half the offset", crate::hopper::check),
    (72, "a stage is released before its products are done", crate::hopper::check),
    (73, "no wait for a product", crate::hopper::check),
    (74, "a warp keeps its registers", crate::hopper::check),
    (75, "lists leave out the last group of a tile", crate::hopper::check),
];

/// Metal's own.
const METAL_FAULTS: &[Fault] = &[
    (101, "no barrier before a tile is overwritten", crate::scan::check),
    (102, "no barrier between load and use of a tile", crate::scan::check),
    (103, "no barrier between load and use of the queries", crate::scan::check),
    (104, "no barrier between the matrix product and the search", crate::scan::check),
    (105, "mask lets one key more in", crate::scan::check),
    (106, "the last of equals stays", crate::scan::check),
    (107, "one lane of a row left out of the maximum", crate::scan::check),
    (110, "lists overflow by 8 entries", crate::scan::check),
    (111, "decode: no barrier between load and use of the queries", crate::decode::check),
    (112, "decode: last tile of a split left out", crate::decode::check),
    (113, "decode: half of a key left out of a score", crate::decode::check),
    (114, "decode: half of the keys of a simdgroup left out", crate::decode::check),
    (115, "decode: no barrier before the simdgroups' results are read", crate::decode::check),
    (116, "decode: the last split is left out", crate::decode::check),
];

/// Fails unless some of the problems shows each fault; counts them under `log`.
fn all_are_seen(log: &str, faults: &[&[Fault]], device: fn(u64) -> TestGpu) {
    let faults = faults.concat();
    for &(fault, what, check) in &faults {
        let seen =
            (0..150).find_map(|seed| check(&device(seed).with_fault(fault), seed).err().map(|e| (seed, e)));
        match seen {
            Some((seed, e)) => {
                println!("fault {fault}, {what}: problem {seed}: {}", e.chars().take(120).collect::<String>())
            }
            None => panic!("fault {fault}, {what}: nothing was seen"),
        }
    }
    println!("{} faults, all seen", faults.len());
    assert!(faults.len() >= 15);
    gd_testing::log_cases(log, faults.len());
}

#[test]
fn every_fault_is_seen() {
    all_are_seen("emulated-faults", &[SHARED_FAULTS, FAULTS], TestGpu::new);
}

#[test]
fn every_fault_is_seen_on_hopper() {
    all_are_seen("emulated-faults", &[HOPPER_FAULTS], |seed| TestGpu::new(seed).on_hopper());
}

#[test]
fn every_fault_is_seen_on_metal() {
    all_are_seen("emulated-metal-faults", &[SHARED_FAULTS, METAL_FAULTS], TestGpu::metal);
}
