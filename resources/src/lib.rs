//! What was asked for: the microVM's declared state as plain, validated types.
