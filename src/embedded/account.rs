//! Whom PostgreSQL runs as. It refuses root, so that root needs another account, which must reach the data.

use std::{
    os::unix::fs::{MetadataExt, chown},
    path::Path,
};

use anyhow::{Context, bail};
use tokio::process::Command;

/// The account of the private PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Account {
    /// The one that this process runs as.
    Own,
    /// Another one, because this process runs as root.
    Other { name: String, uid: u32, gid: u32 },
}

impl Account {
    /// The account to use on this machine.
    pub(super) fn choose() -> anyhow::Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Own);
        }
        let passwd = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
        Self::from_passwd(&passwd).context(
            "PostgreSQL refuses to run as root, and there is neither a user postgres nor a user nobody: \
             create one (useradd --system postgres), or start relora as another user",
        )
    }

    fn from_passwd(passwd: &str) -> Option<Self> {
        let find = |wanted: &str| {
            passwd.lines().find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
                [name, _, uid, gid, ..] if name == wanted => {
                    Some(Self::Other { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()? })
                }
                _ => None,
            })
        };
        find("postgres").or_else(|| find("nobody"))
    }

    /// Makes the command run as this account. The standard library drops root's supplementary groups with it.
    pub(super) fn apply(&self, command: &mut Command) {
        if let Self::Other { uid, gid, .. } = self {
            command.uid(*uid).gid(*gid);
        }
    }

    /// Gives a file or folder to this account.
    pub(super) fn own(&self, path: &Path) -> anyhow::Result<()> {
        if let Self::Other { name, uid, gid } = self {
            chown(path, Some(*uid), Some(*gid)).with_context(|| format!("give {} to {name}", path.display()))?;
        }
        Ok(())
    }

    /// The numeric user that this account's files belong to.
    pub(super) fn uid(&self) -> u32 {
        match self {
            Self::Own => rustix::process::geteuid().as_raw(),
            Self::Other { uid, .. } => *uid,
        }
    }

    /// Fails with what to do if the account cannot enter `folder`, which must be absolute and exist.
    pub(super) fn check_can_reach(&self, folder: &Path) -> anyhow::Result<()> {
        let Self::Other { name, uid, gid } = self else { return Ok(()) };
        for ancestor in folder.ancestors() {
            let metadata = ancestor.metadata().with_context(|| format!("look at {}", ancestor.display()))?;
            let enter_bit = match () {
                () if metadata.uid() == *uid => 0o100,
                () if metadata.gid() == *gid => 0o010,
                () => 0o001,
            };
            if metadata.mode() & enter_bit == 0 {
                bail!(
                    "PostgreSQL runs as {name}, which cannot enter {} (mode {:o}), and {} lies in it: choose another \
                     folder with RELORA_DATA_DIR, such as /var/lib/relora, or allow it with chmod o+x {}",
                    ancestor.display(),
                    metadata.mode() & 0o7777,
                    folder.display(),
                    ancestor.display()
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Account;

    #[test]
    fn postgres_is_preferred_to_nobody() {
        let nobody = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65533:n:/:/bin/false\n";
        let both = format!("{nobody}postgres:x:101:104::/var/lib/postgresql:/bin/bash\n");
        let other = |name: &str, uid, gid| Some(Account::Other { name: name.to_owned(), uid, gid });
        assert_eq!(Account::from_passwd(nobody), other("nobody", 65534, 65533));
        assert_eq!(Account::from_passwd(&both), other("postgres", 101, 104));
        assert_eq!(Account::from_passwd("root:x:0:0:root:/root:/bin/sh\n"), None);
    }
}
