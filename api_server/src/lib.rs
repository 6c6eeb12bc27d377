//! HTTP on a unix socket to actions and back.
