//! Tells the linker where libtorch lies, so that the trainer and its tests start without `LD_LIBRARY_PATH`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_TRAIN").is_none() {
        return;
    }
    let Ok(libtorch) = std::env::var("LIBTORCH") else {
        println!("cargo::error=LIBTORCH is not set; run: export LIBTORCH=$(scripts/setup-libtorch)");
        return;
    };
    println!("cargo::rustc-link-arg-bin=relora-trainer=-Wl,-rpath,{libtorch}/lib");

    let version_file = format!("{libtorch}/build-version");
    println!("cargo::rerun-if-changed={version_file}");
    match std::fs::read_to_string(&version_file) {
        Ok(version) => println!("cargo::rustc-env=LIBTORCH_VERSION={}", version.trim()),
        Err(error) => println!("cargo::error={version_file} cannot be read ({error}); run scripts/setup-libtorch"),
    }
}
