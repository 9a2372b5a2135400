//! The service without libtorch: API server, worker and client.

fn main() -> std::process::ExitCode {
    relora::cli::main()
}
