//! Claims, leases and fences: who may write what a work item produces.

use crate::domain::ids::WorkItemId;

/// The right to work on an item, and to write its results, until somebody else claims it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub work_item: WorkItemId,
    pub lease_epoch: i64,
}
