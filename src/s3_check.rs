//! `relora s3-check`: what the configured store can do, how it will be used, and how fast it takes an upload.

use std::io::{self, Write};

use anyhow::{Result, bail};

use crate::{
    config::StoreConfig,
    storage::{Ability, Lack, Store, Throughput},
};

/// Prints what is found. Fails if the store lacks something that is needed.
pub async fn run(config: &StoreConfig, upload_bytes: Option<u64>) -> Result<()> {
    let store = Store::connect(config).await?;
    let abilities = store.check().await;
    let mut out = io::stdout().lock();
    write_abilities(&mut out, &abilities)?;
    writeln!(out)?;
    for (name, value) in store.usage() {
        writeln!(out, "{name:<24}{value}")?;
    }
    let lacking: Vec<_> = abilities.iter().filter(|ability| ability.is_needed && ability.outcome.is_err()).collect();
    if !lacking.is_empty() {
        let names: Vec<_> = lacking.iter().map(|ability| ability.name).collect();
        bail!("this store cannot be used, it lacks: {}", names.join(", "));
    }
    if let Some(num_bytes) = upload_bytes {
        drop(out);
        let throughput = store.measure_upload(num_bytes, &std::env::temp_dir()).await?;
        write_throughput(&mut io::stdout().lock(), &throughput)?;
    }
    Ok(())
}

fn write_abilities(out: &mut impl Write, abilities: &[Ability]) -> io::Result<()> {
    writeln!(out, "{:<24}{:<8}{:<8}what it means", "ability", "needed", "result")?;
    for Ability { name, is_needed, outcome, meaning } in abilities {
        let needed = if *is_needed { "yes" } else { "no" };
        let (result, reason) = match outcome {
            Ok(()) => ("ok", None),
            Err(Lack::No(reason)) => ("no", Some(reason)),
            Err(Lack::Failed(reason)) => ("error", Some(reason)),
        };
        writeln!(out, "{name:<24}{needed:<8}{result:<8}{meaning}")?;
        if let Some(reason) = reason {
            writeln!(out, "{:<40}({reason})", "")?;
        }
    }
    Ok(())
}

fn write_throughput(out: &mut impl Write, throughput: &Throughput) -> io::Result<()> {
    let (file, plain) = (throughput.file_mb_per_s(), throughput.plain_mb_per_s());
    writeln!(out)?;
    writeln!(out, "{:<24}{:.0} MB/s, two rounds of {} bytes", "upload of a file", file, throughput.num_bytes)?;
    writeln!(out, "{:<24}{plain:.0} MB/s, the same parts without file and hash", "upload from memory")?;
    writeln!(out, "{:<24}{:.0} %", "ratio", 100.0 * file / plain)?;
    match throughput.peak_bytes {
        Some(bytes) => {
            writeln!(out, "{:<24}{:.0} MB beyond what was held before", "memory of an upload", bytes as f64 / 1e6)
        }
        None => writeln!(out, "{:<24}unknown: this system does not tell", "memory of an upload"),
    }
}
