//! Identifiers. Each carries a prefix of its kind, so that a log line or a URL says what it names.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        #[schema(value_type = String)]
        pub struct $name(String);

        impl $name {
            /// A new identifier; later ones sort after earlier ones.
            pub fn new() -> Self {
                Self(format!(concat!($prefix, "_{}"), Uuid::now_v7().simple()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        /// Any text is taken: a malformed identifier names nothing and is simply not found.
        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(ProjectId, "proj");
id!(ApiKeyId, "key");
id!(DatasetId, "ds");
id!(TokenizationId, "tz");
id!(JobId, "job");
id!(
    /// A node of a lineage: a base, a restart, a checkpoint or a state.
    NodeId, "node");
id!(
    /// Work on a lineage that a user asked for.
    LineageTaskId, "task");
id!(WorkItemId, "work");
id!(
    /// One incarnation of a worker process: a restarted worker is another one.
    WorkerId, "worker");
