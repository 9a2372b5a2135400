//! The memory of this machine, as far as this process may use it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A limit of a control group: the file that holds the group's paths, and where its files lie.
struct Controller {
    /// How the line begins that names the group, after the number of the hierarchy.
    prefix: &'static str,
    mounted_at: &'static str,
    limit_file: &'static str,
}

const CONTROLLERS: [Controller; 2] = [
    Controller { prefix: ":", mounted_at: "sys/fs/cgroup", limit_file: "memory.max" },
    Controller { prefix: "memory:", mounted_at: "sys/fs/cgroup/memory", limit_file: "memory.limit_in_bytes" },
];

/// All of it, in bytes.
pub fn total_bytes() -> Option<i64> {
    bounded(Path::new("/"), "MemTotal")
}

/// What is free, in bytes.
pub fn available_bytes() -> Option<i64> {
    bounded(Path::new("/"), "MemAvailable")
}

/// A field of /proc/meminfo, and at most what the control groups of this process allow.
fn bounded(root: &Path, field: &str) -> Option<i64> {
    let limits = CONTROLLERS.iter().flat_map(|controller| controller.limits(root));
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: i64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(limits.fold(1_024 * kib, i64::min))
}

impl Controller {
    /// Of the group and of those around it. Within a container these may be named as they are outside of it, and then
    /// the outermost that can be seen is the container's own.
    fn limits(&self, root: &Path) -> Vec<i64> {
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let path = groups.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(self.prefix));
        let group = PathBuf::from(path.unwrap_or_default().trim_start_matches('/'));
        let limit_of = |group: &Path| {
            let text = fs::read_to_string(root.join(self.mounted_at).join(group).join(self.limit_file)).ok()?;
            text.trim().parse::<i64>().ok() // or `max`
        };
        group.ancestors().filter_map(limit_of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let meminfo = ("proc/meminfo", "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    500 kB\n");
        for (path, text) in files.iter().chain([&meminfo]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("create");
            fs::write(path, text).expect("write");
        }
        root
    }

    fn total(files: &[(&str, &str)]) -> Option<i64> {
        bounded(machine(files).path(), "MemTotal")
    }

    #[test]
    fn without_limits_it_is_what_the_kernel_says() {
        assert_eq!(total(&[]), Some(1_024_000));
        assert_eq!(bounded(machine(&[]).path(), "MemAvailable"), Some(512_000));
        assert_eq!(bounded(Path::new("/nonexistent"), "MemTotal"), None);
        assert!(total_bytes() >= available_bytes() && available_bytes() > Some(1 << 20));
    }

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let group = ("proc/self/cgroup", "0::/a/b\n");
        let limit = |path: &'static str, limit: &'static str| [group, (path, limit)];
        assert_eq!(total(&limit("sys/fs/cgroup/a/b/memory.max", "4096\n")), Some(4_096));
        assert_eq!(total(&limit("sys/fs/cgroup/a/memory.max", "8192\n")), Some(8_192));
        assert_eq!(total(&limit("sys/fs/cgroup/memory.max", "2048\n")), Some(2_048));
        assert_eq!(total(&limit("sys/fs/cgroup/a/b/memory.max", "max\n")), Some(1_024_000));
        assert_eq!(total(&limit("sys/fs/cgroup/c/memory.max", "1\n")), Some(1_024_000));
    }

    #[test]
    fn the_first_version_of_control_groups_is_read_too() {
        let group = ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/1\n0::/\n");
        let path = "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes";
        assert_eq!(total(&[group, (path, "4096\n")]), Some(4_096));
        assert_eq!(total(&[group, (path, "9223372036854771712\n")]), Some(1_024_000));
        assert_eq!(total(&[group, ("sys/fs/cgroup/memory/memory.limit_in_bytes", "512\n")]), Some(512));
    }
}
