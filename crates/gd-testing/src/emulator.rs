//! An emulated GPU: the CUDA and Metal kernels compiled as host C++, one fiber per GPU thread, one block at a time.
//!
//! Schedules are random and seeded, uninitialised memory is NaN, and an access outside of every buffer ends the launch
//! with an error. See `kernels/emulate`.
#![allow(unsafe_code)] // calls into C++

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use gd_kernels::gpu::tensor_map::BOX_BYTES;
use gd_kernels::gpu::{Arch, Constants, Gpu, Launch, Slice, TensorMap};
use gd_kernels::{Error, Result};

#[repr(C)]
struct Field {
    name: *const c_char,
    field: *const c_char,
    value: usize,
}

unsafe extern "C" {
    fn gd_emulate_allocate(bytes: usize, side: u32, pages: *mut *mut c_void, mapped: *mut usize) -> *mut u8;
    fn gd_emulate_free(pages: *mut c_void, mapped: usize);
    fn gd_emulate_registered(position: usize, file: *mut *const c_char) -> *const c_char;
    fn gd_emulate_constants(features: u32, rows: u32);
    fn gd_emulate_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared: u32,
        params: *const u8,
        params_bytes: usize,
        pointers: *const *mut u8,
        count: usize,
        seed: u64,
        fault: c_int,
        text: *mut c_char,
        text_bytes: usize,
    ) -> c_int;
    static gd_fields: Field;
}

/// `TensorMap` of `hopper.h`: sizes and strides from the innermost dimension outwards.
#[repr(C)]
struct Map {
    first: *const u8,
    dims: [u64; 4],
    strides: [u64; 3],
    boxed: [u32; 4],
    element: u32,
}

/// Name, size and (field, offset) of every struct of `params.h`, as C++ lays it out.
pub type Layouts = Vec<(String, usize, Vec<(String, usize)>)>;

/// The layouts of `params.h`.
pub fn layouts() -> Layouts {
    let mut all = Layouts::new();
    // SAFETY: the table is a static array that ends with a null name; its texts are static.
    unsafe {
        let text = |p: *const c_char| CStr::from_ptr(p).to_string_lossy().into_owned();
        let mut at: *const Field = &raw const gd_fields;
        while !(*at).name.is_null() {
            match (all.last_mut(), (*at).field.is_null()) {
                (_, true) => all.push((text((*at).name), (*at).value, Vec::new())),
                (Some(last), false) => last.2.push((text((*at).field), (*at).value)),
                (None, false) => unreachable!("a field before its struct"),
            }
            at = at.add(1);
        }
    }
    all
}

/// Every kernel that the sources define: its symbol, and its source file without folder and extension.
pub fn registered() -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut file = std::ptr::null();
    // SAFETY: the call writes a pointer to `file`; both texts are static and end with 0.
    unsafe {
        let text = |p: *const c_char| CStr::from_ptr(p).to_string_lossy().into_owned();
        loop {
            let name = gd_emulate_registered(all.len(), &raw mut file);
            if name.is_null() {
                return all;
            }
            let stem = Path::new(&text(file)).file_stem().unwrap_or_default().to_string_lossy().into_owned();
            all.push((text(name), stem));
        }
    }
}

/// Memory between two guard pages, initialised to NaN.
#[derive(Debug)]
pub struct Buffer {
    at: *mut u8,
    bytes: usize,
    pages: *mut c_void,
    mapped: usize,
}

impl Buffer {
    /// The bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: `at` points to at least `bytes` mapped bytes, which kernels write only while they run.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// Whether the poison between the buffer and its guard pages is unchanged.
    fn intact(&self) -> bool {
        let page = 4096;
        let (first, last) = (self.pages as usize + page, self.pages as usize + self.mapped - page);
        let clean = |from: usize, to: usize| {
            // SAFETY: within the mapped pages between the two guard pages.
            unsafe { std::slice::from_raw_parts(from as *const u8, to - from) }.iter().all(|&x| x == 0xff)
        };
        clean(first, self.at as usize) && clean(self.at as usize + self.bytes, last)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the pages were mapped for this buffer alone.
        unsafe { gd_emulate_free(self.pages, self.mapped) }
    }
}

/// The emulated GPU.
#[derive(Debug)]
pub struct Emulator {
    arch: Arch,
    seed: AtomicU64,
    fault: i32,
    launches: AtomicUsize,
    downloaded: Mutex<DefaultHasher>,
}

impl Emulator {
    /// A CUDA device whose schedules follow from `seed`.
    pub fn new(seed: u64) -> Self {
        // Few multiprocessors, so that plans split the work of small problems, too.
        Self::with_arch(seed, Arch { compute: 80, shared_bytes: 99 << 10, processors: 8 })
    }

    /// An Apple GPU with 32 KiB of threadgroup memory, which all of them have.
    pub fn metal(seed: u64) -> Self {
        Self::with_arch(seed, Arch { compute: Arch::METAL, shared_bytes: 32 << 10, processors: 8 })
    }

    fn with_arch(seed: u64, arch: Arch) -> Self {
        let (seed, launches) = (AtomicU64::new(seed << 20), AtomicUsize::new(0));
        Self { arch, seed, fault: 0, launches, downloaded: Mutex::default() }
    }

