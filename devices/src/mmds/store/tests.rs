use serde_json::json;

use super::*;

fn store(document: Value) -> Mmds {
    let mut mmds = Mmds::new(51_200);
    mmds.put(document).unwrap();
    mmds
}

#[test]
fn the_document_is_null_before_the_first_put_and_cannot_be_patched() {
    let mut mmds = Mmds::new(100);
    assert_eq!(mmds.get(), Value::Null);
    assert_eq!(mmds.patch(json!({"a": 1})), Err(MmdsError::NotInitialized));
    assert_eq!(mmds.read("/", Format::Json), Err(ReadError::NotFound));
    mmds.put(json!({"b": 2})).unwrap();
    mmds.patch(json!({"a": 1})).unwrap();
    assert_eq!(mmds.get(), json!({"a": 1, "b": 2}));
}

#[test]
fn what_is_larger_than_the_limit_changes_nothing() {
    let mut mmds = Mmds::new(r#"{"a":"12345"}"#.len());
    mmds.put(json!({"a": "12345"})).unwrap();
    assert_eq!(mmds.put(json!({"a": "123456"})), Err(MmdsError::TooLarge { size: 14, limit: 13 }));
    assert_eq!(mmds.patch(json!({"b": 1})), Err(MmdsError::TooLarge { size: 19, limit: 13 }));
    assert_eq!(mmds.get(), json!({"a": "12345"}));
    mmds.patch(json!({"a": null, "b": 1})).unwrap();
    assert_eq!(mmds.get(), json!({"b": 1}));
}

/// The cases of RFC 7396, appendix A.
#[test]
fn patches_are_merged_as_the_rfc_says() {
    for (original, patch, result) in [
        (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
        (json!({"a":"b"}), json!({"a":null}), json!({})),
        (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
        (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
        (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
        (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
        (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
        (json!({"a":"b"}), json!(["c"]), json!(["c"])),
        (json!({"a":"foo"}), Value::Null, Value::Null),
        (json!({"a":"foo"}), json!("bar"), json!("bar")),
        (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
        (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
        (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
    ] {
        let mut mmds = store(original.clone());
        mmds.patch(patch.clone()).unwrap();
        assert_eq!(mmds.get(), result, "{original} with {patch}");
    }
}

#[test]
fn parts_are_read_in_both_formats() {
    let mmds = store(json!({
        "latest": {"meta-data": {"ami-id": "ami-1", "tags": ["x"]}, "user-data": "line\n\"2\""},
        "a/b": "slash", "count": 3,
    }));
    for (path, json, imds) in [
        ("/latest/meta-data/ami-id", Ok(r#""ami-1""#), Ok("ami-1")),
        ("/latest/meta-data", Ok(r#"{"ami-id":"ami-1","tags":["x"]}"#), Ok("ami-id\ntags")),
        ("/latest/meta-data/", Ok(r#"{"ami-id":"ami-1","tags":["x"]}"#), Ok("ami-id\ntags")),
        ("//latest///meta-data//tags/0", Ok(r#""x""#), Ok("x")),
        ("/latest/meta-data/tags", Ok(r#"["x"]"#), Err(ReadError::NotImds)),
        ("/latest/user-data", Ok(r#""line\n\"2\"""#), Ok("line\n\"2\"")),
        ("/a~1b", Ok(r#""slash""#), Ok("slash")),
        ("/count", Ok("3"), Err(ReadError::NotImds)),
        ("/Latest", Err(ReadError::NotFound), Err(ReadError::NotFound)),
        ("/latest/meta-data/ami-id/x", Err(ReadError::NotFound), Err(ReadError::NotFound)),
    ] {
        assert_eq!(mmds.read(path, Format::Json).as_deref(), json.as_deref(), "{path}");
        assert_eq!(mmds.read(path, Format::Imds).as_deref(), imds.as_deref(), "{path}");
    }
    let root = mmds.read("/", Format::Imds).unwrap();
    assert_eq!(root, "a/b\ncount\nlatest/");
}
