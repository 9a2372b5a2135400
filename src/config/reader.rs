//! How a variable becomes a value, and how what is wrong with all of them becomes one error.

use std::{
    fmt::Display,
    num::NonZero,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use super::{ClientFile, LogFormat};

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("these settings need a change:\n  {}", problems.join("\n  "))]
pub struct ConfigError {
    pub problems: Vec<String>,
}

/// What defaults depend on besides variables.
#[derive(Debug, Clone)]
pub struct Machine {
    pub is_root: bool,
    pub executable_dir: PathBuf,
    pub hostname: String,
    pub num_cores: NonZero<usize>,
}

impl Machine {
    /// The machine that this process runs on.
    pub fn this() -> Self {
        let executable = std::env::current_exe().unwrap_or_default();
        Self {
            is_root: rustix::process::geteuid().is_root(),
            executable_dir: executable.parent().map(Path::to_owned).unwrap_or_default(),
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            num_cores: std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
        }
    }
}

/// A variable of this process.
pub(super) fn process_variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Reads variables and keeps the problems until all of them are read.
pub(super) struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    machine: &'a Machine,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(lookup: &'a dyn Fn(&str) -> Option<String>, machine: &'a Machine) -> Self {
        Self { lookup, machine, problems: Vec::new() }
    }

    pub(super) fn machine(&self) -> &'a Machine {
        self.machine
    }

    /// The variable's text without surrounding space, if there is any.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// The variable's value if it is set and can be understood.
    pub(super) fn optional<T, E: Display>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.text(name)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.problem(name, &format!("expected {expected}, got {text:?}: {reason}"));
                None
            }
        }
    }

    /// The variable's value, or the default.
    pub(super) fn value<T, E: Display>(
        &mut self,
        name: &str,
        expected: &str,
        default: T,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> T {
        self.optional(name, expected, parse).unwrap_or(default)
    }

    /// The variable as an absolute path.
    pub(super) fn path(&mut self, name: &str) -> Option<PathBuf> {
        self.optional(name, "a path", |text| std::path::absolute(text))
    }

    /// The folder of everything that the program keeps on this machine.
    pub(super) fn data_dir(&mut self) -> PathBuf {
        if let Some(path) = self.path("RELORA_DATA_DIR") {
            return path;
        }
        if self.machine.is_root {
            return PathBuf::from("/var/lib/relora");
        }
        let xdg = self.text("XDG_DATA_HOME").map(PathBuf::from);
        let home = self.text("HOME").map(|home| Path::new(&home).join(".local/share"));
        let Some(parent) = xdg.or(home).filter(|path| path.is_absolute()) else {
            self.missing("RELORA_DATA_DIR", "needed where neither XDG_DATA_HOME nor HOME is an absolute path");
            return PathBuf::new();
        };
        parent.join("relora")
    }

    /// The file that a server on this machine leaves for its clients, if it is there.
    pub(super) fn client_file(&mut self, path: &Path) -> Option<ClientFile> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                self.problems.push(format!("{}: cannot be read: {error}", path.display()));
                return None;
            }
        };
        match serde_json::from_str(&text) {
            Ok(file) => Some(file),
            Err(error) => {
                self.problems.push(format!("{}: not what a server writes: {error}", path.display()));
                None
            }
        }
    }

    pub(super) fn problem(&mut self, name: &str, reason: &str) {
        self.problems.push(format!("{name}: {reason}"));
    }

    pub(super) fn missing(&mut self, name: &str, meaning: &str) {
        // A variable that is set and bad is reported once, as bad.
        if !self.problems.iter().any(|problem| problem.starts_with(&format!("{name}:"))) {
            self.problem(name, &format!("not set; {meaning}"));
        }
    }

    pub(super) fn finish<T>(self, config: T) -> Result<T, ConfigError> {
        if self.problems.is_empty() { Ok(config) } else { Err(self.into_error()) }
    }

    pub(super) fn into_error(self) -> ConfigError {
        ConfigError { problems: self.problems }
    }
}

/// A URL of a server: scheme and host, without a path.
pub(super) fn endpoint(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(text).map_err(|error| error.to_string())?;
    match url {
        _ if !["http", "https"].contains(&url.scheme()) => Err("the scheme is neither http nor https".to_owned()),
        _ if url.path() != "/" || url.query().is_some() => Err("it has a path or a query".to_owned()),
        _ if !url.username().is_empty() || url.password().is_some() => Err("it holds credentials".to_owned()),
        _ => Ok(text.trim_end_matches('/').to_owned()),
    }
}

/// Folder names in front of every key, without slashes at the ends.
pub(super) fn prefix(text: &str) -> Result<String, &'static str> {
    let prefix = text.trim_matches('/');
    let is_plain = |segment: &str| {
        !segment.is_empty()
            && segment.bytes().any(|byte| byte != b'.')
            && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    match prefix {
        "" => Ok(String::new()),
        _ if prefix.len() > 30 => Err("it is longer"),
        _ if !prefix.split('/').all(is_plain) => Err("a name has characters beside letters, digits, '.', '_' and '-'"),
        _ => Ok(prefix.to_owned()),
    }
}

/// Whole seconds within a range.
pub(super) fn seconds(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<u64, String> {
    move |text| {
        let value = text.parse::<u64>().map_err(|error| error.to_string())?;
        if range.contains(&value) { Ok(value) } else { Err("it is outside the range".to_owned()) }
    }
}

/// Directives that tracing understands.
pub(super) fn filter(text: &str) -> Result<String, tracing_subscriber::filter::ParseError> {
    text.parse::<tracing_subscriber::EnvFilter>().map(|_| text.to_owned())
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, &'static str> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("there is no such format"),
    }
}
