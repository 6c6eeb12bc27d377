//! Integration tests, the emulated test host, guest images and the demo.
