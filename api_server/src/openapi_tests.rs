//! The OpenAPI document against the routes and the types: neither can change without the other.

use std::collections::BTreeSet;

use hyper::Method;
use resources::{Action, CgroupSection, MicrovmConfig};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::parse;
use crate::routes::ROUTES;

pub fn document() -> Value {
    serde_json::from_str(include_str!("../../resources/assets/openapi.json")).unwrap()
}

/// Each operation with its path and method.
pub fn operations(document: &Value) -> Vec<(String, Method, Value)> {
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(key, _)| *key != "parameters") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            all.push((path.clone(), method, operation.clone()));
        }
    }
    all
}

/// The schema that `schema` stands for; that which is not null where there is a choice.
pub fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return resolve(document, document.pointer(&reference[1..]).expect(reference));
    }
    match schema["anyOf"].as_array() {
        Some(choices) => resolve(document, choices.iter().find(|choice| choice["type"] != "null").unwrap()),
        None => schema,
    }
}

fn allows_null(schema: &Value) -> bool {
    let is_null =
        |kind: &Value| kind == "null" || kind.as_array().is_some_and(|all| all.contains(&json!("null")));
    let choices = schema["anyOf"].as_array();
    is_null(&schema["type"])
        || choices.is_some_and(|all| all.iter().any(|choice| is_null(&choice["type"])))
        // Whatever it may be.
        || (schema.get("type").is_none() && schema.get("$ref").is_none() && choices.is_none())
}

/// The names that serde says it expected.
fn expected(error: &str) -> BTreeSet<&str> {
    let list = error.split_once(", expected ").expect(error).1;
    let list = list.split(" at line ").next().unwrap();
    let words = list.split([' ', ',', '`', '.']);
    words.filter(|word| !["", "one", "of", "or"].contains(word)).collect()
}

/// Whether a type takes a value, and if not why.
type Taker<'a> = &'a dyn Fn(&Value) -> Result<(), String>;

/// Compares `schema` with what `take` takes in place of that part of `sample` which is at `place` (RFC 6901).
fn compare(document: &Value, schema: &Value, sample: &Value, place: &str, take: Taker<'_>) {
    let schema = resolve(document, schema);
    let with = |value: Value| {
        let mut changed = sample.clone();
        *changed.pointer_mut(place).unwrap() = value;
        take(&changed)
    };
    let here = sample.pointer(place).unwrap();
    if let Some(values) = schema["enum"].as_array() {
        for value in values {
            assert_eq!(with(value.clone()), Ok(()), "{place}: {value}");
        }
        let error = with(json!("no such")).unwrap_err();
        let ours: BTreeSet<_> = values.iter().filter_map(Value::as_str).collect();
        assert_eq!(expected(&error), ours, "{place}");
    }
    if schema.get("items").is_some_and(Value::is_object) {
        assert!(!here.as_array().unwrap().is_empty(), "{place} has no example");
        compare(document, &schema["items"], sample, &format!("{place}/0"), take);
    }
    let Some(properties) = schema["properties"].as_object() else { return };
    let members = here.as_object().unwrap();
    let unknown = members.iter().map(|(key, value)| (key.clone(), value.clone()));
    let unknown = with(unknown.chain([("no such".to_owned(), json!(0))]).collect());
    if schema["additionalProperties"] == false {
        let names: BTreeSet<_> = properties.keys().map(String::as_str).collect();
        assert_eq!(expected(&unknown.unwrap_err()), names, "{place}");
    } else {
        assert_eq!(unknown, Ok(()), "{place}");
        assert!(members.keys().eq(properties.keys()), "{place} is to have a whole example");
    }
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    for (name, property) in properties {
        let mut without = members.clone();
        without.remove(name);
        let mut null = without.clone();
        null.insert(name.clone(), Value::Null);
        // What needs at least one field gets another, so that only the one that is missing counts.
        if !without.is_empty() || schema["minProperties"].is_null() {
            let missing = with(without.into());
            assert_eq!(missing.is_err(), required.contains(&json!(name)), "{place}/{name}: {missing:?}");
        }
        let null = with(null.into());
        assert_eq!(null.is_ok(), allows_null(property), "{place}/{name} null: {null:?}");
        let resolved = resolve(document, property);
        if members.get(name).is_some_and(|value| !value.is_null()) {
            compare(document, property, sample, &format!("{place}/{name}"), take);
        } else {
            let simple = ["enum", "properties", "items"].iter().all(|key| resolved.get(key).is_none());
            assert!(simple, "{place}/{name} has no example");
        }
    }
}

