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
    (60, "8-bit keys: bounds four times too tight", crate::decode::check_certified),
    (61, "8-bit keys: bounds of another tile's keys", crate::decode::check_certified),
    (62, "8-bit keys: a full list is thrown away", crate::decode::check_certified),
    (64, "8-bit keys: a key beyond the mask raises the bar", crate::decode::check_certified),
    (65, "8-bit keys: candidates for which there is no room are lost", crate::decode::check_certified),
    (68, "refinement: rows that abstained go on", crate::rounds::check),
    (67, "prior gradient: all heads take that of the first", crate::select::check),
];

#[test]
fn every_fault_is_seen() {
    for &(fault, what, check) in FAULTS {
        let seen = (0..150)
            .find_map(|seed| check(&Emulator::with_fault(seed, fault), seed).err().map(|e| (seed, e)));
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
