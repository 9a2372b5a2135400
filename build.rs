//! Compiles the trainer's kernels, and tells the linker where libtorch lies, so that the trainer and its tests start
//! without `LD_LIBRARY_PATH`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    #[cfg(feature = "train")]
    trainer::build();
}

#[cfg(feature = "train")]
mod trainer {
    use std::env;

    const NATIVE: &str = "src/train/native";

    pub fn build() {
        let Ok(libtorch) = env::var("LIBTORCH") else {
            println!("cargo::error=LIBTORCH is not set; run: export LIBTORCH=$(scripts/setup-libtorch)");
            return;
        };
        compile_kernels();
        compile_emulated_gpu();
        compile_context(&libtorch);
        link_libtorch(&libtorch);
    }

    /// Once per instruction set: the trainer chooses when it starts. Only the trainer is linked with them.
    fn compile_kernels() {
        let kernels = ["kernels.cpp", "kernels.h", "numbers.h", "attention.h", "dropout.h", "kernels.cu"];
        for file in kernels.into_iter().chain(["emulated_gpu.cpp", "context.cpp"]) {
            println!("cargo::rerun-if-changed={NATIVE}/{file}");
        }
        // A product and a sum may be one operation; nothing else is allowed to change what is computed.
        compile("baseline", &[]);
        if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
            compile("avx2", &["-march=x86-64-v3"]);
            compile("avx512", &["-march=x86-64-v4", "-mprefer-vector-width=512"]);
            compile("avx512_bf16", &["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"]);
        }
    }

    fn compile(instruction_set: &str, flags: &[&str]) {
        let name = format!("relora_kernels_{instruction_set}");
        let mut build = compiler();
        build.opt_level(3).warnings(true).extra_warnings(true);
        build.flags(["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]).flags(flags);
        build.define("RELORA_TABLE", name.as_str()).file(format!("{NATIVE}/kernels.cpp"));
        link_static(&mut build, &name);
    }

    /// A GPU's kernels on the CPU. Only tests call them, so the trainer is linked without.
    fn compile_emulated_gpu() {
        let mut build = compiler();
        build.opt_level(2).warnings(true).extra_warnings(true).file(format!("{NATIVE}/emulated_gpu.cpp"));
        link_static(&mut build, "relora_emulated_gpu");
    }

    /// What reaches libtorch where tch does not.
    fn compile_context(libtorch: &str) {
        let mut build = compiler();
        build.opt_level(1).warnings(false).include(format!("{libtorch}/include")).file(format!("{NATIVE}/context.cpp"));
        link_static(&mut build, "relora_context");
    }

    fn compiler() -> cc::Build {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").debug(false).cargo_metadata(false);
        build
    }

    fn link_static(build: &mut cc::Build, name: &str) {
        // A folder for each: objects of one source have one name.
        let out_dir = format!("{}/{name}", env::var("OUT_DIR").unwrap_or_default());
        build.out_dir(&out_dir).compile(name);
        link_with(&format!("{out_dir}/lib{name}.a"));
    }

    fn link_libtorch(libtorch: &str) {
        for argument in ["-lgomp", "-lstdc++", "-lc10", "-ltorch_cpu"] {
            link_with(argument);
        }
        link_with(&format!("-L{libtorch}/lib"));
        link_with(&format!("-Wl,-rpath,{libtorch}/lib"));
        let version_file = format!("{libtorch}/build-version");
        println!("cargo::rerun-if-changed={version_file}");
        match std::fs::read_to_string(&version_file) {
            Ok(version) => println!("cargo::rustc-env=LIBTORCH_VERSION={}", version.trim()),
            Err(error) => println!("cargo::error={version_file} cannot be read ({error}); run scripts/setup-libtorch"),
        }
    }

    fn link_with(argument: &str) {
        println!("cargo::rustc-link-arg-bin=relora-trainer={argument}");
    }
}