fn example(schema: &Value) -> &Value {
    schema.pointer("/examples/0").unwrap_or_else(|| panic!("no example in {schema}"))
}

fn body_schema<'a>(document: &'a Value, operation: &'a Value) -> Option<&'a Value> {
    let schema = operation.pointer("/requestBody/content/application~1json/schema")?;
    Some(resolve(document, schema))
}

/// The path with the ids of the body.
fn filled(path: &str, body: &Value) -> String {
    let Some((parent, id)) = path.split_once('{') else { return path.to_owned() };
    let id = body[id.trim_end_matches('}')].as_str().unwrap_or("id");
    format!("{parent}{id}")
}

#[test]
fn every_route_is_described_and_every_description_has_a_route() {
    let document = document();
    let described: BTreeSet<_> =
        operations(&document).into_iter().map(|(path, method, _)| (path, method.to_string())).collect();
    let routes: BTreeSet<_> =
        ROUTES.iter().map(|route| (route.path.to_owned(), route.method.to_string())).collect();
    assert_eq!(described, routes);
}

#[test]
fn requests_and_replies_are_as_described() {
    let document = document();
    for (path, method, operation) in operations(&document) {
        let schema = body_schema(&document, &operation);
        let body = schema.map(example);
        let text = body.map(Value::to_string).unwrap_or_default();
        let parsed = parse(&method, &filled(&path, body.unwrap_or(&Value::Null)), text.as_bytes());
        let replies = operation["responses"].as_object().unwrap();
        assert!(replies.contains_key("400"), "{method} {path}");
        if operation["x-not-supported-yet"] == true {
            let message = parsed.unwrap_err().message;
            assert!(message.ends_with("is not supported yet."), "{method} {path}: {message}");
            assert!(!replies.contains_key("200") && !replies.contains_key("204"), "{method} {path}");
        } else {
            parsed.unwrap_or_else(|fault| panic!("{method} {path}: {}", fault.message));
            assert_eq!(method == Method::GET, replies.contains_key("200"), "{method} {path}");
            let bare = [Method::GET, Method::DELETE].contains(&method);
            assert_eq!(bare, schema.is_none(), "{method} {path}");
            assert_ne!(replies.contains_key("200"), replies.contains_key("204"), "{method} {path}");
        }
    }
}

#[test]
fn bodies_are_as_described() {
    let document = document();
    let mut count = 0;
    for (path, method, operation) in operations(&document) {
        let Some(schema) = body_schema(&document, &operation) else { continue };
        let sample = example(schema);
        let path = filled(&path, sample);
        let take = |value: &Value| {
            parse(&method, &path, value.to_string().as_bytes()).map(drop).map_err(|fault| fault.message)
        };
        compare(&document, schema, sample, "", &take);
        count += 1;
    }
    assert!(count > 20, "{count}");
}

fn compare_with<T: DeserializeOwned>(name: &str) {
    let document = document();
    let schema = &document["components"]["schemas"][name];
    let take = |value: &Value| {
        serde_json::from_str::<T>(&value.to_string()).map(drop).map_err(|error| error.to_string())
    };
    compare(&document, schema, example(schema), "", &take);
}

#[test]
fn declarations_are_as_described() {
    compare_with::<MicrovmConfig>("VmConfig");
    compare_with::<CgroupSection>("CgroupSection");
}

#[test]
fn examples_can_be_used() {
    let document = document();
    let whole = example(&document["components"]["schemas"]["VmConfig"]);
    let mut config = MicrovmConfig::from_json(&whole.to_string()).unwrap();
    // What is declared is shown as it was written.
    assert_eq!(serde_json::to_value(&config).unwrap()["drives"], whole["drives"]);
    for (path, method, operation) in operations(&document) {
        let Some(schema) = body_schema(&document, &operation) else { continue };
        let sample = example(schema);
        let request = parse(&method, &filled(&path, sample), sample.to_string().as_bytes()).unwrap();
        let action: Action = request.action;
        config.apply(action).unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    }
}

/// The schemas of replies say what their examples are, as far as names go; the replies themselves are compared where
/// they are made.
#[test]
fn examples_of_replies_have_the_names_of_their_schemas() {
    let document = document();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        let (Some(sample), Some(properties)) =
            (schema.pointer("/examples/0"), schema["properties"].as_object())
        else {
            continue;
        };
        let sample = sample.as_object().unwrap();
        assert!(sample.keys().all(|key| properties.contains_key(key)), "{name}");
        for key in schema["required"].as_array().into_iter().flatten() {
            assert!(sample.contains_key(key.as_str().unwrap()), "{name}: {key}");
        }
    }
}
