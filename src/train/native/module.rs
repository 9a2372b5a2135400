//! A GPU's module of kernels: compiled from source by NVRTC, loaded and launched through the driver.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, Symbol};

use super::{Driver, NoCuda, graph::current_stream, loaded_library};

/// Attributes of a device, as the driver numbers them.
const MAJOR: i32 = 75;
const MINOR: i32 = 76;

type Handle = *mut c_void;
type Status = i32;
type GetFunction = unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Status;
/// The kernel; blocks in x, y and z, threads of each; bytes of shared memory, the stream; arguments, and others.
type Launch = unsafe extern "C" fn(
    Handle,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    Handle,
    *mut *mut c_void,
    *mut *mut c_void,
) -> Status;

/// Kernels of one source, on one GPU.
pub struct Module {
    gpu: i32,
    driver: Driver,
    get_function: GetFunction,
    launch: Launch,
    module: Handle,
    threads: u32,
}

// SAFETY: a module is the driver's, which any thread may call on which its context is current.
#[expect(unsafe_code, reason = "the handle is a pointer")]
unsafe impl Send for Module {}
// SAFETY: as above; nothing in here changes.
#[expect(unsafe_code, reason = "the handle is a pointer")]
unsafe impl Sync for Module {}

impl Module {
    /// Compiles the source with these macros for a GPU, and loads it. Must be called after `open_cuda`, by the thread that
    /// launches; `threads` is the size of every block.
    pub fn compile(gpu: i32, source: &str, macros: &[(&str, &str)], threads: u32) -> Result<Self, NoCuda> {
        let driver = Driver::open()?;
        let device = driver.device(gpu)?;
        let [major, minor] = [attribute(&driver, device, MAJOR)?, attribute(&driver, device, MINOR)?];
        let mut options = vec![format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".into()];
        options.extend(macros.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
        let image = Compiler::open()?.compile(source, &options)?;
        use_primary_context(&driver, device)?;
        let module = load(&driver, &image)?;
        // SAFETY: the signatures are the driver API's; the functions live as long as the driver, which is kept.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let (get_function, launch) = unsafe {
            (*driver.find::<GetFunction>(b"cuModuleGetFunction\0")?, *driver.find::<Launch>(b"cuLaunchKernel\0")?)
        };
        Ok(Self { gpu, driver, get_function, launch, module, threads })
    }

    /// Puts a kernel on the stream that libtorch uses, over this many blocks.
    ///
    /// # Panics
    /// If the driver refuses: the kernel does not exist, or an earlier one failed.
    ///
    /// # Safety
    /// The arguments are the addresses of what the kernel takes, of its types and in its order; what they point to lies in
    /// the GPU's memory and is large enough.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    pub unsafe fn launch(&self, kernel: &CStr, num_blocks: u32, arguments: &mut [*mut c_void]) {
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, and the name ends with a zero.
        let status = unsafe { (self.get_function)(&mut function, self.module, kernel.as_ptr()) };
        let found = self.driver.check("cuModuleGetFunction", status);
        let launched = found.and_then(|()| {
            let (arguments, stream) = (arguments.as_mut_ptr(), current_stream(self.gpu));
            // SAFETY: the caller's.
            let status = unsafe {
                (self.launch)(
                    function,
                    num_blocks,
                    1,
                    1,
                    self.threads,
                    1,
                    1,
                    0,
                    stream,
                    arguments,
                    std::ptr::null_mut(),
                )
            };
            self.driver.check("cuLaunchKernel", status)
        });
        if let Err(error) = launched {
            panic!("CUDA error: the kernel {kernel:?} cannot be launched: {error}");
        }
    }
}

fn attribute(driver: &Driver, device: i32, attribute: i32) -> Result<i32, NoCuda> {
    let mut value = 0;
    // SAFETY: the signature is the driver API's.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    let status = unsafe {
        let get = driver.find::<unsafe extern "C" fn(*mut i32, i32, i32) -> Status>(b"cuDeviceGetAttribute\0")?;
        get(&mut value, attribute, device)
    };
    driver.check("cuDeviceGetAttribute", status).map(|()| value)
}

/// The context that libtorch has on the device becomes that of this thread.
fn use_primary_context(driver: &Driver, device: i32) -> Result<(), NoCuda> {
    let mut context: Handle = std::ptr::null_mut();
    // SAFETY: the signatures are the driver API's. The context is never released: libtorch keeps it too.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    unsafe {
        let retain = driver.find::<unsafe extern "C" fn(*mut Handle, i32) -> Status>(b"cuDevicePrimaryCtxRetain\0")?;
        driver.check("cuDevicePrimaryCtxRetain", retain(&mut context, device))?;
        let set = driver.find::<unsafe extern "C" fn(Handle) -> Status>(b"cuCtxSetCurrent\0")?;
        driver.check("cuCtxSetCurrent", set(context))
    }
}