    /// The same device with a seeded fault in its kernels: `GD_FAULT(fault)` is true.
    #[must_use]
    pub fn with_fault(self, fault: i32) -> Self {
        Self { fault, ..self }
    }

    /// A device with the same architecture, other schedules and no faults.
    pub fn twin(&self, seed: u64) -> Self {
        Self::with_arch(seed, self.arch)
    }

    /// The same device with compute capability 9.0 and the 227 KiB of shared memory of a Hopper block.
    #[must_use]
    pub fn on_hopper(self) -> Self {
        Self { arch: Arch { compute: 90, shared_bytes: 227 << 10, ..self.arch }, ..self }
    }

    /// The number of kernels that were launched.
    pub fn launches(&self) -> usize {
        self.launches.load(Relaxed)
    }

    /// A hash of all bytes that were downloaded so far.
    pub fn digest(&self) -> u64 {
        self.hasher().finish()
    }

    fn next(&self) -> u64 {
        self.seed.fetch_add(1, Relaxed) + 1
    }

    fn hasher(&self) -> std::sync::MutexGuard<'_, DefaultHasher> {
        self.downloaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpu for Emulator {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.arch
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let (mut pages, mut mapped) = (std::ptr::null_mut(), 0);
        // SAFETY: writes to the two pointers, which are valid.
        let at = unsafe { gd_emulate_allocate(bytes, self.next() as u32, &mut pages, &mut mapped) };
        if at.is_null() {
            return Err(Error::Unsupported(format!("out of memory: {bytes} bytes")));
        }
        Ok(Buffer { at, bytes, pages, mapped })
    }

    fn zeros(&self, bytes: usize) -> Result<Buffer> {
        self.upload(&vec![0; bytes])
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.allocate(bytes.len())?;
        // SAFETY: the buffer has that many bytes, and no other reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.at, bytes.len()) };
        Ok(buffer)
    }

    fn download(&self, from: Slice<'_, Buffer>, bytes: usize) -> Result<Vec<u8>> {
        let all = from.buffer.bytes();
        match all.get(from.offset..from.offset + bytes) {
            Some(slice) => {
                self.hasher().write(slice);
                Ok(slice.to_vec())
            }
            None => Err(Error::Invalid(format!("{bytes} bytes from {} of {}", from.offset, all.len()))),
        }
    }

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(None, launch)
    }

    fn launch_mapped(&self, map: &TensorMap<'_, Buffer>, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(Some(map), launch)
    }
}

impl Emulator {
    fn start(&self, map: Option<&TensorMap<'_, Buffer>>, launch: &Launch<'_, Buffer>) -> Result<()> {
        let fail = |why: &str| Error::Unsupported(format!("{launch}: {why}"));
        let name = CString::new(launch.kernel.to_string()).map_err(|e| fail(&e.to_string()))?;
        let pointer = |slice: &Option<Slice<'_, Buffer>>| match slice {
            Some(s) if s.offset <= s.buffer.bytes => Ok(s.buffer.at.wrapping_add(s.offset)),
            Some(s) => Err(fail(&format!("offset {} in a buffer of {}", s.offset, s.buffer.bytes))),
            None => Ok(std::ptr::null_mut()),
        };
        let mut pointers = launch.buffers.iter().map(pointer).collect::<Result<Vec<_>>>()?;
        let map = map
            .map(|m| -> Result<Map> {
                let ([batch, heads, rows, dim], [b, h, n]) =
                    (m.dims.map(|n| n as u64), m.strides.map(|n| n as u64));
                let element = m.dtype.size_in_bytes();
                Ok(Map {
                    first: pointer(&Some(m.data))?,
                    dims: [dim, rows, heads, batch],
                    strides: [n, h, b],
                    boxed: [(BOX_BYTES / element) as u32, m.box_rows as u32, 1, 1],
                    element: element as u32,
                })
            })
            .transpose()?;
        // A struct that is passed by value is given by its address.
        if let Some(map) = &map {
            pointers.insert(0, std::ptr::from_ref(map).cast_mut().cast());
        }
        let mut text = [0 as c_char; 512];
        let Constants { features, rows } = launch.constants;
        // SAFETY: sets two thread-local integers.
        unsafe { gd_emulate_constants(features, rows) };
        // SAFETY: every pointer is valid during the call, and an access elsewhere ends the launch with an error.
        let failed = unsafe {
            gd_emulate_launch(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block,
                launch.shared_bytes,
                launch.params.as_ptr(),
                launch.params.len(),
                pointers.as_ptr(),
                pointers.len(),
                self.next(),
                self.fault,
                text.as_mut_ptr(),
                text.len(),
            )
        };
        self.launches.fetch_add(1, Relaxed);
        if failed != 0 {
            // SAFETY: the text ends with 0.
            return Err(fail(&unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy()));
        }
        match launch.buffers.iter().flatten().position(|s| !s.buffer.intact()) {
            Some(index) => Err(fail(&format!("wrote outside of buffer {index}"))),
            None => Ok(()),
        }
    }
}
