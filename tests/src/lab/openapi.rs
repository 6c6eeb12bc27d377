//! Whether the API answers as its own document says.

use super::Api;
use crate::case::Failure;
use crate::check;
use serde_json::Value;

/// Asks for `path`, which may have a query, and holds the answer against the OpenAPI document.
pub fn get_as_documented(api: &Api, path: &str) -> Result<Value, Failure> {
    let document: Value = serde_json::from_str(include_str!("../../../resources/assets/openapi.json"))?;
    let plain = path.split('?').next().unwrap_or_default();
    let mut schema =
        document["paths"][plain]["get"]["responses"]["200"]["content"]["application/json"]["schema"].clone();
    check!(schema.is_object(), "the OpenAPI document does not say what GET {path} answers");
    // References lead there.
    schema["components"] = document["components"].clone();
    let validator =
        jsonschema::validator_for(&schema).map_err(|error| Failure(format!("GET {path}: {error}")))?;
    let answer = api.get(path)?;
    let wrong: Vec<String> =
        validator.iter_errors(&answer).map(|error| format!("{} at {}", error, error.instance_path)).collect();
    check!(wrong.is_empty(), "GET {path} answers {answer}, which is not what the document says: {wrong:?}");
    Ok(answer)
}