fn load(driver: &Driver, image: &[u8]) -> Result<Handle, NoCuda> {
    let mut module: Handle = std::ptr::null_mut();
    // SAFETY: the signature is the driver API's; the image is a whole cubin.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    let status = unsafe {
        let load = driver.find::<unsafe extern "C" fn(*mut Handle, *const u8) -> Status>(b"cuModuleLoadData\0")?;
        load(&mut module, image.as_ptr())
    };
    driver.check("cuModuleLoadData", status).map(|()| module)
}

/// NVRTC, of the CUDA that libtorch was built for.
struct Compiler {
    library: Library,
}

impl Compiler {
    const LIBRARY: &'static str = "libnvrtc.so.13";
    /// What NVRTC looks for by name, where the loader does not find it.
    const BUILTINS: &'static str = "libnvrtc-builtins.so.13.0";

    fn open() -> Result<Self, NoCuda> {
        // libtorch's own way to it: this library needs it, and knows where it lies.
        if let Some(beside) = loaded_library("libtorch_cpu.so").map(|path| path.with_file_name("libcaffe2_nvrtc.so")) {
            keep_open(&beside);
        }
        let library = open(Self::LIBRARY.as_ref()).map_err(|error| broken(format!("cannot be opened: {error}")))?;
        if let Some(beside) = loaded_library(Self::LIBRARY).map(|path| path.with_file_name(Self::BUILTINS)) {
            keep_open(&beside);
        }
        Ok(Self { library })
    }

    /// The source as a cubin.
    fn compile(&self, source: &str, options: &[String]) -> Result<Vec<u8>, NoCuda> {
        type Create = unsafe extern "C" fn(
            *mut Handle,
            *const c_char,
            *const c_char,
            i32,
            *const *const c_char,
            *const *const c_char,
        ) -> Status;
        let source = CString::new(source).map_err(|error| broken(error.to_string()))?;
        let options: Vec<_> = options.iter().flat_map(|option| CString::new(option.as_str())).collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let (mut program, none) = (std::ptr::null_mut(), std::ptr::null());
        // SAFETY: the signatures are NVRTC's; every string lives until the calls are over.
        #[expect(unsafe_code, reason = "calls NVRTC")]
        unsafe {
            let create = self.find::<Create>(b"nvrtcCreateProgram\0")?;
            let status = create(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none);
            check("nvrtcCreateProgram", status)?;
            let compile = self
                .find::<unsafe extern "C" fn(Handle, i32, *const *const c_char) -> Status>(b"nvrtcCompileProgram\0")?;
            if compile(program, options.len() as i32, options.as_ptr()) != 0 {
                let log = self.read(program, b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?;
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
                return Err(broken(format!("cannot compile the kernels: {log}")));
            }
            self.read(program, b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0")
        }
    }

    /// What a compiled program is asked for, as its size and its bytes.
    ///
    /// # Safety
    /// The names are those of two such functions.
    #[expect(unsafe_code, reason = "calls NVRTC")]
    unsafe fn read(&self, program: Handle, size: &[u8], bytes: &[u8]) -> Result<Vec<u8>, NoCuda> {
        let mut len = 0usize;
        // SAFETY: the signatures are NVRTC's; the buffer has the size that it asks for.
        unsafe {
            let get_size = self.find::<unsafe extern "C" fn(Handle, *mut usize) -> Status>(size)?;
            check("size of its output", get_size(program, &mut len))?;
            let mut buffer = vec![0u8; len];
            let get = self.find::<unsafe extern "C" fn(Handle, *mut u8) -> Status>(bytes)?;
            check("output", get(program, buffer.as_mut_ptr()))?;
            Ok(buffer)
        }
    }

    /// # Safety
    /// `F` is the function's signature.
    #[expect(unsafe_code, reason = "the type of a symbol is for the caller to know")]
    unsafe fn find<F>(&self, name: &[u8]) -> Result<Symbol<F>, NoCuda> {
        // SAFETY: the caller's.
        unsafe { self.library.get(name) }.map_err(|error| broken(format!("is not whole: {error}")))
    }
}

fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: the libraries' initialisers are CUDA's and libtorch's own.
    #[expect(unsafe_code, reason = "dlopen runs foreign initialisers")]
    unsafe {
        Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL)
    }
}

/// Opens a library for those that look for it by its name alone. If it is not there they say so.
fn keep_open(path: &Path) {
    if let Ok(library) = open(path) {
        std::mem::forget(library);
    }
}

fn check(what: &str, status: Status) -> Result<(), NoCuda> {
    if status == 0 { Ok(()) } else { Err(broken(format!("{what}: error {status}"))) }
}

fn broken(reason: String) -> NoCuda {
    NoCuda::Broken(format!("NVRTC ({}) {reason}", Compiler::LIBRARY))
}
