//! Bodies made at random from the OpenAPI document, right ones and wrong ones.

use std::cell::Cell;

use hyper::Method;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use resources::MicrovmConfig;
use serde_json::{Map, Value, json};

use crate::openapi_tests::{document, operations, resolve};
use crate::parse;

/// Bodies for each endpoint. The same ones in each run.
const CASES: u32 = 300;

/// What no document allows everywhere.
fn rubbish() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(json!("x".repeat(5000))),
    ];
    leaf.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec(("[a-z_]{0,8}", inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
    .boxed()
}

/// What `schema` describes, with something wrong in it now and then.
fn described(document: &Value, schema: &Value) -> BoxedStrategy<Value> {
    let schema = resolve(document, schema);
    prop_oneof![19 => right(document, schema), 1 => rubbish()].boxed()
}

fn right(document: &Value, schema: &Value) -> BoxedStrategy<Value> {
    if let Some(values) = schema["enum"].as_array() {
        return select(values.clone()).boxed();
    }
    let is =
        |kind: &str| schema["type"] == kind || schema["type"].as_array().is_some_and(|all| all[0] == kind);
    if is("object") {
        return object(document, schema);
    }
    if is("array") {
        return vec(described(document, &schema["items"]), 0..4).prop_map(Value::from).boxed();
    }
    if is("boolean") {
        return any::<bool>().prop_map(Value::from).boxed();
    }
    if is("integer") {
        let low = schema["minimum"].as_u64().unwrap_or(0);
        let high = schema["maximum"].as_u64().unwrap_or(u64::MAX);
        let edges = vec![low, low.saturating_sub(1), high, high.saturating_add(1)];
        return prop_oneof![low..=high, select(edges)].prop_map(Value::from).boxed();
    }
    if is("string") {
        let known = ["a", "eth0", "/tmp/x", "06:00:ac:10:00:02", "0x1", "0b1x0", "V2", "169.254.1.2"];
        let examples = schema["examples"].as_array().cloned().unwrap_or_default();
        let known: Vec<Value> = known.iter().map(|text| json!(text)).chain(examples).collect();
        return prop_oneof![4 => select(known), 1 => ".{0,70}".prop_map(Value::from)].boxed();
    }
    rubbish()
}

/// The required members nearly always, the others half of the time, and a stranger now and then.
fn object(document: &Value, schema: &Value) -> BoxedStrategy<Value> {
    let required = |name: &str| {
        schema["required"].as_array().is_some_and(|names| names.iter().any(|required| required == name))
    };
    let empty = Map::new();
    let members: Vec<BoxedStrategy<Option<(String, Value)>>> = schema["properties"]
        .as_object()
        .unwrap_or(&empty)
        .iter()
        .map(|(name, schema)| {
            let share = if required(name) { 0.97 } else { 0.5 };
            let name = name.clone();
            let member = described(document, schema).prop_map(move |value| (name.clone(), value));
            prop::option::weighted(share, member).boxed()
        })
        .collect();
    let stranger = prop::option::weighted(0.03, ("[a-z_]{0,8}", rubbish()));
    (members, stranger)
        .prop_map(|(members, stranger)| {
            Value::Object(members.into_iter().flatten().chain(stranger).collect())
        })
        .boxed()
}

/// The path with the body's own id in it, if it has one.
fn path_for(path: &str, body: &Value) -> String {
    let Some((front, name)) = path.split_once('{') else { return path.to_owned() };
    let id =
        body[name.trim_end_matches('}')].as_str().filter(|id| !id.is_empty() && !id.contains(['/', '?']));
    format!("{front}{}", id.unwrap_or("a"))
}

#[test]
fn bodies_are_taken_only_as_the_document_says_and_refused_with_a_reason() {
    let document = document();
    let taken = Cell::new(0);
    for (path, method, operation) in operations(&document) {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        if !schema.is_object() {
            continue;
        }
        let mut whole = schema.clone();
        whole["components"] = document["components"].clone();
        let validator = jsonschema::validator_for(&whole).unwrap();
        let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let outcome = TestRunner::new_with_rng(config, rng).run(&described(&document, schema), |body| {
            let right = try_body(&method, &path_for(&path, &body), &body, &validator)?;
            taken.set(taken.get() + u32::from(right));
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    }
    assert!(taken.get() > 500, "only {} bodies were right: the generator is no good", taken.get());
}

/// Whether the body is taken, by the route and by a microVM that has nothing declared yet.
fn try_body(
    method: &Method,
    path: &str,
    body: &Value,
    validator: &jsonschema::Validator,
) -> Result<bool, TestCaseError> {
    let refusal = match parse(method, path, body.to_string().as_bytes()) {
        Err(fault) => fault.message,
        Ok(request) => match MicrovmConfig::default().apply(request.action) {
            Err(error) => error.to_string(),
            Ok(()) => {
                let wrong = validator.iter_errors(body).next().map(|error| error.to_string());
                prop_assert_eq!(wrong, None, "{} {} took {}", method, path, body);
                return Ok(true);
            }
        },
    };
    prop_assert!(!refusal.is_empty() && !refusal.contains('\n'), "{} {} {}: {}", method, path, body, refusal);
    Ok(false)
}
