//! Where the system keeps `initdb` and `postgres`. Distributions hide them from PATH, one folder per version.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::bail;
use tokio::process::Command;

/// The two programs of one PostgreSQL version.
#[derive(Debug)]
pub(super) struct Binaries {
    pub(super) initdb: PathBuf,
    pub(super) postgres: PathBuf,
}

impl Binaries {
    /// The programs for this data: of its own version if it exists, else the first that are found.
    pub(super) async fn find(data: &Path) -> anyhow::Result<Self> {
        let wanted = fs::read_to_string(data.join("PG_VERSION")).ok().map(|version| version.trim().to_owned());
        let mut seen = Vec::new();
        for folder in candidates().await {
            let Some(version) = version_in(&folder).await else { continue };
            if wanted.as_ref().is_none_or(|wanted| *wanted == version) {
                return Ok(Self { initdb: folder.join("initdb"), postgres: folder.join("postgres") });
            }
            seen.push(version);
        }
        let install = "apt-get install postgresql, or dnf install postgresql-server";
        match wanted {
            Some(wanted) => bail!(
                "{} was created by PostgreSQL {wanted}, which is not installed (found: {seen:?}): install it ({install}), \
                 or set DATABASE_URL to a server of your own",
                data.display()
            ),
            None => bail!("PostgreSQL is not installed: run {install}; or set DATABASE_URL to a server of your own"),
        }
    }
}

/// Folders to look into: PATH (an empty folder name), the distributions' own, newest version first, and what
/// `pg_config` says.
async fn candidates() -> Vec<PathBuf> {
    let mut versioned = Vec::new();
    for (parent, name) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let version = entry.file_name().to_str().and_then(|file| file.strip_prefix(name)?.parse::<u32>().ok());
            versioned.extend(version.map(|version| (version, entry.path().join("bin"))));
        }
    }
    versioned.sort_by(|a, b| b.cmp(a));
    let mut folders = vec![PathBuf::new()];
    folders.extend(versioned.into_iter().map(|(_, folder)| folder));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output().await {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    folders
}

/// The major version of the server in a folder, if both programs run.
async fn version_in(folder: &Path) -> Option<String> {
    let mut major = None;
    for program in ["initdb", "postgres"] {
        let output = Command::new(folder.join(program)).arg("--version").output().await.ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        // "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)"
        major = Some(text.split_whitespace().nth(2)?.split('.').next()?.to_owned());
    }
    major
}
