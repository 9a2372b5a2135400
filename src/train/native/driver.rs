//! The CUDA driver, asked before libtorch is: it says which GPUs there are, and why none can be used.

use std::ffi::{CStr, c_char};

use libloading::{Library, Symbol};

use super::NoCuda;

const LIBRARY: &str = "libcuda.so.1";

/// What the libraries of this libtorch need: CUDA 13.0, in the driver's way to count.
const LEAST_VERSION: i32 = 13_000;

/// 0 for success.
type Status = i32;

/// The driver, initialised, with the functions that are asked for.
pub struct Driver {
    library: Library,
}

impl Driver {
    pub fn open() -> Result<Self, NoCuda> {
        // SAFETY: the library's initialisers are the driver's.
        #[expect(unsafe_code, reason = "dlopen runs foreign initialisers")]
        let opened = unsafe { Library::new(LIBRARY) };
        let driver = match opened {
            Ok(library) => Self { library },
            Err(error) => return Err(not_opened(&error.to_string())),
        };
        check_version(driver.version()?)?;
        driver.init()?;
        Ok(driver)
    }

    fn version(&self) -> Result<i32, NoCuda> {
        let mut version = 0;
        // SAFETY: the signature is the CUDA driver API's, stable since its first version.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe {
            let get: Symbol<'_, unsafe extern "C" fn(*mut i32) -> Status> = self.find(b"cuDriverGetVersion\0")?;
            get(&mut version)
        };
        self.check("cuDriverGetVersion", status).map(|()| version)
    }

    fn init(&self) -> Result<(), NoCuda> {
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe {
            let init: Symbol<'_, unsafe extern "C" fn(u32) -> Status> = self.find(b"cuInit\0")?;
            init(0)
        };
        self.check("cuInit", status)
    }

    /// The name of a GPU.
    pub fn gpu_name(&self, index: i32) -> Result<String, NoCuda> {
        let device = self.device(index)?;
        let mut name = [0u8; 128];
        // SAFETY: as above; the buffer's length is passed.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe {
            let get: Symbol<'_, unsafe extern "C" fn(*mut u8, i32, i32) -> Status> = self.find(b"cuDeviceGetName\0")?;
            get(name.as_mut_ptr(), name.len() as i32, device)
        };
        self.check("cuDeviceGetName", status)?;
        Ok(CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
    }

    /// The memory of a GPU, all of it.
    pub fn gpu_memory_bytes(&self, index: i32) -> Result<i64, NoCuda> {
        let device = self.device(index)?;
        let mut bytes = 0usize;
        // SAFETY: as above; the second version of the function writes a size_t.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe {
            let get: Symbol<'_, unsafe extern "C" fn(*mut usize, i32) -> Status> =
                self.find(b"cuDeviceTotalMem_v2\0")?;
            get(&mut bytes, device)
        };
        self.check("cuDeviceTotalMem", status)?;
        Ok(i64::try_from(bytes).unwrap_or(i64::MAX))
    }

    pub(super) fn device(&self, index: i32) -> Result<i32, NoCuda> {
        let mut device = 0;
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe {
            let get: Symbol<'_, unsafe extern "C" fn(*mut i32, i32) -> Status> = self.find(b"cuDeviceGet\0")?;
            get(&mut device, index)
        };
        self.check("cuDeviceGet", status).map(|()| device)
    }

    pub(super) fn check(&self, function: &str, status: Status) -> Result<(), NoCuda> {
        match status {
            0 => Ok(()),
            _ => Err(NoCuda::Broken(format!("the driver's {function} answers {}", self.error_name(status)))),
        }
    }

    /// As in `CUDA_ERROR_NO_DEVICE (100)`.
    fn error_name(&self, status: Status) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: as above; the name is a constant of the driver.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        unsafe {
            let get: Result<Symbol<'_, unsafe extern "C" fn(Status, *mut *const c_char) -> Status>, _> =
                self.library.get(b"cuGetErrorName\0");
            if get.is_ok_and(|get| get(status, &mut name) == 0) && !name.is_null() {
                return format!("{} ({status})", CStr::from_ptr(name).to_string_lossy());
            }
        }
        format!("error {status}")
    }

    /// # Safety
    /// `T` is the function's signature.
    #[expect(unsafe_code, reason = "the type of a symbol is for the caller to know")]
    pub(super) unsafe fn find<T>(&self, name: &[u8]) -> Result<Symbol<'_, T>, NoCuda> {
        // SAFETY: the caller's.
        unsafe { self.library.get(name) }.map_err(|error| NoCuda::Broken(format!("the driver is not whole: {error}")))
    }
}

fn not_opened(error: &str) -> NoCuda {
    let is_missing = error.contains(LIBRARY) && error.contains("No such file");
    if is_missing { NoCuda::NoDriver } else { NoCuda::Broken(format!("the driver cannot be opened: {error}")) }
}

fn check_version(version: i32) -> Result<(), NoCuda> {
    let of = |version: i32| format!("{}.{}", version / 1_000, version % 1_000 / 10);
    match version >= LEAST_VERSION {
        true => Ok(()),
        false => Err(NoCuda::Broken(format!(
            "the driver is for CUDA {}, and libtorch needs one for {} or newer",
            of(version),
            of(LEAST_VERSION)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_there_is_no_problem_and_any_other_is() {
        assert_eq!(
            not_opened("libcuda.so.1: cannot open shared object file: No such file or directory"),
            NoCuda::NoDriver
        );
        let broken = not_opened("libcuda.so.1: invalid ELF header");
        assert_eq!(broken, NoCuda::Broken("the driver cannot be opened: libcuda.so.1: invalid ELF header".into()));
    }

    #[test]
    fn a_driver_that_is_too_old_is_named_with_what_is_needed() {
        assert_eq!(check_version(13_000), Ok(()));
        let NoCuda::Broken(reason) = check_version(12_040).expect_err("too old") else { panic!("no driver") };
        assert_eq!(reason, "the driver is for CUDA 12.4, and libtorch needs one for 13.0 or newer");
    }
}
