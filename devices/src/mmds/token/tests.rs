use super::*;

#[test]
fn a_token_is_valid_until_it_expires() {
    let (mut tokens, now) = (Tokens::new(), Instant::now());
    let token = tokens.issue(2, now).unwrap();
    assert!(tokens.is_valid(token.as_bytes(), now));
    assert!(tokens.is_valid(token.to_uppercase().as_bytes(), now + Duration::from_millis(1999)));
    assert!(!tokens.is_valid(token.as_bytes(), now + Duration::from_secs(2)));
    assert_ne!(token, tokens.issue(2, now).unwrap());
}

#[test]
fn lifetimes_are_bounded() {
    let (mut tokens, now) = (Tokens::new(), Instant::now());
    for ttl in [0, 21_601, u32::MAX] {
        let error = tokens.issue(ttl, now).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
            )
        );
    }
    for ttl in [1, 21_600] {
        let token = tokens.issue(ttl, now).unwrap();
        assert!(tokens.is_valid(token.as_bytes(), now));
    }
}

#[test]
fn what_we_did_not_make_is_invalid() {
    let now = Instant::now();
    let (mut tokens, mut others) = (Tokens::new(), Tokens::new());
    let foreign = others.issue(60, now).unwrap();
    assert!(!tokens.is_valid(foreign.as_bytes(), now), "before the first token");
    let token = tokens.issue(60, now).unwrap();
    assert!(!tokens.is_valid(foreign.as_bytes(), now));
    for index in 0..token.len() {
        let mut forged = token.clone().into_bytes();
        forged[index] = if forged[index] == b'0' { b'1' } else { b'0' };
        assert!(!tokens.is_valid(&forged, now), "digit {index}");
    }
    for other in
        [&token[1..], &token[2..], &format!("{token}00"), &format!("g{}", &token[1..]), "", "\u{661}"]
    {
        assert!(!tokens.is_valid(other.as_bytes(), now), "{other}");
    }
}
