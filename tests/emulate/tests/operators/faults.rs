//! Seeded faults: each breaks a kernel in one place, and the problems must show it.

use gd_emulate::Emulator;

use crate::Verdict;

/// A fault, what it breaks, and the problems that must show it.
type Fault = (i32, &'static str, fn(&Emulator, u64) -> Verdict);

const FAULTS: &[Fault] = &[
    (1, "causal mask one key short", crate::scan::check),
    (2, "window one key too long", crate::scan::check),
    (3, "packed boundary belongs to the sequence before", crate::scan::check),
    (4, "no wait for the tile while the next is loaded", crate::scan::check),
    (5, "no wait for the last tile", crate::scan::check),
    (6, "no barrier between load and use of a tile", crate::scan::check),
    (7, "stale tile: the other stage is read", crate::scan::check),
    (8, "no barrier before a tile is overwritten", crate::scan::check),
    (9, "mask lets one key more in", crate::scan::check),
    (10, "running maximum keeps the last of equals", crate::scan::check),
    (11, "one lane of a row left out of the maximum", crate::scan::check),
    (12, "no barrier between reading and sorting a list", crate::scan::check),
    (13, "no barrier after a list is sorted", crate::scan::check),
    (14, "lists overflow by 8 entries", crate::scan::check),
    (16, "decode: no wait for a tile", crate::decode::check),
    (17, "decode: no barrier between load and use of a tile", crate::decode::check),
    (18, "decode: half of the lanes of a row left out", crate::decode::check),
    (19, "decode: no barrier before the warps' results are read", crate::decode::check),
    (20, "decode: the first block writes the result, not the last", crate::decode::check),
    (21, "select: ties go the other way", crate::select::check),
    (22, "sort: no barrier before the sums of warps are read", crate::select::check),
    (23, "key gradient: the last reader is left out", crate::select::check),
    (24, "key gradient: a list takes the first part of a piece for its own", crate::select::check),
    (25, "conv: first tap of a packed sequence left out", crate::beacon::check_conv),
    (26, "average: no barrier before the parts of warps are read", crate::beacon::check_average),
    (60, "Hopper: queries are stored without the swizzle", crate::hopper::check),
    (61, "Hopper: no fence between stored queries and products", crate::hopper::check),
    (62, "Hopper: mask lets one key more in", crate::hopper::check),
    (63, "Hopper: running maximum keeps the last of equals", crate::hopper::check),
    (64, "Hopper: half of the lanes of a row left out of the maximum", crate::hopper::check),
    (65, "Hopper: a stage is loaded before it is empty", crate::hopper::check),
    (66, "Hopper: no bytes are expected", crate::hopper::check),
    (67, "Hopper: the bytes of the biases are not expected", crate::hopper::check),
    (68, "Hopper: waits for the wrong parity of a full stage", crate::hopper::check),
    (69, "Hopper: biases of another stage", crate::hopper::check),
    (70, "Hopper: no fence before the first product", crate::hopper::check),
    (71, "Hopper: matrices at half the offset", crate::hopper::check),
    (72, "Hopper: a stage is released before its products are done", crate::hopper::check),
    (73, "Hopper: no wait for a product", crate::hopper::check),
    (74, "Hopper: a warp keeps its registers", crate::hopper::check),
    (75, "Hopper: lists leave out the last group of a tile", crate::hopper::check),
];

/// The first fault of Hopper's kernels.
const HOPPER: i32 = 60;

/// The device that runs the kernels with a fault.
fn broken(seed: u64, fault: i32) -> Emulator {
    let gpu = Emulator::with_fault(seed, fault);
    if fault >= HOPPER { gpu.on_hopper() } else { gpu }
}

#[test]
fn every_fault_is_seen() {
    for &(fault, what, check) in FAULTS {
        let seen = (0..150).find_map(|seed| check(&broken(seed, fault), seed).err().map(|e| (seed, e)));
        match seen {
            Some((seed, e)) => {
                println!("fault {fault}, {what}: problem {seed}: {}", e.chars().take(120).collect::<String>())
            }
            None => panic!("fault {fault}, {what}: nothing was seen"),
        }
    }
    println!("{} faults, all seen", FAULTS.len());
    assert!(FAULTS.len() >= 15);
    gd_support::log_cases("emulated-faults", FAULTS.len());
}
