//! A GPU's work as one launch: what libtorch and the trainer's kernels put on a stream is recorded once, and then put there
//! as a whole.

use std::{
    any::Any,
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::OnceLock,
};

use tch::Device;

use super::{Driver, NoCuda};

type Handle = *mut c_void;
type Status = i32;
type Launch = unsafe extern "C" fn(Handle, Handle) -> Status;
type Destroy = unsafe extern "C" fn(Handle) -> Status;

/// Work of other threads does not disturb the recording, and what this one may not do meanwhile is an error.
const CAPTURE_MODE_THREAD_LOCAL: i32 = 1;

#[expect(unsafe_code, reason = "context.cpp")]
unsafe extern "C" {
    fn relora_stream(gpu: i8) -> Handle;
    fn relora_side_stream(gpu: i8) -> i64;
    fn relora_exchange_stream(gpu: i8, stream: i64) -> i64;
    fn relora_num_allocations(gpu: i8) -> i64;
}

/// The stream on which libtorch's work of this thread goes.
pub fn current_stream(gpu: i32) -> Handle {
    // SAFETY: it only reads.
    #[expect(unsafe_code, reason = "calls context.cpp")]
    unsafe {
        relora_stream(gpu as i8)
    }
}

/// Recorded work.
pub struct Graph {
    gpu: i32,
    driver: Driver,
    launch: Launch,
    executable: Handle,
}

impl Graph {
    /// Does the work, and records it to be launched again; what it reads and writes must stay where it is.
    ///
    /// # Errors
    /// If it cannot be recorded. It is done all the same.
    ///
    /// # Panics
    /// If the GPU fails.
    pub fn record(device: Device, work: &mut dyn FnMut()) -> Result<Self, NoCuda> {
        let gpu = if let Device::Cuda(index) = device { index as i32 } else { 0 };
        let driver = Driver::open().and_then(|driver| synchronize(&driver).map(|()| driver)).unwrap_or_else(fail);
        // libtorch's usual stream cannot be recorded.
        let _side = SideStream::enter(gpu);
        // Once for real, which also gives cuBLAS the memory that it keeps for a stream.
        work();
        synchronize(&driver).unwrap_or_else(fail);
        // SAFETY: the signature is the driver API's; the function lives as long as the driver, which is kept.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let launch = unsafe { *driver.find::<Launch>(b"cuGraphLaunch\0")? };
        let num_allocations = num_allocations(gpu);
        let graph = capture(&driver, current_stream(gpu), work)?;
        if self::num_allocations(gpu) != num_allocations {
            destroy(&driver, b"cuGraphDestroy\0", graph);
            return Err(NoCuda::Broken("the work takes memory that will be others' when it is launched again".into()));
        }
        let executable = instantiate(&driver, graph);
        destroy(&driver, b"cuGraphDestroy\0", graph);
        Ok(Self { gpu, launch, executable: executable?, driver })
    }

    /// Puts the work on the stream that libtorch uses. Where graphs are emulated, `again` does it. What the work read and
    /// wrote when it was recorded must lie where it lay: nobody checks that here.
    ///
    /// # Panics
    /// If the driver refuses.
    pub fn launch(&self, _again: impl FnOnce()) {
        // SAFETY: the graph is whole; the memory is for the caller to answer for.
        #[expect(unsafe_code, reason = "calls the CUDA driver")]
        let status = unsafe { (self.launch)(self.executable, current_stream(self.gpu)) };
        self.driver.check("cuGraphLaunch", status).unwrap_or_else(fail);
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver waits with it until the graph has run.
        destroy(&self.driver, b"cuGraphExecDestroy\0", self.executable);
    }
}

/// While it lives, libtorch's work of this thread goes on a stream of its own, the same one every time.
struct SideStream {
    gpu: i32,
    before: i64,
}

impl SideStream {
    fn enter(gpu: i32) -> Self {
        static STREAM: OnceLock<i64> = OnceLock::new();
        // SAFETY: libtorch hands out streams that live as long as the process.
        #[expect(unsafe_code, reason = "calls context.cpp")]
        let before =
            unsafe { relora_exchange_stream(gpu as i8, *STREAM.get_or_init(|| relora_side_stream(gpu as i8))) };
        Self { gpu, before }
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "calls context.cpp")]
        unsafe {
            relora_exchange_stream(self.gpu as i8, self.before);
        }
    }
}

/// How often memory of the GPU was asked for.
fn num_allocations(gpu: i32) -> i64 {
    // SAFETY: it only reads.
    #[expect(unsafe_code, reason = "calls context.cpp")]
    unsafe {
        relora_num_allocations(gpu as i8)
    }
}

/// Waits for everything that the GPU has been given.
fn synchronize(driver: &Driver) -> Result<(), NoCuda> {
    // SAFETY: the signature is the driver API's.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    let status = unsafe { driver.find::<unsafe extern "C" fn() -> Status>(b"cuCtxSynchronize\0")?() };
    driver.check("cuCtxSynchronize", status)
}

/// The graph of what the work puts on the stream. Nothing of it is done.
fn capture(driver: &Driver, stream: Handle, work: &mut dyn FnMut()) -> Result<Handle, NoCuda> {
    let mut graph = ptr::null_mut();
    // SAFETY: the signatures are the driver API's.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    let (worked, ended) = unsafe {
        let begin = driver.find::<unsafe extern "C" fn(Handle, i32) -> Status>(b"cuStreamBeginCapture_v2\0")?;
        let end = driver.find::<unsafe extern "C" fn(Handle, *mut Handle) -> Status>(b"cuStreamEndCapture\0")?;
        driver.check("cuStreamBeginCapture", begin(stream, CAPTURE_MODE_THREAD_LOCAL))?;
        // What must not be recorded throws. The stream has to come out of it all the same.
        let worked = catch_unwind(AssertUnwindSafe(work));
        (worked, driver.check("cuStreamEndCapture", end(stream, &mut graph)))
    };
    match worked.map_err(refusal).and(ended) {
        Ok(()) => Ok(graph),
        Err(error) => {
            if !graph.is_null() {
                destroy(driver, b"cuGraphDestroy\0", graph);
            }
            Err(error)
        }
    }
}

/// What libtorch says of an operation that cannot be recorded.
fn refusal(panic: Box<dyn Any + Send>) -> NoCuda {
    let message = panic.downcast_ref::<String>().map_or("an operation cannot be recorded", String::as_str);
    NoCuda::Broken(message.to_owned())
}

fn instantiate(driver: &Driver, graph: Handle) -> Result<Handle, NoCuda> {
    type Instantiate = unsafe extern "C" fn(*mut Handle, Handle, u64) -> Status;
    let mut executable = ptr::null_mut();
    // SAFETY: the signature is the driver API's.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    let status = unsafe { driver.find::<Instantiate>(b"cuGraphInstantiateWithFlags\0")?(&mut executable, graph, 0) };
    driver.check("cuGraphInstantiate", status).map(|()| executable)
}

fn destroy(driver: &Driver, function: &[u8], handle: Handle) {
    // SAFETY: the signature is the driver API's; nobody uses the handle afterwards.
    #[expect(unsafe_code, reason = "calls the CUDA driver")]
    if let Ok(destroy) = unsafe { driver.find::<Destroy>(function) } {
        // SAFETY: as above.
        unsafe { destroy(handle) };
    }
}

fn fail<T>(error: NoCuda) -> T {
    panic!("CUDA error: {error}")
}
