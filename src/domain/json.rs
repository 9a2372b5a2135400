//! Reading JSON that a person wrote: every mistake is reported, not only the first.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::problem::Problem;

/// Reads a document and reports every unknown field and wrong type at once.
///
/// serde stops at the first mistake, so each offending value is reported, taken out, and the rest read
/// again. Every field of `T` must be one that may be absent, hence the remainder always stands on its own.
pub fn parse<T: DeserializeOwned + Default>(mut json: Value) -> (T, Vec<Problem>) {
    // serde reads a struct from a list too, element by element: nobody means that.
    if !json.is_object() {
        return (T::default(), vec![Problem::new("", "must be an object")]);
    }
    integral_floats_to_integers(&mut json);
    let mut problems = take_out_nul(&mut json);
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(&json) {
            Ok(value) => return (value, problems),
            Err(error) => error,
        };
        let mut pointer = pointer_of(error.path());
        let message = error.into_inner().to_string();
        if let Some(field) = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next()) {
            let field = format!("/{}", escape(field));
            if !pointer.ends_with(&field) {
                pointer.push_str(&field);
            }
        }
        let taken_out = take_out(&mut json, &pointer);
        problems.push(Problem::new(pointer, message));
        if !taken_out {
            return (T::default(), problems);
        }
    }
}

/// Puts a JSON merge patch (RFC 7396) over a document: null removes, an object is merged, all else replaces.
pub fn merge_patch(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (name, change) in changes {
        if change.is_null() {
            fields.remove(&name);
        } else {
            merge_patch(fields.entry(name).or_insert(Value::Null), change);
        }
    }
}

/// JSON Schema holds 1475.0 to be an integer, serde does not.
fn integral_floats_to_integers(json: &mut Value) {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: below it every integer is a double
    match json {
        Value::Number(number) => {
            if let Some(float) = number.as_f64().filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() < EXACT) {
                *json = Value::from(float as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(integral_floats_to_integers),
        Value::Object(fields) => fields.values_mut().for_each(integral_floats_to_integers),
        _ => {}
    }
}

/// PostgreSQL stores no NUL character, neither in text nor in JSON.
fn take_out_nul(json: &mut Value) -> Vec<Problem> {
    let mut pointers = Vec::new();
    find_nul(json, "", &mut pointers);
    for pointer in &pointers {
        take_out(json, pointer);
    }
    pointers.into_iter().map(|pointer| Problem::new(pointer, "must not contain a NUL character")).collect()
}

fn find_nul(json: &Value, pointer: &str, pointers: &mut Vec<String>) {
    match json {
        Value::String(text) if text.contains('\0') => pointers.push(pointer.to_owned()),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                find_nul(item, &format!("{pointer}/{index}"), pointers);
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                let pointer = format!("{pointer}/{}", escape(key));
                if key.contains('\0') {
                    pointers.push(pointer);
                } else {
                    find_nul(value, &pointer, pointers);
                }
            }
        }
        _ => {}
    }
}

fn pointer_of(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("/{index}"),
            Segment::Map { key } => format!("/{}", escape(key)),
            Segment::Enum { variant } => format!("/{}", escape(variant)),
            Segment::Unknown => String::new(),
        })
        .collect()
}

pub(super) fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// Removes the value at `pointer`; false if there is none. An element of an array takes the whole
/// array with it, because the other elements would move up.
pub(super) fn take_out(json: &mut Value, pointer: &str) -> bool {
    let Some((parent, key)) = pointer.rsplit_once('/') else { return false };
    let key = key.replace("~1", "/").replace("~0", "~");
    match json.pointer_mut(parent) {
        Some(Value::Object(fields)) => fields.remove(&key).is_some(),
        Some(Value::Array(_)) => take_out(json, parent),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Document {
        name: Option<String>,
        labels: Option<BTreeMap<String, String>>,
    }

    fn pointers(json: Value) -> Vec<String> {
        let (_, problems) = parse::<Document>(json);
        problems.into_iter().map(|problem| problem.pointer).collect()
    }

    #[test]
    fn a_nul_character_is_reported_wherever_it_stands() {
        let found = pointers(json!({"name": "a\0b", "labels": {"a": "\0", "b\0": "c"}, "colour": 1}));
        assert_eq!(found, ["/labels/a", "/labels/b\0", "/name", "/colour"]);
    }

    #[test]
    fn a_list_with_a_nul_character_is_taken_out_as_a_whole() {
        assert_eq!(pointers(json!({"x": ["\0"]})), ["/x/0"]);
    }

    #[test]
    fn a_document_that_is_no_object_is_one_problem() {
        assert_eq!(pointers(json!(["a"])), [""]);
        assert_eq!(pointers(json!([])), [""]);
        assert_eq!(pointers(json!(null)), [""]);
    }

    #[test]
    fn what_is_right_is_kept_beside_what_is_wrong() {
        let (document, problems) = parse::<Document>(json!({"name": "n", "labels": {"a": 1, "b": "c"}}));
        assert_eq!(problems.len(), 1);
        assert_eq!(document.name.as_deref(), Some("n"));
        assert_eq!(document.labels.unwrap_or_default().len(), 1);
    }
}
