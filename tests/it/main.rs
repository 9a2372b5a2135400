//! The service from outside: the real router over HTTP, a real PostgreSQL, a real S3 server.

mod queue;
