//! In tests, what a GPU's module is elsewhere: its kernels run on the CPU (emulated_gpu.cpp), over host memory.

use std::{
    ffi::{CStr, c_char, c_void},
    sync::{Mutex, PoisonError},
};

use tch::Device;

use super::NoCuda;

#[expect(unsafe_code, reason = "emulated_gpu.cpp")]
unsafe extern "C" {
    fn relora_emulate_gpu(kind: i32, name: *const c_char, num_blocks: u32, arguments: *mut *mut c_void) -> bool;
}

/// One kernel runs at a time.
static TURN: Mutex<()> = Mutex::new(());

pub struct Module {
    kind: i32,
}

impl Module {
    pub fn compile(_: i32, _: &str, macros: &[(&str, &str)], _: u32) -> Result<Self, NoCuda> {
        let kind = (0..).zip(["float", "double", "bf16"]).find(|(_, name)| macros.contains(&("PRODUCT_TYPE", name)));
        Ok(Self { kind: kind.expect("a kind of products").0 })
    }

    /// # Panics
    /// If there is no such kernel.
    ///
    /// # Safety
    /// The arguments are the addresses of what the kernel takes, of its types and in its order.
    #[expect(unsafe_code, reason = "calls emulated_gpu.cpp")]
    pub unsafe fn launch(&self, kernel: &CStr, num_blocks: u32, arguments: &mut [*mut c_void]) {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's.
        let is_known = unsafe { relora_emulate_gpu(self.kind, kernel.as_ptr(), num_blocks, arguments.as_mut_ptr()) };
        assert!(is_known, "there is no kernel {kernel:?}");
    }
}

/// Work that is done again.
pub struct Graph;

impl Graph {
    pub fn record(_: Device, work: &mut dyn FnMut()) -> Result<Self, NoCuda> {
        work();
        Ok(Self)
    }

    pub fn launch(&self, again: impl FnOnce()) {
        again();
    }
}
