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

    const KERNELS: &str = "src/train/native/kernels.cpp";

    pub fn build() {
        let Ok(libtorch) = env::var("LIBTORCH") else {
            println!("cargo::error=LIBTORCH is not set; run: export LIBTORCH=$(scripts/setup-libtorch)");
            return;
        };
        compile_kernels();
        link_libtorch(&libtorch);
    }

    /// Once per instruction set: the trainer chooses when it starts. Only the trainer is linked with them.
    fn compile_kernels() {
        println!("cargo::rerun-if-changed=src/train/native");
        // A product and a sum may be one operation; nothing else is allowed to change what is computed.
        compile("baseline", &[]);
        if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
            compile("avx2", &["-march=x86-64-v3"]);
            compile("avx512", &["-march=x86-64-v4", "-mprefer-vector-width=512"]);
        }
        link_with("-lgomp");
        link_with("-lstdc++");
    }

    fn compile(instruction_set: &str, flags: &[&str]) {
        let out_dir = env::var("OUT_DIR").unwrap_or_default();
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .opt_level(3)
            .debug(false)
            .warnings(true)
            .extra_warnings(true)
            .cargo_metadata(false);
        build.flags(["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]).flags(flags);
        build.define("RELORA_TABLE", format!("relora_kernels_{instruction_set}").as_str());
        build.file(KERNELS).out_dir(format!("{out_dir}/{instruction_set}"));
        let library = format!("relora_kernels_{instruction_set}");
        build.compile(&library);
        link_with(&format!("{out_dir}/{instruction_set}/lib{library}.a"));
    }

    fn link_libtorch(libtorch: &str) {
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
