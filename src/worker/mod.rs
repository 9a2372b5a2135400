pub mod documents;
pub mod tokenize;
